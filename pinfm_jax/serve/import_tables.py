"""Turns pretrained item vectors into rows of the hashed tables, which a training run then starts from.

An item's vector is S rows put together, and each row belongs to all items that hash to it, so the rows that reproduce
the given vectors best, by least squares, are the means of what their items ask for. Vectors of another width W than
S * E are first mapped linearly:

  wider     projected to their S * E leading directions (of the second moment, so that inner products change least) and
            then rotated at random, so that each sub-table carries as much of an item as any other
  narrower  rotated at random into S * E dimensions, which changes no inner product

  imported.json     what it is (`ImportedManifest`)
  row_numbers.bin   numbers of the rows that any item hashes to: int32, little-endian, ascending
  rows.bin          these rows, float32
  projection.npy    [W, S * E], if the widths differ: for vectors that come later

Neither the table nor the vectors are ever wholly in memory: the vectors pass through a file on disk in batches, and
memory grows by less than 60 bytes an item.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from pinfm_jax.config import TableConfig
from pinfm_jax.data.item_vectors import ItemVectors
from pinfm_jax.errors import UserError
from pinfm_jax.files import complete_directory
from pinfm_jax.model.hashing import hash_rows, key_words
from pinfm_jax.progress import Progress
from pinfm_jax.serve.manifest import document_checksum

IMPORTED, NUMBERS, ROWS, PROJECTION = 'imported.json', 'row_numbers.bin', 'rows.bin', 'projection.npy'
_FORMAT, _VERSION = 'pinfm-imported-tables', 1
_BLOCK_ITEMS = 1 << 16
_SAMPLED = 10_000


@dataclass(frozen=True)
class ImportedManifest:
  """What `imported.json` says.

  Attributes:
    sub_tables: S.
    rows: R.
    width: E.
    hash_seed: of the tables that the rows are for.
    id_type: how item ids are spelled.
    items: how many vectors were given.
    given: how many rows they hash to.
    vector_width: W.
    cosine: mean cosine between the vectors (mapped to S * E) and what the rows reproduce, over up to 10,000 items.
  """

  sub_tables: int
  rows: int
  width: int
  hash_seed: int
  id_type: str
  items: int
  given: int
  vector_width: int
  cosine: float = 1.0

  def write(self, directory: Path) -> None:
    """Writes `imported.json`."""
    document = {'format': _FORMAT, 'format_version': _VERSION, **asdict(self)}
    document['checksum'] = document_checksum(document)
    (directory / IMPORTED).write_text(json.dumps(document, indent=1) + '\n', encoding='utf-8')

  @classmethod
  def read(cls, directory: Path) -> 'ImportedManifest':
    """Reads it and checks the files' sizes.

    Raises:
      UserError: it is not there, damaged, or of another version.
    """
    path, again = directory / IMPORTED, 'run `pinfm import-tables` again'
    if not path.is_file():
      raise UserError(f'{directory} has no {IMPORTED}: expected what `pinfm import-tables` wrote')
    try:
      document = json.loads(path.read_text(encoding='utf-8'))
      sound = document.pop('checksum') == document_checksum(document) and document.pop('format') == _FORMAT
      version = document.pop('format_version')
    except (ValueError, KeyError, AttributeError, TypeError):
      raise UserError(f'{path} is damaged: {again}') from None
    if not sound or version != _VERSION:
      raise UserError(f'{path} is damaged or of another version than {_VERSION}: {again}')
    manifest = cls(**document)
    for name, size in ((NUMBERS, 4 * manifest.given), (ROWS, 4 * manifest.given * manifest.width)):
      if not (directory / name).is_file() or (directory / name).stat().st_size != size:
        raise UserError(f'{directory / name} does not hold {manifest.given} rows: {again}')
    return manifest

  def text(self) -> str:
    """What was imported, in one line."""
    share = 100 * self.given / (self.sub_tables * self.rows)
    return (
      f'{self.items:,} vectors of width {self.vector_width} on {self.given:,} of '
      f'{self.sub_tables * self.rows:,} rows ({share:.1f} %); reproduced with cosine {self.cosine:.4f} on average'
    )


def import_tables(
  out: str | Path,
  vectors: ItemVectors,
  config: TableConfig,
  rms: float | None = None,
  overwrite: bool = False,
) -> ImportedManifest:
  """Writes the rows of the vectors' items; `out` appears only when it is complete.

  Args:
    out: directory to make.
    vectors: one an item; an item that is given twice asks for the mean of both.
    config: sizes and hash of the tables.
    rms: the vectors are scaled so that their values have this root mean square (fresh rows have
      `config.init_scale`); None = as they are.
    overwrite: replace what an earlier import wrote.

  Raises:
    UserError: bad vectors, or `out` exists.
  """
  with complete_directory(Path(out), overwrite, IMPORTED, 'output of import-tables') as directory:
    projection_WV = _projection(vectors, config.item_width)
    if projection_WV is not None:
      np.save(directory / PROJECTION, projection_WV)
    spool = directory / 'spool'
    spool.mkdir()
    rows_SN, parts_SNE, square = _spooled(spool, vectors, config, projection_WV)
    if not square > 0:
      raise UserError('all vectors are zeros; expected those of a trained model')
    factor = 1.0 if rms is None else rms / np.sqrt(square)
    given = _write_rows(directory, rows_SN, parts_SNE, np.float32(factor))
    manifest = ImportedManifest(
      config.sub_tables,
      config.rows,
      config.width,
      config.hash_seed,
      vectors.id_type,
      vectors.count,
      given,
      vectors.width,
    )
    manifest = replace(manifest, cosine=_mean_cosine(directory, rows_SN, parts_SNE, manifest))
    del rows_SN, parts_SNE
    for path in spool.iterdir():
      path.unlink()
    spool.rmdir()
    manifest.write(directory)
  return manifest


def _projection(vectors: ItemVectors, width: int) -> np.ndarray | None:
  """The linear map [W, S * E] of the module's description; None for vectors of the right width."""
  given = vectors.width
  if given == width:
    return None
  rng = np.random.default_rng(0)
  if given < width:
    return np.linalg.qr(rng.normal(size=(width, given)))[0].T.astype(np.float32)
  moment_WW = np.zeros((given, given))
  progress, done = Progress('second moment', vectors.count, 'vectors'), 0
  for _, batch_NW in vectors.batches():
    moment_WW += batch_NW.T.astype(np.float64) @ batch_NW
    done += len(batch_NW)
    progress.update(done)
  progress.close()
  leading_WV = np.linalg.eigh(moment_WW)[1][:, -width:]
  return (leading_WV @ np.linalg.qr(rng.normal(size=(width, width)))[0]).astype(np.float32)


