"""Layers that several parts of the model share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


def dense(features: int, axes: tuple[str | None, ...], scale: float = 1.0, **kwargs: Any) -> nn.Dense:
  """A Dense layer whose kernel carries logical axis names for `train.sharding`."""
  init = nn.initializers.variance_scaling(scale, 'fan_in', 'truncated_normal')
  return nn.Dense(features, kernel_init=nn.with_logical_partitioning(init, axes), **kwargs)


def rotate(x_ULHK: Array, place_UL: Array) -> Array:
  """Rotary positions (arXiv:2104.09864): turns pairs of elements by angles that grow with the token's place.

  The product of a turned query and a turned key depends on the distance of their places alone. Element k is paired with
  k + K / 2, and pair k turns by place * 10000^(-2 k / K).

  Args:
    x_ULHK: queries or keys, K even.
    place_UL: int32 places, broadcast to [U, L].

  Returns:
    Of the shape and type of `x_ULHK`; angles and products are in float32.
  """
  half = x_ULHK.shape[-1] // 2
  angle_ULK = place_UL[..., None].astype(jnp.float32) * 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
  cosine, sine = jnp.cos(angle_ULK)[:, :, None], jnp.sin(angle_ULK)[:, :, None]
  first, second = jnp.split(x_ULHK.astype(jnp.float32), 2, axis=-1)
  turned = [first * cosine - second * sine, first * sine + second * cosine]
  return jnp.concatenate(turned, axis=-1).astype(x_ULHK.dtype)
