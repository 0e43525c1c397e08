"""The decoder's share of the FLOP/s that plain matmuls of the same shapes reach in the same run."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pinfm_jax.config import TowerConfig
from pinfm_jax.model.transformer import Decoder

Array = jax.Array


class Product(NamedTuple):
  """A matmul of the forward pass: [batch, rows, inner] x [batch, inner, columns]."""

  batch: int
  rows: int
  inner: int
  columns: int

  @property
  def flops(self) -> int:
    """Multiplications and additions of the product and of the two products of its backward pass."""
    return 6 * self.batch * self.rows * self.inner * self.columns


def block_products(tower: TowerConfig, users: int, length: int) -> list[Product]:
  """The matmuls of one block's forward pass; attention is counted over the whole [L, L] square."""
  tokens, width, head_width = users * length, tower.width, tower.width // tower.heads
  if tower.backbone == 'hstu':
    projections = [(width, 4 * width), (width, width)]
  else:
    hidden = tower.mlp_ratio * width
    projections = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
  pairs = users * tower.heads
  attention = [Product(pairs, length, head_width, length), Product(pairs, length, length, head_width)]
  return [Product(1, tokens, inner, columns) for inner, columns in projections] + attention


def measure_tower(tower: TowerConfig, users: int = 8, length: int = 256, repeats: int = 15) -> dict[str, float]:
  """Times the decoder's context pass, forward and backward, against its bare matmuls.

  The backward pass is with respect to all parameters and the inputs. Both sides do the matmuls of `block_products`,
  the tower everything else besides. They take turns, so that a busy machine slows both; a pair's ratio compares
  neighbours in time.

  Args:
    tower: the decoder; it leaves out some of the scores that causality hides, which are counted all the same.
    users: U, histories of full length.
    length: L.
    repeats: timed pairs, after one that warms up.

  Returns:
    flops (one step), tower_seconds and plain_seconds (the best), tower_flops and plain_flops (a second, at the best),
    ratio (of these two), ratio_median, ratio_min and ratio_max (of the pairs).
  """
  step, plain = _tower_step(tower, users, length), _plain_step(tower, users, length)
  pairs = [(_seconds(step), _seconds(plain)) for _ in range(repeats + 1)][1:]
  ratios = [plain_time / tower_time for tower_time, plain_time in pairs]
  tower_best, plain_best = (min(times) for times in zip(*pairs, strict=True))
  flops = tower.layers * sum(product.flops for product in block_products(tower, users, length))
  return {
    'flops': flops,
    'tower_seconds': tower_best,
    'plain_seconds': plain_best,
    'tower_flops': flops / tower_best,
    'plain_flops': flops / plain_best,
    'ratio': plain_best / tower_best,
    'ratio_median': statistics.median(ratios),
    'ratio_min': min(ratios),
    'ratio_max': max(ratios),
  }


def plain_matmuls(operands: list[tuple[Array, Array, Array]]) -> list[Array]:
  """Each (a, b, cotangent of a @ b): the product and both products of its backward pass."""
  results = []
  for a, b, cotangent in operands:
    results += [a @ b, cotangent @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ cotangent]
  return results


def plain_operands(products: list[Product], dtype: jnp.dtype) -> list[tuple[Array, Array, Array]]:
  """Random arrays for `plain_matmuls`, laid out as a matmul likes them."""
  operands = []
  for number, (batch, rows, inner, columns) in enumerate(products):
    keys = jax.random.split(jax.random.key(number), 3)
    shapes = [(batch, rows, inner), (batch, inner, columns), (batch, rows, columns)]
    shapes = [shape if batch > 1 else shape[1:] for shape in shapes]
    operands.append(tuple(jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True)))
  return operands


def _tower_step(tower: TowerConfig, users: int, length: int) -> Callable[[], Any]:
  model = Decoder(tower)
  x_ULD = jax.random.normal(jax.random.key(0), (users, length, tower.width), jnp.dtype(tower.dtype))
  mask_UL = jnp.ones((users, length), bool)
  params = nn.unbox(jax.jit(lambda x: model.init(jax.random.key(1), x, mask_UL, method='context'))(x_ULD))
  weight_ULD = jax.random.normal(jax.random.key(2), x_ULD.shape)

  @jax.jit
  def gradients(params: Any, x_ULD: Array) -> Any:
    def loss(params: Any, x_ULD: Array) -> Array:
      return jnp.sum(weight_ULD * model.apply(params, x_ULD, mask_UL, train=True, method='context')[0])

    return jax.grad(loss, argnums=(0, 1))(params, x_ULD)

  return lambda: gradients(params, x_ULD)


def _plain_step(tower: TowerConfig, users: int, length: int) -> Callable[[], Any]:
  operands = plain_operands(block_products(tower, users, length), jnp.dtype(tower.dtype))
  block = jax.jit(plain_matmuls)
  return lambda: [block(operands) for _ in range(tower.layers)]


def _seconds(run: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start
