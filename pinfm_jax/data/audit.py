"""Looks for time leaks: what a request's inputs may know ends strictly before its first impression."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.records import History, Request
from pinfm_jax.errors import UserError

SAMPLE = 5_000


@dataclass(frozen=True)
class TimeAudit:
  """What an audit found, in requests.

  Attributes:
    requests: how many were looked at.
    late_history: whose history holds an event at or after the first impression.
    late_item: with a candidate that is created after it was shown: its age is not what was known.
    late_first_seen: with a candidate without creation time whose first event is not strictly before the request.
  """

  requests: int = 0
  late_history: int = 0
  late_item: int = 0
  late_first_seen: int = 0

  @property
  def leaks(self) -> str:
    """The leaks in words; empty if there is none. A late creation time is no leak: such an item has the age 0."""
    found = []
    if self.late_history:
      found.append(f'{self.late_history} have events in their history that are not before the first impression')
    if self.late_first_seen:
      found.append(f"{self.late_first_seen} take an item's age from an event that is not before the request")
    return ', '.join(found)


def audit_times(dataset: PreparedDataset, sample: int = SAMPLE) -> TimeAudit:
  """Checks histories and item ages of a data set's requests.

  Args:
    dataset: the prepared data set.
    sample: how many requests to look at, evenly spread over time.
  """
  if not dataset.num_requests:
    return TimeAudit()
  rows = np.unique(np.linspace(0, dataset.num_requests - 1, min(sample, dataset.num_requests)).astype(np.int64))
  counts = {'late_history': 0, 'late_item': 0, 'late_first_seen': 0}
  keys, created_at = dataset.items['item_key'].to_numpy(), dataset.items['created_at'].is_not_null().to_numpy()
  for row in rows.tolist():
    request = dataset.request(row)
    counts['late_history'] += reads_ahead(dataset.history(request.user_row), request)
    if dataset.info.time_known.impressions:
      stated = created_at[np.searchsorted(keys, request.item)]
      counts['late_item'] += bool(np.any(stated & (request.created_at > request.timestamp)))
      counts['late_first_seen'] += bool(np.any(~stated & (request.created_at >= request.timestamp.min())))
  return TimeAudit(len(rows), **counts)


def reads_ahead(history: History, request: Request) -> bool:
  """Whether a request's part of the history holds an event at or after its first impression."""
  end = request.history_end
  return end > len(history) or bool(end and history.timestamp[:end].max() >= request.timestamp.min())


def check_times(dataset: PreparedDataset) -> TimeAudit:
  """`audit_times`, which stops at a leak.

  Raises:
    UserError: there is one.
  """
  found = audit_times(dataset)
  if found.leaks:
    raise UserError(
      f'{dataset.path} leaks the future: of {found.requests} requests {found.leaks}; prepare it again from the raw log'
    )
  return found


def future_dependent(full: pl.DataFrame, cut: pl.DataFrame, on: Sequence[str]) -> dict[str, int]:
  """Columns whose values before a moment change when the log after that moment is taken away.

  Args:
    full: rows before the moment, made from the whole log.
    cut: the same rows, made from the log up to the moment.
    on: columns that name a row.

  Returns:
    Column -> rows with another value; 'rows' -> rows that only one of the two has. Empty: nothing depends on what came
    later.
  """
  both = full.join(cut, on=on, how='inner', suffix=':cut', validate='1:1')
  found = {'rows': full.height + cut.height - 2 * both.height}
  for name in full.columns:
    if name not in on:
      found[name] = both.filter(pl.col(name).ne_missing(pl.col(f'{name}:cut'))).height
  return {name: count for name, count in found.items() if count}
