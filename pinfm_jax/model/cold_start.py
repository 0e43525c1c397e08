"""Cold-start techniques of fine-tuning: candidate-id randomisation and item-age-dependent dropout (PinFM section 3.2).

Both draw their bits from a hash of (run's seed, step, place in the global batch), so every mesh draws the same.
"""

import jax
import jax.numpy as jnp

from pinfm_jax.config import ColdStartConfig
from pinfm_jax.model.hashing import fold_seed, hash_uniform

Array = jax.Array


def randomise_candidates(item_UC2: Array, place_UC: Array, seed: Array, share: float) -> Array:
  """Replaces a share of the candidate ids by random ids (CIR), so that the ranker learns not to lean on the id alone.

  A random id is 64 random bits: its hashed rows are rows of the tables like a new item's, and no real item's set.

  Args:
    item_UC2: uint32 id words.
    place_UC: each candidate's place in the global batch.
    seed: of the run and its step (`hashing.fold_seed`).
    share: probability of replacement, 0.1 in the paper.
  """
  if share == 0:
    return item_UC2
  replace_UC = _below(place_UC, fold_seed(seed, 0), share)
  random_UC2 = jnp.stack([hash_uniform(place_UC, fold_seed(seed, word)) for word in (1, 2)], axis=-1)
  return jnp.where(replace_UC[..., None], random_UC2, item_UC2)


def age_dropout(
  outputs_UCO: Array, age_hours_UC: Array, place_UC: Array, seed: Array, config: ColdStartConfig
) -> Array:
  """Drops the module's outputs with a probability that falls with the item's age (IDD), inverted.

  The paper does not say whether elements or whole vectors are dropped; `config.whole_vector` chooses.

  Args:
    outputs_UCO: the module's outputs.
    age_hours_UC: item ages; NaN (unknown) counts as old.
    place_UC: each candidate's place in the global batch.
    seed: of the run and its step (`hashing.fold_seed`).
    config: ages that bound the buckets, and a dropout probability for each.
  """
  rate_UC = jnp.zeros(age_hours_UC.shape)
  for edge, rate in sorted(zip(config.age_edges_hours, config.age_dropout, strict=True), reverse=True):
    rate_UC = jnp.where(age_hours_UC < edge, rate, rate_UC)
  width = 1 if config.whole_vector else outputs_UCO.shape[-1]
  place_UCO = place_UC[..., None] * width + jnp.arange(width)
  keep_UCO = ~_below(place_UCO, fold_seed(seed, 3), rate_UC[..., None])
  return jnp.where(keep_UCO, outputs_UCO / (1 - rate_UC[..., None]), 0)


def _below(place: Array, seed: Array, probability: Array | float) -> Array:
  uniform = (hash_uniform(place, seed) >> 8).astype(jnp.float32) / 2**24
  return uniform < probability
