"""Views of images on the device: crops, flips, colours, rotations, masks, drawn an example at a time from its seed.

Crops and flips are two matrix products, one over rows and one over columns, so they differentiate and cost little.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pinfm_jax.robustness.draws import uniforms

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class ViewConfig:
  """How a contrastive view is drawn.

  Attributes:
    area: least and largest share of the image that a crop covers.
    aspect: largest ratio of its sides.
    colour: brightness, contrast and saturation change by up to this factor, each in (1 - colour, 1 + colour).
    grey: share of views without colour.
  """

  area: tuple[float, float] = (0.4, 1.0)
  aspect: float = 4 / 3
  colour: float = 0.3
  grey: float = 0.1


def view(x: jax.Array, seed_B: jax.Array, config: ViewConfig = ViewConfig()) -> jax.Array:
  """One view of each image: a random resized crop, flip, colours, grey; not cut to [0, 1], so no gradient is lost."""
  u = uniforms(seed_B, (9,)).T
  area = config.area[0] + (config.area[1] - config.area[0]) * u[0]
  ratio = jnp.exp((2 * u[1] - 1) * 0.5 * jnp.log(config.aspect))
  height, width = (jnp.minimum(side, 1.0) for side in (jnp.sqrt(area) * ratio, jnp.sqrt(area) / ratio))
  rows = _sampling(x.shape[1], (1 - height) * u[2], height)
  columns = _sampling(x.shape[2], (1 - width) * u[3], width)
  columns = jnp.where((u[4] < 0.5)[:, None, None], columns[:, ::-1], columns)
  x = resample(x, rows, columns)
  factor = 1 + config.colour * (2 * u[5:8, :, None, None, None] - 1)
  x = x * factor[0]
  mean = jnp.mean(grey(x), axis=(1, 2), keepdims=True)
  x = mean + factor[1] * (x - mean)
  saturation = jnp.where(u[8, :, None, None, None] < config.grey, 0.0, factor[2])
  return grey(x) + saturation * (x - grey(x))


def shifted(x: jax.Array, seed_B: jax.Array) -> jax.Array:
  """The classifier's augmentation: each image moved by up to 4 pixels both ways (black comes in), maybe flipped."""
  u = uniforms(seed_B, (3,)).T
  offset = jnp.floor(u[:2] * 9) - 4
  place = jnp.arange(x.shape[1], dtype=jnp.float32)
  rows, columns = (
    (place[None, None, :] == place[None, :, None] + o[:, None, None]).astype(x.dtype) for o in (offset[0], offset[1])
  )
  columns = jnp.where((u[2] < 0.5)[:, None, None], columns[:, ::-1], columns)
  return resample(x, rows, columns)


def resample(x: jax.Array, rows_BIH: jax.Array, columns_BJW: jax.Array) -> jax.Array:
  """[B, I, J, C]: each output pixel as a weighted mean of a row's and a column's pixels of [B, H, W, C]."""
  x = jnp.einsum('bih,bhwc->biwc', rows_BIH, x)
  return jnp.einsum('bjw,biwc->bijc', columns_BJW, x)


def grey(x: jax.Array) -> jax.Array:
  """[B, H, W, 1]: brightness as the eye weighs the three colours."""
  return jnp.sum(x * jnp.asarray(_LUMA, x.dtype), axis=-1, keepdims=True)


def rotate(x: jax.Array, turns_B: jax.Array) -> jax.Array:
  """Each square image turned counter-clockwise by its number of quarters, as `jnp.rot90`."""
  turned = jnp.stack([jnp.rot90(x, k, axes=(1, 2)) for k in range(4)])
  chosen = jax.nn.one_hot(turns_B, 4, axis=0, dtype=x.dtype)[..., None, None, None]
  return jnp.sum(turned * chosen, axis=0)  # a sum, not a gather: its gradient is no scatter


def mask(seed_B: jax.Array, side: int = 32, patch: int = 8, hidden: float = 0.5) -> jax.Array:
  """Which pixels are shown: squares of `patch` x `patch`, a fixed number of them hidden, drawn for each example.

  Returns:
    [B, side, side, 1] float32, 1 = shown.
  """
  cells = (side // patch) ** 2
  drawn_BN = uniforms(seed_B, (cells,))
  rank_BN = jnp.sum(drawn_BN[:, None, :] < drawn_BN[:, :, None], axis=-1)
  shown = (rank_BN >= round(hidden * cells)).astype(jnp.float32).reshape(-1, side // patch, side // patch, 1)
  return jnp.repeat(jnp.repeat(shown, patch, axis=1), patch, axis=2)


def centre_mask(size: int) -> jax.Array:
  """[size, 32, 32, 1]: the paper's mask, whose square of 16 x 16 in the middle is hidden."""
  inside = jnp.abs(jnp.arange(32) - 15.5) < 8
  shown = 1.0 - (inside[:, None] & inside[None, :]).astype(jnp.float32)
  return jnp.broadcast_to(shown[None, :, :, None], (size, 32, 32, 1))


def _sampling(side: int, start_B: jax.Array, length_B: jax.Array) -> jax.Array:
  """[B, side, side]: weights that stretch the part [start, start + length] of a line (in [0, 1]) to all of it.

  Linear interpolation between the two nearest places; beyond the ends, the last place repeats.
  """
  wanted = (start_B[:, None] + length_B[:, None] * (jnp.arange(side) + 0.5) / side) * side - 0.5
  wanted = jnp.clip(wanted, 0, side - 1)
  return jnp.maximum(0.0, 1.0 - jnp.abs(wanted[:, :, None] - jnp.arange(side, dtype=jnp.float32)))
