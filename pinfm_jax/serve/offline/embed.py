"""Writes vectors of a bundle as Parquet: users (H of the last event), items (z or E), users x candidates."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pinfm_jax.errors import UserError
from pinfm_jax.files import complete_file
from pinfm_jax.progress import Progress
from pinfm_jax.serve.catalogue import ItemFile
from pinfm_jax.serve.documents import count_documents, in_batches, user_requests
from pinfm_jax.serve.requests import ScoringRequest

KINDS = {'target': 'target', 'id': 'vector'}  # of item vectors, and how the bundle's programs call them
_USERS = 256
_PAIRS = 64
_ITEMS = 1 << 14
_PART_BYTES = 64 << 20
_INT64 = range(-(1 << 63), 1 << 63)


def embed_users(scorer: Any, file: Path, out: Path) -> int:
  """Writes request_id, vector: H of each user's last event, unit length; zeros for a user without events.

  Args:
    scorer: of the bundle.
    file: users (`documents.user_requests`).
    out: the Parquet file; it appears only when it is complete.

  Returns:
    The number of rows.

  Raises:
    UserError: a file that cannot be read or written, a malformed user, or a ranker without PinFM.
  """
  _check(scorer)

  def frames() -> Iterator[pl.DataFrame]:
    for part in in_batches(user_requests(scorer, file), _USERS):
      yield pl.DataFrame([_names([r.request_id for r in part]), _vectors(scorer.users(part))])

  return _write(frames(), out, file, Progress('embed users', count_documents(file), 'users'))


def embed_pairs(scorer: Any, file: Path, out: Path) -> int:
  """Writes request_id, item_id, vector: the output at each candidate's position behind the user's history.

  Args, returns and raises as `embed_users`; requests without candidates have no rows. A tower alone is refused.
  """
  _check(scorer)
  scorer.check_ranks()

  def frames() -> Iterator[pl.DataFrame]:
    for part in in_batches(user_requests(scorer, file), _PAIRS):
      vectors = [np.asarray(v, np.float32) for v in scorer.pairs(part)]
      names = [r.request_id for r in part for _ in r.item_ids]
      yield pl.DataFrame([_names(names), _item_ids(part, scorer), _vectors(np.concatenate(vectors))])

  return _write(frames(), out, file, Progress('embed pairs', None, 'pairs'))


def embed_items(scorer: Any, file: Path, out: Path, kind: str = 'target') -> int:
  """Writes item_id, vector, in the file's order, repeats included.

  Args:
    scorer: of the bundle.
    file: items (`ItemFile`).
    out: the Parquet file; it appears only when it is complete.
    kind: 'target' (z = psi(E), which H is compared with) or 'id' (E: the id vector of the tables, to which a model with
      content adds the projected content).

  Returns:
    The number of rows.

  Raises:
    UserError: a file that cannot be read or written, a malformed id, or a ranker without PinFM.
  """
  _check(scorer)
  items = ItemFile(file, scorer.bundle.manifest.id_type.item)

  def frames() -> Iterator[pl.DataFrame]:
    for keys, ids in items.blocks():
      for start in range(0, len(keys), _ITEMS):
        vectors = scorer.items(keys[start : start + _ITEMS])[KINDS[kind]]
        yield pl.DataFrame([ids[start : start + _ITEMS].alias('item_id'), _vectors(vectors)])

  return _write(frames(), out, file, Progress('embed items', items.count(), 'items'))


def _check(scorer: Any) -> None:
  if scorer.bundle.manifest.tables is None:
    raise UserError(f'{scorer.bundle.path} is a ranker without PinFM: it has no vectors of users and items')


def _names(values: list[int | str]) -> pl.Series:
  integers = all(isinstance(value, int) and value in _INT64 for value in values)
  values = values if integers else [str(value) for value in values]
  return pl.Series('request_id', values, pl.Int64 if integers else pl.String)


def _item_ids(part: list[ScoringRequest], scorer: Any) -> pl.Series:
  ids = [item for request in part for item in request.item_ids]
  if scorer.bundle.manifest.id_type.item == 'integer':
    return pl.Series('item_id', [int(i) for i in ids], pl.Int64)
  return pl.Series('item_id', ids, pl.String)


def _vectors(vectors: Any) -> pl.Series:
  vectors = np.asarray(vectors, np.float32)
  return pl.Series('vector', vectors, pl.Array(pl.Float32, vectors.shape[1]))


def _write(frames: Iterator[pl.DataFrame], out: Path, source: Path, progress: Progress) -> int:
  """Writes frames one after another into one file; returns the number of rows.

  Each becomes a part on disk first: polars writes a file at once, but streams from files into a file.
  """
  rows = 0
  with complete_file(out, source) as partial, _scratch(out) as scratch:
    parts, types = [], set()
    for part in _joined(frames, progress):
      parts.append(scratch / f'{len(parts):06}.parquet')
      part.write_parquet(parts[-1])
      types.add(part.dtypes[0])
      rows += part.height
    if not parts:
      raise UserError(f'{source} is empty: there is nothing to embed')
    # request ids may be numbers in one part and text in another
    first = pl.String if len(types) > 1 else types.pop()
    pl.concat([pl.scan_parquet(part).with_columns(pl.nth(0).cast(first)) for part in parts]).sink_parquet(partial)
  progress.close()
  return rows


def _joined(frames: Iterator[pl.DataFrame], progress: Progress) -> Iterator[pl.DataFrame]:
  """Frames of at least _PART_BYTES, but for the last one."""
  held: list[pl.DataFrame] = []
  rows = 0
  for frame in frames:
    rows += frame.height
    progress.update(rows)
    if held and held[0].dtypes != frame.dtypes:
      yield pl.concat(held)
      held = []
    held.append(frame)
    if sum(f.estimated_size() for f in held) >= _PART_BYTES:
      yield pl.concat(held)
      held = []
  if held:
    yield pl.concat(held)


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
  directory = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f'.{out.name}.parts-'))
  try:
    yield directory
  finally:
    shutil.rmtree(directory, ignore_errors=True)
