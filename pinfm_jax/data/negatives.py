"""What the host adds to pretraining batches for the options of the losses: random items, and how frequent items are.

A catalogue of any size stays on the host; a batch carries the few ids and numbers that its step needs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pinfm_jax.config import PretrainConfig
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.pipeline import Batch, Segments
from pinfm_jax.data.splits import pretrained_items
from pinfm_jax.data.tokens import ItemContent
from pinfm_jax.model.hashing import key_words

_MERGE_AT = 1 << 22  # keys held before they are counted


@dataclass(frozen=True)
class ItemCounts:
  """Exact counts of the items' positive events.

  Attributes:
    keys: uint64, ascending.
    counts: int64, of each key.
  """

  keys: np.ndarray
  counts: np.ndarray

  @classmethod
  def of(cls, source: Any, action_bits: int) -> 'ItemCounts':
    """Counts once over all examples, in memory that grows with the items and not with the events.

    Args:
      source: random-access examples with 'item', 'actions' and 'mask', such as `Segments`.
      action_bits: A_pos; 0 = every event.
    """
    counted = cls(np.zeros(0, np.uint64), np.zeros(0, np.int64))
    pending, held = [], 0
    for row in range(len(source)):
      example = source[row]
      positive = example['mask'] & ((example['actions'] & np.uint32(action_bits) > 0) | (action_bits == 0))
      pending.append(_keys(example['item'][positive]))
      held += len(pending[-1])
      if held >= _MERGE_AT:
        counted, pending, held = counted._plus(np.concatenate(pending)), [], 0
    return counted._plus(np.concatenate(pending)) if pending else counted

  def frequency(self, words: np.ndarray) -> np.ndarray:
    """Each id's share of all positive events, float32 [...]; 0 for one that has none.

    Args:
      words: uint32 [..., 2] id words.
    """
    keys = _keys(words)
    if not len(self.keys):
      return np.zeros(keys.shape, np.float32)
    place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
    found = np.where(self.keys[place] == keys, self.counts[place], 0)
    return (found / self.counts.sum()).astype(np.float32)

  def _plus(self, keys: np.ndarray) -> 'ItemCounts':
    unique, counts = np.unique(keys, return_counts=True)
    merged, inverse = np.unique(np.concatenate([self.keys, unique]), return_inverse=True)
    total = np.zeros(len(merged), np.int64)
    np.add.at(total, inverse, np.concatenate([self.counts, counts]))
    return ItemCounts(merged, total)


@dataclass(frozen=True)
class NegativeSource:
  """Adds 'negative_item', 'frequency' and 'negative_frequency' to batches, as far as the configuration asks.

  Attributes:
    rows: U of the global batch.
    a_row: items of the catalogue that each row carries.
    seed: of the draws.
    keys: uint64 keys of the items that may be drawn.
    counts: positive events of each item, or None.
    content: content of the items, for a model that reads it, or None.
    weights: of each item in the draws, float64; None = uniform draws.
    whole: nothing is drawn, the rows carry the whole catalogue.
  """

  rows: int
  a_row: int
  seed: int
  keys: np.ndarray
  counts: ItemCounts | None
  content: ItemContent | None = None
  weights: np.ndarray | None = None
  whole: bool = False

  @classmethod
  def of(
    cls,
    dataset: PreparedDataset,
    source: Segments,
    config: PretrainConfig,
    action_bits: int,
    until_ms: int | None,
    seed: int,
    held_out: int = 1,
  ) -> 'NegativeSource':
    """Reads the catalogue and counts the training examples, each only if an option needs it.

    Items first seen at `until_ms` or later (None: only in users' last `held_out` events) are not drawn: training must
    not learn that the future is unlikely.
    """
    keys = np.zeros(0, np.uint64)
    if config.uniform_negatives or config.full_catalogue:
      if until_ms is None:
        keys = pretrained_items(dataset, None, held_out=held_out)
      else:
        items = dataset.items
        keys = items['item_key'].to_numpy()[items['first_seen'].to_numpy() < until_ms]
    counts, weights = None, None
    if config.log_q == 'counts' or config.negative_power:
      counts = ItemCounts.of(source, action_bits)
    if config.negative_power:
      weights = counts.frequency(key_words(keys)).astype(np.float64) ** config.negative_power
    if config.log_q != 'counts':
      counts = None
    carried = len(keys) if config.full_catalogue else config.uniform_negatives
    a_row = -(-carried // config.batch_segments)
    content = source.tokens.items
    return cls(config.batch_segments, a_row, seed, keys, counts, content, weights, config.full_catalogue)

  @property
  def catalogue(self) -> int:
    """Number of items that may be drawn; at least 1."""
    return max(1, len(self.keys))

  @property
  def power_sum(self) -> float:
    """Sum of the items' weights, frequency^power; 1 where items are drawn uniformly."""
    return 1.0 if self.weights is None else float(self.weights.sum())

  @cached_property
  def _ends(self) -> np.ndarray:
    """Where each item's part of [0, 1] ends, as wide as its weight."""
    ends = np.cumsum(self.weights)
    return ends / ends[-1]

  def add(self, batches: Iterator[Batch], first_step: int, own: np.ndarray | None = None) -> Iterator[Batch]:
    """The batches of a process from a step on, with the columns added.

    The draws of a row depend on (seed, step, place of the row in the global batch) alone.

    Args:
      batches: one a step.
      first_step: step of the first one.
      own: rows of the global batch that the batches hold (`sharding.process_rows`); None = all.
    """
    if not self.a_row and self.counts is None:
      return batches
    own = np.arange(self.rows) if own is None else own
    return (self._added(batch, step, own) for step, batch in enumerate(batches, first_step))

  def _added(self, batch: Batch, step: int, own: np.ndarray) -> Batch:
    batch = dict(batch)
    if self.a_row:
      drawn = self.keys[self._places(step)[own]]
      batch['negative_item'] = key_words(drawn)
      if self.content is not None:
        batch['negative_content'] = self.content.inputs(drawn.reshape(-1))['content'].reshape(*drawn.shape, -1)
    if self.counts is not None:
      batch['frequency'] = self.counts.frequency(batch['item'])
      if self.a_row:
        batch['negative_frequency'] = self.counts.frequency(batch['negative_item'])
    return batch

  def _places(self, step: int) -> np.ndarray:
    """Places in the catalogue that the rows of the global batch carry, [rows, a_row]."""
    shape = (self.rows, self.a_row)
    if self.whole:  # items that come twice to fill the last row are one column
      return (np.arange(self.rows * self.a_row) % len(self.keys)).reshape(shape)
    bits = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, step]))
    if self.weights is None:
      return bits.integers(0, len(self.keys), shape)
    return np.minimum(np.searchsorted(self._ends, bits.random(shape), side='right'), len(self.keys) - 1)


def _keys(words: np.ndarray) -> np.ndarray:
  """uint32 [..., 2] -> uint64 [...]: undoes `key_words`."""
  words = words.astype(np.uint64)
  return words[..., 0] | (words[..., 1] << np.uint64(32))
