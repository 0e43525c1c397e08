"""Random numbers of single examples: each a hash of a seed of its own, so that no batch changes them.

An example has one uint32 seed, a hash of the run's seed and the example's own index. Every use folds its purpose and
step into that seed. So an example gets the same numbers alone, in another order or beside other examples.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pinfm_jax.model.hashing import fold_seed, hash_uniform


def example_seeds(index_B: jax.Array, seed: Any, *parts: Any) -> jax.Array:
  """One seed an example.

  Args:
    index_B: the examples' own indices (in their data set, say), integers.
    seed: of the run, a scalar.
    *parts: scalars to be folded into it: the step, the purpose.

  Returns:
    [B] uint32.
  """
  return _settled(hash_uniform(jnp.asarray(index_B).astype(jnp.uint32), fold_seed(seed, *parts)))


def fold(seed_B: jax.Array, *parts: Any) -> jax.Array:
  """[B] uint32: the examples' seeds for one purpose or step."""
  for part in parts:
    seed_B = hash_uniform(seed_B ^ jnp.uint32(0x5BD1E995), fold_seed(0, part))
  return _settled(seed_B)


def uniforms(seed_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Numbers in (0, 1) of each example.

  Args:
    seed_B: uint32, one an example.
    shape: of one example's numbers.

  Returns:
    [B, *shape] float32; neither 0 nor 1 occurs.
  """
  size = math.prod(shape)
  counters_N = hash_uniform(jnp.arange(size, dtype=jnp.uint32), jnp.uint32(0x2545F491))
  bits_BN = _settled(hash_uniform(seed_B[:, None] ^ counters_N[None, :], jnp.uint32(0x85EBCA77)))
  return open_interval(bits_BN).reshape(seed_B.shape[0], *shape)


def open_interval(bits: jax.Array) -> jax.Array:
  """uint32 bits -> float32 in (0, 1).

  Of 23 bits: the middle of each of the 2^23 parts is a float32. With one bit more the last of them rounds to 1, whose
  normal number is infinite: one draw in 16 million, and every history of a data set draws thousands.
  """
  return ((bits >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)


def normals(seed_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B, *shape] standard normal numbers of each example."""
  return math.sqrt(2) * jax.scipy.special.erfinv(2 * uniforms(seed_B, shape) - 1)


def _settled(bits: jax.Array) -> jax.Array:
  """A one-to-one change of uint32 bits that XLA cannot fuse with what comes before and after, since it is a loop.

  Each hash uses its argument several times; fused into one another and into the pixels drawn from them, chains of
  hashes take XLA minutes to compile.
  """
  return jax.lax.fori_loop(0, 2, lambda i, h: h * jnp.uint32(0x9E3779B1) + i.astype(jnp.uint32), bits)
