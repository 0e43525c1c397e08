"""Files of JSON requests, which the commands on a bundle read."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pinfm_jax.errors import UserError
from pinfm_jax.serve.requests import ScoringRequest

T = TypeVar('T')
_WHOLE_BYTES = 256 << 20  # a file that is one JSON value is read at once


def read_documents(path: Path) -> Iterator[tuple[str, Any]]:
  """The JSON values of a file: one a line (blank lines are skipped), or the elements of one list, or one object.

  Yields:
    Words that say where the value stands, and the value.

  Raises:
    UserError: the file is not there or not JSON; the line is named.
  """
  if not path.is_file():
    raise UserError(f'{path}: no such file; expected one JSON object with a "history" a line')
  whole = _whole(path)
  if whole is not None:
    yield from ((f'{path}, element {i}', value) for i, value in enumerate(whole, 1))
    return
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        yield f'{path}, line {number}', _parsed(line, f'{path}, line {number}')


def count_documents(path: Path) -> int | None:
  """How many values `read_documents` gives, where lines tell; None for a file that is one JSON value, or none."""
  if not path.is_file() or _whole(path) is not None:
    return None
  with open(path, 'rb') as file:
    return sum(1 for line in file if line.strip())


def user_requests(scorer: Any, path: Path) -> Iterator[ScoringRequest]:
  """The users of a file, as the bundle reads them.

  A user may be a whole ranking request (`serve.requests`) or just {"history": [..]}: a request_id that is not given is
  the user's number in the file, counted from 1.

  Args:
    scorer: its `parse` checks each of them.
    path: see `read_documents`.

  Raises:
    UserError: a malformed user; the message says which.
  """
  for number, (where, document) in enumerate(read_documents(path), 1):
    if isinstance(document, dict):
      document = {'request_id': number, 'candidates': [], **document}
      if not scorer.bundle.manifest.ranks:  # a tower alone knows no features of candidates
        document['candidates'] = []
    try:
      request = scorer.parse(document)
    except UserError as error:
      raise UserError(f'{where}: {error}') from None
    yield request


def in_batches(values: Iterable[T], size: int) -> Iterator[list[T]]:
  """Lists of `size` consecutive values; the last one may be shorter."""
  batch = []
  for value in values:
    batch.append(value)
    if len(batch) == size:
      yield batch
      batch = []
  if batch:
    yield batch


def _whole(path: Path) -> list[Any] | None:
  """The values of a file that is one list or one object over several lines; None if it has one value a line."""
  with open(path, 'rb') as file:
    first = next((line for line in file if line.strip()), b'')
  try:
    if not isinstance(json.loads(first), list):
      return None
  except (ValueError, RecursionError):
    pass
  if not first or path.stat().st_size > _WHOLE_BYTES:
    return None
  try:
    whole = json.loads(path.read_bytes())
  except (ValueError, RecursionError):
    return None
  return whole if isinstance(whole, list) else [whole]


def _parsed(line: bytes, where: str) -> Any:
  try:
    return json.loads(line)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{where}: not valid JSON ({error}); expected one object a line') from None
