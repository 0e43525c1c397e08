"""PinFM in JAX: pretrain over user activity, fine-tune inside a ranker, serve with DCAT from int4 tables."""

__version__ = '0.1.0'
