"""The time split: which events pretrain, which requests fine-tune, validate and test."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from pinfm_jax.config import DAY_MS, DataConfig
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.records import History
from pinfm_jax.errors import UserError


@dataclass(frozen=True)
class Split:
  """Boundaries in milliseconds since 1970; each part ends where the next begins.

  `pretrain_until` is None for a log without impressions: then each user's last `held_out` events are. `spared` are the
  rows of users of whom pretraining reads the events before fine-tuning begins alone.
  """

  pretrain_until: int | None
  finetune: tuple[int, int]
  validation: tuple[int, int]
  test: tuple[int, int]
  spared: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), compare=False)
  held_out: int = 1

  def events_back(self, name: str) -> int:
    """Of a log without impressions: which event of each history is predicted, counted from its end (1 = the last).

    Args:
      name: of the split; 'validation' is the event before the tested one where two are held out.
    """
    return 2 if name == 'validation' and self.held_out > 1 else 1

  def until_by_user(self, users: int) -> np.ndarray | None:
    """The time before which pretraining reads each user's events, int64 [users]; None: `pretrain_until` for all."""
    if not len(self.spared):
      return None
    until_U = np.full(users, self.pretrain_until)
    until_U[self.spared] = self.finetune[0]
    return until_U


def split_by_time(dataset: PreparedDataset, config: DataConfig) -> Split:
  """Counts the configured days back from the end of the last impression's UTC day.

  A log without impressions (it may be order-only) has no days to count: its parts for the ranker are empty.

  Raises:
    UserError: the times are not known, or a part would hold no request.
  """
  if not dataset.num_requests:
    return Split(None, (0, 0), (0, 0), (0, 0), held_out=config.held_out_events)
  if config.held_out_events != 1:
    raise UserError(f'data.held_out_events is {config.held_out_events}, but this log is split by time; set it to 1')
  if not dataset.info.time_known.impressions:
    raise UserError('the impressions have no times, so they cannot be split by time; prepare them with a timestamp')
  timestamp = dataset.requests['timestamp'].to_numpy()
  end = (int(timestamp[-1]) // DAY_MS + 1) * DAY_MS
  test = end - round(config.test_days * DAY_MS)
  validation = test - round(config.validation_days * DAY_MS)
  finetune = validation - round(config.finetune_days * DAY_MS)
  split = Split(
    pretrain_until=validation if config.pretrain_overlap else finetune,
    finetune=(finetune, validation),
    validation=(validation, test),
    test=(test, end),
  )
  for name in ('finetune', 'validation', 'test'):
    begin, stop = getattr(split, name)
    if stop > begin and not np.any((timestamp >= begin) & (timestamp < stop)):
      days = f'data.{name}_days={getattr(config, f"{name}_days")}'
      raise UserError(f'no request falls into the {name} part ({days}); the log ends {_day(end)}; change the days')
  if config.pretrain_overlap and config.pretrain_overlap_users == 'others':
    trains = (timestamp >= finetune) & (timestamp < validation)
    return replace(split, spared=np.unique(dataset.requests['user_row'].to_numpy()[trains]).astype(np.int64))
  return split


def _day(time_ms: int) -> str:
  return str(np.datetime64(time_ms - 1, 'ms').astype('datetime64[D]'))


def usable_events(history: History, until_ms: int | None, held_out: int = 1) -> int:
  """How many of a user's events pretraining may read: those before a time, or (None) all but the last `held_out`."""
  return max(len(history) - held_out, 0) if until_ms is None else int(np.searchsorted(history.timestamp, until_ms))


def usable_histories(
  dataset: PreparedDataset, until_ms: int | None, until_U: np.ndarray | None = None, held_out: int = 1
) -> Iterator[tuple[History, int]]:
  """Every history with its `usable_events`, before a time of each user's own if `until_U` [users] is given."""
  for row, history in enumerate(dataset.histories()):
    yield history, usable_events(history, until_ms if until_U is None else int(until_U[row]), held_out)


def pretrained_items(
  dataset: PreparedDataset, until_ms: int | None, until_U: np.ndarray | None = None, held_out: int = 1
) -> np.ndarray:
  """Keys of the items that pretraining may read an event of, ascending: all others are unseen by it.

  It goes through the histories, since an item's `first_seen` says less: it may be the time of an impression that
  nobody engaged with, and in a log whose histories have no times it always is.

  Args:
    dataset: the data.
    until_ms: `Split.pretrain_until`.
    until_U: `Split.until_by_user`.
    held_out: `Split.held_out`.

  Returns:
    uint64.
  """
  seen, chunk, size = np.zeros(0, np.uint64), [], 0
  for history, usable in usable_histories(dataset, until_ms, until_U, held_out):
    chunk.append(history.item[:usable])
    size += len(chunk[-1])
    if size >= 1 << 22:  # no copy of the whole log
      seen, chunk, size = np.unique(np.concatenate([seen, *chunk])), [], 0
  return np.unique(np.concatenate([seen, *chunk]))
