"""Ranking and retrieval metrics."""
