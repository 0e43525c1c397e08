"""Layers that several parts of the model share."""

from typing import Any

import flax.linen as nn


def dense(features: int, axes: tuple[str | None, ...], scale: float = 1.0, **kwargs: Any) -> nn.Dense:
  """A Dense layer whose kernel carries logical axis names for `train.sharding`."""
  init = nn.initializers.variance_scaling(scale, 'fan_in', 'truncated_normal')
  return nn.Dense(features, kernel_init=nn.with_logical_partitioning(init, axes), **kwargs)
