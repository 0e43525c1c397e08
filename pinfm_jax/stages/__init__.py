"""The stages of `pinfm run`, one file each."""
