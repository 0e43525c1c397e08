"""Blocks that cross the ranking model's features: the vector x0 and its fields in, a vector of known width out."""
