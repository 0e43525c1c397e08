"""Losses, optimizer, checkpoints and the training stages."""
