"""`pinfm sweep`: many settings of one experiment, every run once, and the tables that compare them."""
