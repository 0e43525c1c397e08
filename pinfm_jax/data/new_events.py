"""Continued pretraining: which segments of a data set that grew hold events that an earlier run could not read."""

from dataclasses import replace

import numpy as np

from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.pipeline import Segments
from pinfm_jax.data.splits import usable_events
from pinfm_jax.errors import UserError


def earlier_partitions(dataset: PreparedDataset, checksum: str) -> int:
  """How many partitions the data set had when its checksum was this one.

  Raises:
    UserError: it never had: other data.
  """
  for number, part in enumerate(dataset.info.partitions, 1):
    if part.checksum == checksum:
      return number
  raise UserError(
    f'the earlier run was trained on other data (checksum {checksum[:16]}..) than any state of {dataset.path}; '
    'continue on the data set it was trained on, grown with `pinfm prepare --append`'
  )


def new_segments(segments: Segments, partitions: int, until_ms: int | None) -> Segments:
  """The segments with at least one event that an earlier run did not read; their older events are context.

  Args:
    segments: all segments of the grown data set.
    partitions: how many partitions there were at the earlier run.
    until_ms: the time before which that run read (None: all but each user's last event).

  Raises:
    UserError: there is nothing new.
  """
  dataset, first_new = segments.dataset, np.zeros(segments.dataset.num_users, np.int64)
  users = np.unique(segments.user_row)
  if until_ms is None:
    stored = dataset.parts.events_of_first(partitions)
    cut = np.maximum(dataset.parts.stored_events - dataset.info.cap, 0)
    first_new = np.maximum(stored - 1, 0) - cut
  else:
    for row in users.tolist():
      first_new[row] = usable_events(dataset.history(row), until_ms)
  keep = segments.stop > first_new[segments.user_row]
  if not keep.any():
    raise UserError(
      f'{dataset.path} has no event before the pretraining split that the earlier run has not read; '
      'append the new day, or set pretrain.continue_on=all'
    )
  return replace(segments, user_row=segments.user_row[keep], start=segments.start[keep], stop=segments.stop[keep])
