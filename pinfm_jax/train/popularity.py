"""The popularity (logQ) correction of the negative columns, and the streaming count of items that it may rest on."""

from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from pinfm_jax.model.hashing import hash_rows
from pinfm_jax.train.negatives import Columns

Array = jax.Array

DEPTH = 4  # hash functions of the sketch
_SEED = 0x51E7C4  # of its hash family: independent of the item tables'
_LEAST = 1e-30


class Draws(NamedTuple):
  """The random items of the catalogue that are columns besides those of the batch.

  Attributes:
    count: V, how many are drawn.
    catalogue: N, from how many items.
    power: each by its frequency to this power; 0 = uniformly.
    power_sum: sum of these over the catalogue.
  """

  count: int
  catalogue: int
  power: float = 0.0
  power_sum: float = 1.0


def log_inclusion(frequency_K: Array, columns: Columns, draws: Draws) -> Array:
  """log q_k, the probability that column k's item is a column at all: what is subtracted from its logit.

  InfoNCE stands for a softmax over the whole catalogue. Its denominator, the sum of exp(s_i) over all items, is
  estimated without bias by the sum of exp(s_k) / q_k over the items at hand, where q_k is the probability that item k
  is at hand (Horvitz and Thompson). Columns are distinct, so q_k is not the item's frequency p_k, as in Yi et al. 2019
  where every example adds its item once more: of n positive events at least one is of item k with probability
  1 - (1 - p_k)^n, and of the distinct items of a batch a share becomes columns. V uniform draws from N items bring the
  item in with probability 1 - (1 - 1 / N)^V besides, and independently:

    q_k = 1 - (1 - share * (1 - (1 - p_k)^n)) * (1 - 1 / N)^V

  with p_k^a / sum p^a in place of 1 / N where items are drawn by a power a of their frequency.

  The positive's logit is not corrected: it is in its own denominator with probability 1, so its log q is 0. Yi et al.
  correct it, as there the positive is one of the batch's sampled items; here a user's positives are never that user's
  columns. That n events are drawn independently is an approximation: one user's events resemble each other.

  Args:
    frequency_K: p_k, the item's share of all positive events.
    columns: n and share of the batch.
    draws: V and N, and how items are drawn.

  Returns:
    [K], at most 0.
  """
  p_K = jnp.clip(frequency_K, 0.0, 1.0 - 1e-6)
  in_batch_K = -columns.share * jnp.expm1(columns.positives * jnp.log1p(-p_K))
  if not draws.count:
    missed = 1.0
  elif draws.power:
    drawn_K = jnp.clip(frequency_K**draws.power / draws.power_sum, 0.0, 1.0 - 1e-6)
    missed = jnp.exp(draws.count * jnp.log1p(-drawn_K))
  else:
    missed = jnp.exp(draws.count * jnp.log1p(-1.0 / max(draws.catalogue, 2)))
  return jnp.log(jnp.maximum(in_batch_K + (1 - in_batch_K) * (1 - missed), _LEAST))


@flax.struct.dataclass
class ItemSketch:
  """A count-min sketch of the positive events' items, which fades: part of the training state.

  Attributes:
    counts_C: float32, DEPTH rows of counters one after another.
    total: float32 scalar, events counted, faded alike.
  """

  counts_C: Array
  total: Array


def empty_sketch(width: int) -> ItemSketch:
  """A sketch that has seen nothing, of DEPTH * width counters."""
  return ItemSketch(jnp.zeros(DEPTH * width, jnp.float32), jnp.zeros((), jnp.float32))


@partial(jax.jit, static_argnames='decay')
def update_sketch(sketch: ItemSketch, item_T2: Array, positive_T: Array, decay: float) -> ItemSketch:
  """Fades all counts by `decay`, then counts the positive events of a global batch.

  Conservative: an item's counters rise no further than to its own new estimate, so that popular items raise the
  estimates of the rare ones less. Counters only take maxima over distinct items: no order of summation, hence the same
  bits on every mesh. An estimate is never below the true faded count.

  Args:
    sketch: the counts so far.
    item_T2: uint32 id words of all events of the global batch.
    positive_T: the events that count.
    decay: factor a step; 1 never fades.
  """
  tokens = item_T2.shape[0]
  counts_C = sketch.counts_C * decay
  unused_T = jnp.where(positive_T, 0, 1).astype(jnp.uint32)
  unused_T, low_T, high_T = jax.lax.sort((unused_T, item_T2[:, 0], item_T2[:, 1]), num_keys=3, is_stable=False)
  new_T = (low_T[1:] != low_T[:-1]) | (high_T[1:] != high_T[:-1]) | (unused_T[1:] != unused_T[:-1])
  run_T = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(new_T, dtype=jnp.int32)])
  count_R = jnp.zeros(tokens, jnp.float32).at[run_T].add(1.0 - unused_T, indices_are_sorted=True)
  cells_TS = _cells(jnp.stack([low_T, high_T], axis=-1), counts_C)
  raised_T = jnp.min(counts_C[cells_TS], axis=-1) + count_R[run_T]
  cells_TS = jnp.where(unused_T[:, None] == 0, cells_TS, counts_C.shape[0])
  counts_C = counts_C.at[cells_TS].max(raised_T[:, None], mode='drop')
  return ItemSketch(counts_C, sketch.total * decay + jnp.sum(positive_T, dtype=jnp.float32))


def sketch_frequency(sketch: ItemSketch, words: Array) -> Array:
  """Estimated share of the positive events that each id has, [...]; never too low, 0 before anything was counted."""
  count = jnp.min(sketch.counts_C[_cells(words, sketch.counts_C)], axis=-1)
  return jnp.minimum(count / jnp.maximum(sketch.total, 1.0), 1.0)


def _cells(words: Array, counts_C: Array) -> Array:
  return hash_rows(words, DEPTH, counts_C.shape[0] // DEPTH, _SEED)
