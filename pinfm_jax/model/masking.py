"""Random draws of the training that hide ids, actions and parts of items: hashes, so that any mesh draws the same."""

import jax
import jax.numpy as jnp

from pinfm_jax.model.hashing import fold_seed, hash_uniform

Array = jax.Array

# What a draw is for: draws at one place are independent between the purposes.
HIDE_ID, HIDE_CANDIDATE_ID, HIDE_ACTIONS, DROP_ELEMENTS = 1, 2, 3, 4


def draw(place: Array, share: float, seed: int, step: Array, purpose: int) -> Array:
  """True with probability `share` at each place.

  Args:
    place: integers, each element's place in the global batch.
    share: probability, up to 2^-24 exact.
    seed: of the run.
    step: training step.
    purpose: one of the constants above.
  """
  return _below(hash_uniform(place, fold_seed(seed, step, purpose)), share)


def drop_elements(vectors: Array, item: Array, rate: float, seed: int, step: Array) -> Array:
  """Dropout of elements of items' vectors that is drawn by item: one loses the same elements wherever it stands.

  Args:
    vectors: [..., V].
    item: uint32 [..., 2], the words of their ids.
    rate: probability with which an element is 0; the others grow by 1 / (1 - rate).
    seed: of the run.
    step: training step; another step, another draw.
  """
  of_item = hash_uniform(item[..., 0], hash_uniform(item[..., 1], fold_seed(seed, step, DROP_ELEMENTS)))
  bits = hash_uniform(jnp.arange(vectors.shape[-1], dtype=jnp.uint32), of_item[..., None])
  return jnp.where(_below(bits, rate), 0, vectors / (1 - rate))


def _below(bits: Array, share: float) -> Array:
  """True where uint32 bits, as a uniform number of 24 bits, are below the share."""
  return (bits >> 8).astype(jnp.float32) / 2**24 < share


def batch_places(shape: tuple[int, int]) -> Array:
  """Places of the elements of a global batch [U, L]."""
  return jnp.arange(shape[0] * shape[1], dtype=jnp.uint32).reshape(shape)
