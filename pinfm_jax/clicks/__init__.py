"""`pinfm clicks`: the ranker without histories on public click-through sets."""
