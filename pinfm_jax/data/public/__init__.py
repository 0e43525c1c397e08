"""Loaders of the public data sets, and how their files are fetched."""
