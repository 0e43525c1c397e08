"""`pinfm study`: which interaction block, under which limits of memory and latency (arXiv:2412.01985)."""
