"""The difference between two bundles of the same tables: what a serving fleet fetches after a day of training.

delta.json            which base it applies to, how many rows changed, checksums (`DeltaManifest`)
manifest.result.json  the `manifest.json` of the result, byte for byte
parameters.npz        the dense parameters
items/*.bin           content of the items, for a model that reads it
items/catalogue.parquet  the items to recommend, if there are other ones than the base's
MODEL_CARD.md         the result's
programs/*.bin        those that the base has not
checksums.bin         of the result's tables
rows.bin              the packed rows that differ from the base's, one after another
row_numbers.bin       their numbers in tables.bin: uint32, little-endian, ascending

The tables pass through in blocks, on both sides.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pinfm_jax.data.info import file_sha256
from pinfm_jax.errors import UserError
from pinfm_jax.files import complete_directory
from pinfm_jax.serve import checksums
from pinfm_jax.serve.bundle import (
  CHECKSUMS,
  TABLES,
  TrainedRanker,
  exported_content,
  manifest_of,
  packed_rows,
  table_layout,
  write_content,
)
from pinfm_jax.serve.catalogue import CATALOGUE
from pinfm_jax.serve.manifest import MANIFEST, FileEntry, Manifest, TableLayout, document_checksum

DELTA = 'delta.json'
RESULT = 'manifest.result.json'
ROWS, NUMBERS = 'rows.bin', 'row_numbers.bin'
FORMAT, FORMAT_VERSION = 'pinfm-bundle-delta', 2
_VERSIONS = (1, 2)  # that can be applied; the version follows that of the bundle
_BLOCK_ROWS = 1 << 16
_AGAIN = 'copy the delta again or export it again'


@dataclass(frozen=True)
class DeltaManifest:
  """What `delta.json` says.

  Attributes:
    base: SHA-256 of the base's manifest.json, which vouches for all of its files.
    result: SHA-256 of the result's.
    rows: table rows that differ.
    total_rows: all table rows.
    full_bytes: size of the result.
    files: of the delta.
  """

  base: str
  result: str
  rows: int
  total_rows: int
  full_bytes: int
  files: tuple[FileEntry, ...]

  @property
  def bytes(self) -> int:
    """Size of the delta without delta.json."""
    return sum(entry.bytes for entry in self.files)

  def text(self) -> str:
    """Its size against the full bundle, in one line."""
    share = 100 * self.bytes / self.full_bytes
    return (
      f'{self.rows} of {self.total_rows} table rows changed; {self.bytes} bytes, the full bundle has '
      f'{self.full_bytes} ({share:.1f} %)'
    )

  def write(self, directory: Path) -> None:
    """Writes `delta.json`."""
    document = {'format': FORMAT, 'format_version': FORMAT_VERSION, **asdict(self)}
    document['checksum'] = document_checksum(document)
    (directory / DELTA).write_text(json.dumps(document, indent=1) + '\n', encoding='utf-8')

  @classmethod
  def read(cls, directory: Path) -> 'DeltaManifest':
    """Reads and checks `delta.json`.

    Raises:
      UserError: it is not there, damaged or of another version.
    """
    path = directory / DELTA
    if not path.is_file():
      raise UserError(f'{directory} is not a delta: it has no {DELTA}; make one with `pinfm export --base`')
    try:
      document = json.loads(path.read_text(encoding='utf-8'))
      checksum, version = document.pop('checksum'), document['format_version']
      sound = document['format'] == FORMAT and checksum == document_checksum(document)
    except (ValueError, KeyError, AttributeError, TypeError):
      raise UserError(f'{path} is damaged; {_AGAIN}') from None
    if not sound or version not in _VERSIONS:
      read = ' and '.join(map(str, _VERSIONS))
      what = f'has format version {version}, this program reads {read}' if sound else 'is damaged'
      raise UserError(f'{path} {what}; {_AGAIN}')
    fields = {name: value for name, value in document.items() if name not in ('format', 'format_version')}
    return cls(**{**fields, 'files': tuple(FileEntry(**entry) for entry in fields['files'])})


def export_delta(
  out: str | Path, base: str | Path, ranker: TrainedRanker, storage: str, overwrite: bool = False
) -> DeltaManifest:
  """Writes what the ranker's bundle has and the bundle `base` has not.

  Args:
    out: directory to make.
    base: the bundle that is served now.
    ranker: what the result is made of.
    storage: of the tables; the base's.
    overwrite: replace a delta that is there.

  Raises:
    UserError: the base is damaged or its tables have another layout, or see `export_bundle`.
  """
  base = Path(base)
  earlier, layout = _whole_files(base), table_layout(ranker, storage)
  if layout is None or earlier.tables != layout:
    raise UserError(
      f'{base} has tables of {_words(earlier.tables)}, the ranker {_words(layout)}: a delta needs the same; '
      'export the whole bundle without --base'
    )
  if earlier.ranks != bool(ranker.schema.labels):
    kinds = ('a ranker', 'a tower without one') if earlier.ranks else ('a tower without a ranker', 'a ranker')
    raise UserError(f'{base} is {kinds[0]}, and this is {kinds[1]}: export the whole bundle without --base')
  with complete_directory(Path(out), overwrite, DELTA, 'delta') as directory:
    content = exported_content(ranker, storage)
    names = write_content(directory, content)
    rows, tables = _write_rows(directory, base, earlier, packed_rows(ranker.rows_GE, layout))
    own = {name: checksums.describe(directory, name)[0] for name in (*names, CHECKSUMS)}
    result = manifest_of(ranker, layout, (tables, *own.values()))
    result.write(directory)
    (directory / MANIFEST).rename(directory / RESULT)
    for entry in earlier.files:
      if own.get(entry.name) == entry and entry.name.startswith(('programs/', CATALOGUE)):
        (directory / entry.name).unlink()
        del own[entry.name]
    own |= {name: checksums.describe(directory, name)[0] for name in (RESULT, ROWS, NUMBERS)}
    full = sum(entry.bytes for entry in result.files) + own[RESULT].bytes
    delta = DeltaManifest(
      base=file_sha256(base / MANIFEST),
      result=own[RESULT].sha256,
      rows=rows,
      total_rows=layout.sub_tables * layout.rows,
      full_bytes=full,
      files=tuple(own.values()),
    )
    delta.write(directory)
  return delta


def apply_delta(base: str | Path, delta: str | Path, out: str | Path, overwrite: bool = False) -> Path:
  """Makes the bundle that the delta leads to.

  Args:
    base: the bundle that the delta was exported against.
    delta: what `export_delta` wrote.
    out: directory to make; it appears only when it is complete and its checksums are right.
    overwrite: replace a bundle that is there.

  Raises:
    UserError: another base, or a damaged file on either side.
  """
  base, delta = Path(base), Path(delta)
  about, earlier = DeltaManifest.read(delta), _whole_files(base)
  if file_sha256(base / MANIFEST) != about.base:
    raise UserError(
      f'{delta} was exported against another bundle than {base}: apply it to that one, or export it again with '
      f'--base {base}'
    )
  for entry in about.files:
    checksums.check_size(delta, entry)
    checksums.check_whole(delta, entry)
  own = {entry.name for entry in about.files}
  with complete_directory(Path(out), overwrite) as directory:
    shutil.copyfile(delta / RESULT, directory / MANIFEST)
    result = Manifest.read(directory)
    with open(directory / TABLES, 'wb') as file:
      for block in _patched(base, delta, earlier.tables):
        file.write(block.data)
    for entry in result.files:
      if entry.name != TABLES:
        (directory / entry.name).parent.mkdir(exist_ok=True)
        shutil.copyfile((delta if entry.name in own else base) / entry.name, directory / entry.name)
      checksums.check_size(directory, entry)
      checksums.check_whole(directory, entry)
  return Path(out)


def _whole_files(base: Path) -> Manifest:
  """The manifest of a bundle whose files all have their stated sizes."""
  manifest = Manifest.read(base)
  for entry in manifest.files:
    checksums.check_size(base, entry)
  return manifest


def _write_rows(directory: Path, base: Path, earlier: Manifest, packed: Iterator[np.ndarray]) -> tuple[int, FileEntry]:
  """Compares new rows with the base's, block by block, and checks the base on the way.

  Returns:
    How many rows differ, and the entry of the result's tables.
  """
  changed, first, old, new = 0, 0, checksums.Describer(), checksums.Describer()
  with (
    open(base / TABLES, 'rb') as tables,
    open(directory / ROWS, 'wb') as rows,
    open(directory / NUMBERS, 'wb') as numbers,
  ):
    for block in packed:
      before = np.frombuffer(tables.read(block.size), np.uint8)
      old.update(before.data)
      new.update(block.reshape(-1).data)
      different = np.flatnonzero((before.reshape(block.shape) != block).any(axis=1))
      rows.write(block[different].tobytes())
      numbers.write((different + first).astype('<u4').tobytes())
      changed += len(different)
      first += len(block)
  expected = next(entry for entry in earlier.files if entry.name == TABLES)
  if old.finish(TABLES)[0] != expected:
    raise UserError(f'{base / TABLES} is damaged (its SHA-256 differs); copy the bundle again or export it again')
  entry, digests = new.finish(TABLES)
  (directory / CHECKSUMS).write_bytes(digests)
  return changed, entry


def _patched(base: Path, delta: Path, layout: TableLayout) -> Iterator[np.ndarray]:
  """The result's packed rows, block after block."""
  numbers, rows = _mapped(delta / NUMBERS, '<u4'), _mapped(delta / ROWS, np.uint8).reshape(-1, layout.row_bytes)
  total = layout.sub_tables * layout.rows
  with open(base / TABLES, 'rb') as tables:
    for first in range(0, total, _BLOCK_ROWS):
      last = min(first + _BLOCK_ROWS, total)
      block = np.frombuffer(tables.read((last - first) * layout.row_bytes), np.uint8).reshape(-1, layout.row_bytes)
      low, high = np.searchsorted(numbers, [first, last])
      block = block.copy()
      block[numbers[low:high] - first] = rows[low:high]
      yield block


def _mapped(path: Path, dtype: str | type) -> np.ndarray:
  # An empty file cannot be mapped.
  return np.asarray(np.memmap(path, dtype, 'r')) if path.stat().st_size else np.zeros(0, dtype)


def _words(layout: TableLayout | None) -> str:
  if layout is None:
    return 'nothing'
  kind = f'{layout.storage}{" (clipped)" if layout.clip else ""}'
  return f'{layout.sub_tables} x {layout.rows} rows of {layout.width} as {kind}, hash seed {layout.hash_seed}'
