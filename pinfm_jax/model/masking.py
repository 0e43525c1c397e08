"""Random draws of the training that hide ids and actions: hashes of (seed, step, place), so any mesh draws the same."""

import jax
import jax.numpy as jnp

from pinfm_jax.model.hashing import fold_seed, hash_uniform

Array = jax.Array

# What a draw is for: draws at one place are independent between the purposes.
HIDE_ID, HIDE_CANDIDATE_ID, HIDE_ACTIONS = 1, 2, 3


def draw(place: Array, share: float, seed: int, step: Array, purpose: int) -> Array:
  """True with probability `share` at each place.

  Args:
    place: integers, each element's place in the global batch.
    share: probability, up to 2^-24 exact.
    seed: of the run.
    step: training step.
    purpose: one of the constants above.
  """
  uniform = (hash_uniform(place, fold_seed(seed, step, purpose)) >> 8).astype(jnp.float32) / 2**24
  return uniform < share


def batch_places(shape: tuple[int, int]) -> Array:
  """Places of the elements of a global batch [U, L]."""
  return jnp.arange(shape[0] * shape[1], dtype=jnp.uint32).reshape(shape)