def _spooled(
  spool: Path, vectors: ItemVectors, config: TableConfig, projection_WV: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, float]:
  """Rows [S, N] and parts of vectors [S, N, E] on disk, by sub-table; and the mean square of the values."""
  count, sub_tables, width = vectors.count, config.sub_tables, config.width
  rows_SN = np.memmap(spool / 'rows', np.int32, 'w+', shape=(sub_tables, count))
  parts_SNE = np.memmap(spool / 'parts', np.float32, 'w+', shape=(sub_tables, count, width))
  progress, done, square = Progress('read vectors', count, 'vectors'), 0, 0.0
  for keys_N, batch_NW in vectors.batches():
    batch_NV = batch_NW if projection_WV is None else batch_NW @ projection_WV
    here = slice(done, done + len(keys_N))
    rows_SN[:, here] = hash_rows(key_words(keys_N), sub_tables, config.rows, config.hash_seed).T
    parts_SNE[:, here] = batch_NV.reshape(-1, sub_tables, width).swapaxes(0, 1)
    square += float(np.square(batch_NV, dtype=np.float64).sum())
    done += len(keys_N)
    progress.update(done)
  progress.close()
  if done != count:
    raise UserError(f'got {done} vectors where {count} were expected: the file changed while it was read')
  return rows_SN, parts_SNE, square / (count * config.item_width)


def _write_rows(directory: Path, rows_SN: np.ndarray, parts_SNE: np.ndarray, factor: np.float32) -> int:
  """Writes the mean of each row's parts; returns how many rows there are."""
  given = 0
  progress = Progress('write rows', len(rows_SN), 'sub-tables')
  with open(directory / NUMBERS, 'wb') as numbers, open(directory / ROWS, 'wb') as rows:
    for sub_table, (rows_N, parts_NE) in enumerate(zip(rows_SN, parts_SNE, strict=True), 1):
      for number_K, mean_KE in _means(np.asarray(rows_N), parts_NE):
        numbers.write(number_K.astype('<i4').tobytes())
        rows.write((factor * mean_KE).astype('<f4').tobytes())
        given += len(number_K)
      progress.update(sub_table)
  progress.close()
  return given


def _means(rows_N: np.ndarray, parts_NE: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Ascending distinct rows and the means of their parts, some at a time."""
  order_N = np.argsort(rows_N, kind='stable')
  sorted_N = rows_N[order_N]
  start_K = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))
  end_K = np.append(start_K[1:], len(sorted_N))
  first = 0
  while first < len(start_K):
    # As many rows as have _BLOCK_ITEMS items together, but at least one.
    last = max(first + 1, int(np.searchsorted(end_K, start_K[first] + _BLOCK_ITEMS, side='right')))
    items = slice(int(start_K[first]), int(end_K[last - 1]))
    sums_KE = np.add.reduceat(parts_NE[order_N[items]].astype(np.float64), start_K[first:last] - items.start)
    yield sorted_N[start_K[first:last]], sums_KE / (end_K - start_K)[first:last, None]
    first = last


def _mean_cosine(directory: Path, rows_SN: np.ndarray, parts_SNE: np.ndarray, manifest: ImportedManifest) -> float:
  """How well the written rows reproduce a sample of the vectors."""
  place_M = np.linspace(0, manifest.items - 1, min(manifest.items, _SAMPLED)).astype(np.int64)
  numbers, rows = mapped_rows(directory, manifest)
  found_MSE = np.stack([rows[np.searchsorted(numbers, row_N[place_M])] for row_N in rows_SN], axis=1)
  wanted_MSE = np.stack([parts_NE[place_M] for parts_NE in parts_SNE], axis=1)
  found_MV, wanted_MV = (x.reshape(len(place_M), -1).astype(np.float64) for x in (found_MSE, wanted_MSE))
  lengths_M = np.linalg.norm(found_MV, axis=1) * np.linalg.norm(wanted_MV, axis=1)
  return float(np.mean(np.sum(found_MV * wanted_MV, axis=1) / np.maximum(lengths_M, 1e-30)))


def mapped_rows(directory: Path, manifest: ImportedManifest) -> tuple[np.ndarray, np.ndarray]:
  """Row numbers [given] and rows [given, E] of an import, memory-mapped."""
  shape = (manifest.given, manifest.width)
  return np.asarray(np.memmap(directory / NUMBERS, '<i4', 'r')), np.memmap(directory / ROWS, '<f4', 'r', shape=shape)
