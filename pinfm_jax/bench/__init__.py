"""Measurements that one command repeats: each prints its ratios beside their targets."""
