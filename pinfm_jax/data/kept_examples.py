"""Ranking examples kept on disk as arrays: many rankers read the same ones, and making them costs more than training.

They are for rankers without a sequence module, whose examples depend on the data, the split and the schema alone.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from pinfm_jax.data.pipeline import Batch, Requests
from pinfm_jax.data.tokens import PLAIN
from pinfm_jax.progress import Progress
from pinfm_jax.workdir import is_done, read_json, write_json


@dataclass(frozen=True)
class KeptRequests(Requests):
  """Requests whose examples are read from arrays [requests, ..]; they are those that `Requests` makes."""

  columns: Mapping[str, np.ndarray] | None = None

  def __getitem__(self, index: SupportsIndex) -> Batch:
    return {name: column[int(index)] for name, column in self.columns.items()}


def can_keep(requests: Requests) -> bool:
  """Whether no sequence module reads these requests."""
  return requests.tokens is PLAIN and not requests.schema.recent_length


def keep_examples(requests: Requests, folder: Path) -> Path:
  """Writes every example of the requests, unless they are there.

  Args:
    requests: that `can_keep`.
    folder: of all kept examples.

  Returns:
    Their own folder.
  """
  directory = folder / _digest(requests)
  if is_done(directory):
    return directory
  shutil.rmtree(directory, ignore_errors=True)  # what an earlier call did not end
  directory.mkdir(parents=True)
  count = len(requests)
  columns = {
    name: np.lib.format.open_memmap(directory / f'{name}.npy', 'w+', value.dtype, (count, *value.shape))
    for name, value in ((name, np.asarray(value)) for name, value in requests[0].items())
  }
  progress = Progress('keep examples', count, 'requests')
  for i in range(count):
    for name, value in requests[i].items():
      columns[name][i] = value
    if i % 1000 == 0:
      progress.update(i)
  progress.update(count)
  progress.close()
  for column in columns.values():
    column.flush()
  write_json(directory / 'results.json', {'requests': count, 'columns': list(columns)})  # the last: all is there
  return directory


def kept_or_made(requests: Requests, folder: Path) -> Requests:
  """The requests with their examples read from the folder, if they are kept there."""
  if not folder.is_dir() or not can_keep(requests):
    return requests
  directory = folder / _digest(requests)
  if not is_done(directory):
    return requests
  # Plain views: an element of a memmap is a memmap again, which takes longer to make than to read.
  names = read_json(directory / 'results.json')['columns']
  columns = {name: np.load(directory / f'{name}.npy', mmap_mode='r').view(np.ndarray) for name in names}
  return KeptRequests(**{field.name: getattr(requests, field.name) for field in fields(Requests)}, columns=columns)


def _digest(requests: Requests) -> str:
  """A name of everything that the examples depend on."""
  config, hashed = requests.config, hashlib.sha256()
  plain = {
    'checksum': requests.dataset.info.checksum,
    'schema': asdict(requests.schema),
    'finetune': [config.candidates, config.history_length, config.history_block],
  }
  hashed.update(json.dumps(plain, sort_keys=True, default=str).encode())
  for rows in (requests.request_row, requests.first):
    hashed.update(np.ascontiguousarray(rows, np.int64).tobytes())
  return hashed.hexdigest()[:16]
