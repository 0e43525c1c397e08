"""Grain pipelines: pretraining segments and ranking requests, in an order that is a pure function of (seed, step)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, SupportsIndex

import grain
import numpy as np

from pinfm_jax.config import FinetuneConfig, PretrainConfig
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.featurize import FeatureSchema, candidate_inputs, event_inputs, history_inputs, recent_inputs
from pinfm_jax.data.records import HistoryChange
from pinfm_jax.data.splits import usable_histories
from pinfm_jax.data.tokens import PLAIN, TokenInputs
from pinfm_jax.errors import UserError

Batch = dict[str, np.ndarray]

_ENDLESS = 2**31 - 1  # steps are int32 on the device


@dataclass(frozen=True)
class Segments:
  """Random access to the non-overlapping segments of the histories before a time (PinFM section 3: length L).

  Segments count from a history's newest usable event, so only the oldest segment of a history may be short.
  """

  dataset: PreparedDataset
  length: int
  user_row: np.ndarray
  start: np.ndarray
  stop: np.ndarray
  tokens: TokenInputs = PLAIN

  @classmethod
  def before(
    cls,
    dataset: PreparedDataset,
    until_ms: int | None,
    length: int,
    tokens: TokenInputs = PLAIN,
    until_U: np.ndarray | None = None,
    held_out: int = 1,
  ) -> 'Segments':
    """Cuts every user's usable events (see `usable_histories`).

    Segments of fewer than two events have no target and are left out.

    Raises:
      UserError: nothing is left.
    """
    usable = [events for _, events in usable_histories(dataset, until_ms, until_U, held_out)]
    rows, starts, stops = [], [], []
    for row, events in enumerate(usable):
      for stop in range(events, 1, -length):
        rows.append(row)
        starts.append(max(stop - length, 0))
        stops.append(stop)
    keep = np.array(stops, np.int64) - np.array(starts, np.int64) >= 2
    if not keep.any():
      mend = 'lower data.finetune_days' if until_ms is not None else f'the last {held_out} of each do not train'
      raise UserError(f'no user of {dataset.path} has two events before the pretraining split; {mend}')
    return cls(dataset, length, np.array(rows)[keep], np.array(starts)[keep], np.array(stops)[keep], tokens)

  def __len__(self) -> int:
    return len(self.user_row)

  def __getitem__(self, index: SupportsIndex) -> Batch:
    index = int(index)
    row = int(self.user_row[index])
    place = slice(int(self.start[index]), int(self.stop[index]))
    events = event_inputs(self.dataset.history(row), place, self.length, self.tokens)
    return {**events, 'user': np.full(self.length, row, np.uint32)}


@dataclass(frozen=True)
class Requests:
  """Random access to ranking requests of a time range; one of more than C candidates becomes several examples."""

  dataset: PreparedDataset
  schema: FeatureSchema
  config: FinetuneConfig
  request_row: np.ndarray
  first: np.ndarray
  keys: np.ndarray | None  # item keys and contents, if the schema has content vectors
  content: np.ndarray | None
  tokens: TokenInputs = PLAIN

  @classmethod
  def between(
    cls,
    dataset: PreparedDataset,
    schema: FeatureSchema,
    config: FinetuneConfig,
    times_ms: tuple[int, int],
    min_candidates: int = 1,
    tokens: TokenInputs = PLAIN,
  ) -> 'Requests':
    """The requests whose first impression falls into [begin, end) and that have at least `min_candidates`.

    Raises:
      UserError: there is none.
    """
    table = dataset.requests
    time, count = table['timestamp'].to_numpy(), table['candidates'].to_numpy().astype(np.int64)
    rows = np.flatnonzero((time >= times_ms[0]) & (time < times_ms[1]) & (count >= min_candidates))
    if not len(rows):
      raise UserError(
        f'no request between {times_ms[0]} and {times_ms[1]} ms has {min_candidates} candidates; '
        'lower data.min_candidates or finetune.min_candidates, or change the days of the split'
      )
    chunks = -(-count[rows] // config.candidates)
    first = np.concatenate([np.arange(n) for n in chunks]) * config.candidates
    keys = content = None
    if schema.content_width:
      keys = dataset.items['item_key'].to_numpy()
      content = np.nan_to_num(dataset.items['content'].to_numpy())  # an item without content has zeros
    return cls(dataset, schema, config, np.repeat(rows, chunks), first, keys, content, tokens)

  def __len__(self) -> int:
    return len(self.request_row)

  def __getitem__(self, index: SupportsIndex) -> Batch:
    return self.changed(int(index))

  def changed(self, index: int, change: HistoryChange | None = None) -> Batch:
    """An example; the model reads what `change` makes of the events before the request, whose row it is told."""
    request = self.dataset.request(int(self.request_row[index]))
    config = self.config
    history, end = self.dataset.history(request.user_row), request.history_end
    if change is not None:
      history = change(int(self.request_row[index]), history.before(end))
      end = len(history)
    events = history_inputs(history, end, config.history_length, config.history_block, self.tokens)
    last_event = int(history.timestamp[end - 1]) if end else None
    rows = slice(int(self.first[index]), int(self.first[index]) + config.candidates)
    content = self.content[np.searchsorted(self.keys, request.item)] if self.schema.content_width else None
    candidates = candidate_inputs(request, rows, config.candidates, self.schema, content, self.tokens, last_event)
    recent = {}
    if self.schema.recent_length:
      known = self.dataset.info.time_known.histories  # of all candidates it is one moment, see `request_gap`
      recent = recent_inputs(history, end, self.schema, self.tokens, int(request.timestamp.min()) if known else None)
    return {
      **{f'history_{name}': value for name, value in events.items()},
      **{f'candidate_{name}': value for name, value in candidates.items()},
      **{f'recent_{name}': value for name, value in recent.items()},
      'user': np.uint32(request.user_row),
    }


def training_batches(
  source: Any, batch: int, seed: int, first_step: int, rows: np.ndarray | None = None, threads: int = 2
) -> Iterator[Batch]:
  """Endless shuffled batches, one a step.

  Row r of the global batch of step s is example s * GB + r of an endless order; every epoch is shuffled anew. So the
  global batch of a step depends on (seed, step) alone: any number of processes makes the same one, and a run that
  resumes starts at its step.

  Args:
    source: random-access examples.
    batch: GB, examples of the global batch.
    seed: of the order.
    first_step: step of the first batch returned.
    rows: the rows of the global batch that this process supplies (`sharding.process_rows`); None = all.
    threads: that read ahead.
  """
  examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
  rows = np.arange(batch) if rows is None else rows

  def load(step: int) -> Batch:
    chosen = [examples[int(step) * batch + int(row)] for row in rows]
    return {name: np.stack([example[name] for example in chosen]) for name in chosen[0]}

  steps = grain.MapDataset.range(first_step, _ENDLESS).map(load)
  return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)))


def evaluation_batches(source: Any, batch: int) -> Iterator[tuple[Batch, int]]:
  """All examples once, in order, in batches of one size: (batch, number of real examples in it).

  The last batch repeats its last example, so that one compiled program serves all.
  """
  for start in range(0, len(source), batch):
    examples = [source[i] for i in range(start, min(start + batch, len(source)))]
    count = len(examples)
    examples += [examples[-1]] * (batch - count)
    yield {name: np.stack([example[name] for example in examples]) for name in examples[0]}, count


def action_bits(config: PretrainConfig, actions: tuple[str, ...]) -> int:
  """A_pos as bits; 0 = every event is a positive target.

  Raises:
    UserError: a name that is no action of the data set.
  """
  unknown = set(config.positive_actions) - set(actions)
  if unknown:
    raise UserError(f'pretrain.positive_actions has {sorted(unknown)}; the data set knows {list(actions)}')
  return sum(1 << actions.index(name) for name in config.positive_actions)
