"""Measurements that one command repeats: each prints its ratios beside what is asked of them."""
