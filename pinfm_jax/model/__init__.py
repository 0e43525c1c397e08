"""Hashed tables, the transformer, DCAT and the ranking model."""
