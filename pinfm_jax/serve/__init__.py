"""Conversion of a checkpoint to a serving bundle, and scoring with it."""
