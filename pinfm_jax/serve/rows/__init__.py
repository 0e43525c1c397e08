"""Where table rows come from at serving time: local files, or servers on other hosts."""
