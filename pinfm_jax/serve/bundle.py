"""A serving bundle: a directory that scores requests without the model's source, written at once or not at all.

manifest.json         what the bundle is (`serve.manifest`)
parameters.npz        parameters ('params/a/b') and dense-feature constants ('stats/low'), no pickle
programs/*.bin        `jax.export` programs (`serve.programs`); a ranker without PinFM has crossing.bin alone, and none
                        of the files below; a tower without a ranker has no crossing.bin
tables.bin            packed rows of the item tables (`serve.quantize`), memory-mapped at serving
checksums.bin         8 bytes of BLAKE2b for each MiB of tables.bin
items/*.bin           for a model with content: what the bundle knows of items (`serve.items`), memory-mapped
items/catalogue.parquet  the items that can be recommended, if the export knew them (`serve.catalogue`)
MODEL_CARD.md         data, training, results and limits in words, if the export knew them (`serve.model_card`)
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import export

from pinfm_jax.config import PinFMConfig, RankerConfig
from pinfm_jax.data.featurize import FeatureSchema
from pinfm_jax.data.info import IdTypes
from pinfm_jax.data.tokens import ItemContent
from pinfm_jax.errors import UserError
from pinfm_jax.files import complete_directory
from pinfm_jax.overrides import from_dict, to_dict
from pinfm_jax.serve import checksums
from pinfm_jax.serve.arrays import load_arrays, plain_arrays, save_arrays
from pinfm_jax.serve.catalogue import CATALOGUE, read_catalogue, write_catalogue
from pinfm_jax.serve.items import CONTENT, map_items, write_items
from pinfm_jax.serve.jax_range import check_jax, exported_range
from pinfm_jax.serve.manifest import (
  FORMAT_VERSION,
  FileEntry,
  Manifest,
  TableLayout,
  golden_ids,
)
from pinfm_jax.serve.quantize import PackedRows, quantise_parts, row_bytes
from pinfm_jax.serve.rows.mapped import MappedRows, RowSource

if TYPE_CHECKING:
  import polars as pl

  from pinfm_jax.model.ranker import DenseStats, FeatureSpec

TABLES = 'tables.bin'
CHECKSUMS = 'checksums.bin'
DIGESTS = {TABLES: CHECKSUMS, CONTENT: 'items/checksums.bin'}  # of the files that may be too large to read whole
PARAMETERS = 'parameters.npz'
MODEL_CARD = 'MODEL_CARD.md'
STATS = ('low', 'high', 'mean', 'scale')
_WHOLE_BELOW = 2 << 30


@dataclass(frozen=True)
class Bundle:
  """A bundle opened and checked.

  Attributes:
    path: its directory.
    manifest: what it is.
    params: parameters.
    stats: constants of the dense features; empty for a tower alone.
    rows: packed rows of the item tables; None for a ranker without PinFM.
    programs: by name (`serve.programs`).
    items: content of the items; None for a model without content.
  """

  path: Path
  manifest: Manifest
  params: dict[str, Any]
  stats: dict[str, np.ndarray]
  rows: RowSource | None
  programs: Mapping[str, export.Exported]
  items: ItemContent | None = None


@dataclass(frozen=True)
class TrainedRanker:
  """Everything a bundle is made of. A tower alone, without a ranker, has a schema without labels and no stats.

  Attributes:
    model_config: the configuration of PinFM, vocabulary sizes filled in.
    ranker_config: the configuration of the ranking model.
    schema: the candidates' features and labels.
    spec: their shapes.
    params: parameters of the ranking model; others beside them are kept and not used.
    rows_GE: the item tables, sub-tables one after another, or their consecutive parts, or these packed; None without
      PinFM.
    stats: constants of the dense features; None for a tower alone.
    actions: names of the actions.
    surfaces: names of the surfaces.
    id_type: how ids are spelled.
    history_block: the window slides in blocks of this many events.
    utility: weight of each label in the score that orders a request.
    run: where the parameters came from (JSON values).
    items: content of the items, for a model with content; not used by a ranker without PinFM.
    catalogue: item_key (ascending) and item_id of the items to recommend; not used by a ranker without PinFM.
    card: text of the model card; empty = none.
    clip: rows of int4 and int8 tables are rounded with the least squared error, not from minimum to maximum.
  """

  model_config: PinFMConfig
  ranker_config: RankerConfig
  schema: FeatureSchema
  spec: 'FeatureSpec'
  params: Any
  rows_GE: np.ndarray | jax.Array | Iterable[np.ndarray] | PackedRows | None
  stats: 'DenseStats | None'
  actions: Sequence[str]
  surfaces: Sequence[str]
  id_type: IdTypes
  history_block: int
  utility: Mapping[str, float] = field(default_factory=dict)
  run: Mapping[str, Any] = field(default_factory=dict)
  items: ItemContent | None = None
  catalogue: 'pl.DataFrame | None' = None
  card: str = ''
  clip: bool = False


def export_bundle(out: str | Path, ranker: TrainedRanker, storage: str = 'int4', overwrite: bool = False) -> Path:
  """Writes a bundle; `out` appears only when it is complete.

  Args:
    out: directory to make.
    ranker: what to write.
    storage: of the tables: 'int4', 'int8' or 'float32'.
    overwrite: replace a bundle that is there.

  Returns:
    The directory.

  Raises:
    UserError: the directory exists, rows that cannot be stored, or a utility weight of no label.
  """
  with complete_directory(Path(out), overwrite) as directory:
    content = exported_content(ranker, storage)
    files = _write_files(directory, content, ranker.rows_GE)
    manifest_of(ranker, content.layout, files).write(directory)
  return Path(out)


@dataclass(frozen=True)
class Content:
  """What a bundle holds besides its tables.

  Attributes:
    layout: of the tables, or None without PinFM.
    arrays: the trees of `parameters.npz`.
    programs: by name.
    items: content of the items, or None.
    model: the configuration of PinFM.
    catalogue: items to recommend, or None.
    card: text of the model card, or ''.
  """

  layout: TableLayout | None
  arrays: Mapping[str, Any]
  programs: Mapping[str, bytes]
  items: ItemContent | None
  model: PinFMConfig
  catalogue: 'pl.DataFrame | None' = None
  card: str = ''


def exported_content(ranker: TrainedRanker, storage: str) -> Content:
  """Lowers the programs and gathers the parameters.

  Raises:
    UserError: a utility weight of no label, or a storage that does not fit.
  """
  # Here, so that scoring loads neither Flax nor the model's source.
  from flax.core import meta

  from pinfm_jax.serve.programs import ServingModel, export_programs

  schema = ranker.schema
  unknown = sorted(set(ranker.utility) - set(schema.labels))
  if unknown:
    raise UserError(f'got utility weights for {unknown}, expected labels among {list(schema.labels)}')
  layout = table_layout(ranker, storage)
  arrays = {
    'params': plain_arrays(meta.unbox(ranker.params)),
    'stats': {name: np.asarray(getattr(ranker.stats, name)) for name in STATS} if ranker.stats else {},
  }
  model = ServingModel(ranker.model_config, ranker.ranker_config, ranker.spec, layout)
  with _no_call_stacks():
    programs = export_programs(model, arrays['params'], arrays['stats'], schema.history_length)
  return Content(layout, arrays, programs, ranker.items, ranker.model_config, ranker.catalogue, ranker.card)


def manifest_of(ranker: TrainedRanker, layout: TableLayout | None, files: tuple[FileEntry, ...]) -> Manifest:
  """The manifest of a ranker's bundle."""
  from pinfm_jax.serve.programs import PLATFORMS

  return Manifest(
    created=datetime.now(UTC).isoformat(timespec='seconds'),
    jax=exported_range(jax.__version__),
    platforms=PLATFORMS,
    id_type=ranker.id_type,
    actions=tuple(ranker.actions),
    surfaces=tuple(ranker.surfaces),
    schema=ranker.schema,
    history_block=ranker.history_block,
    utility=dict(ranker.utility),
    tables=layout,
    golden=golden_ids(ranker.id_type.item, layout),
    model=to_dict(ranker.model_config),
    ranker=to_dict(ranker.ranker_config),
    run=dict(ranker.run),
    files=files,
  )


def load_bundle(path: str | Path, whole_below: int = _WHOLE_BELOW, rows: RowSource | None = None) -> Bundle:
  """Opens a bundle and checks it: versions, hash, and the checksums of every file.

  The programs of format 1 are replaced: they are lowered again from the typed configuration, which needs Flax.

  Args:
    path: the directory.
    whole_below: tables and content of more bytes are sampled, other blocks at each call; the rest is read whole.
    rows: where the tables' rows come from instead of tables.bin, which may then be absent.

  Raises:
    UserError: no bundle there, a missing, truncated or damaged file, or a version that this program cannot run.
  """
  path = Path(path)
  manifest = Manifest.read(path)
  if manifest.format_version == FORMAT_VERSION:
    check_jax(path, manifest.jax, jax.__version__)
  elsewhere = TABLES if rows is not None and not (path / TABLES).exists() else None
  check_files(path, [entry for entry in manifest.files if entry.name != elsewhere], whole_below)
  arrays, model = load_arrays(path / PARAMETERS), manifest.pinfm
  if manifest.tables and rows is None:
    rows = MappedRows(path / TABLES, manifest.tables)
  return Bundle(
    path=path,
    manifest=manifest,
    params=arrays['params'],
    stats=arrays.get('stats', {}),
    rows=rows if manifest.tables else None,
    programs=_programs(path, manifest, arrays),
    items=map_items(path, model) if model is not None and model.content else None,
  )


def check_files(path: Path, files: Iterable[FileEntry], whole_below: int = _WHOLE_BELOW) -> None:
  """Checks sizes and checksums of a bundle's files; see `load_bundle`."""
  files = list(files)
  for entry in files:
    checksums.check_size(path, entry)
  sampled = [entry for entry in files if entry.name in DIGESTS and entry.bytes > whole_below]
  for entry in files:
    if entry not in sampled:
      checksums.check_whole(path, entry)
  for entry in sampled:  # after their digests, which are files themselves
    checksums.check_sample(path, entry, (path / DIGESTS[entry.name]).read_bytes())


def _programs(path: Path, manifest: Manifest, arrays: Mapping[str, Any]) -> dict[str, export.Exported]:
  if manifest.format_version == FORMAT_VERSION:
    files = [entry.name for entry in manifest.files if entry.name.startswith('programs/')]
    return {Path(name).stem: export.deserialize(bytearray((path / name).read_bytes())) for name in files}
  print(
    f'{path} has format {manifest.format_version}: its programs are lowered again at every start; '
    f'`pinfm export {path} --refresh --out DIR` writes format {FORMAT_VERSION}',
    file=sys.stderr,  # standard output belongs to results
  )
  from pinfm_jax.serve.programs import ServingModel, lower_programs
  from pinfm_jax.train.finetune import feature_spec

  # A ranker without PinFM keeps the configuration of PinFM too.
  config = from_dict(PinFMConfig, manifest.model)
  model = ServingModel(config, manifest.ranking, feature_spec(manifest.schema), manifest.tables)
  platform = {'gpu': 'cuda'}.get(jax.default_backend(), jax.default_backend())
  length = manifest.schema.history_length
  return lower_programs(model, arrays['params'], arrays['stats'], length, (platform,))


def _write_files(directory: Path, content: Content, rows_GE: Any) -> tuple[FileEntry, ...]:
  names = write_content(directory, content)
  tables = write_tables(directory, rows_GE, content.layout)
  return (*tables[:1], *(checksums.describe(directory, name)[0] for name in names), *tables[1:])


def write_tables(directory: Path, rows_GE: Any, layout: TableLayout | None) -> list[FileEntry]:
  """Writes packed tables and their digests; nothing without PinFM. Returns the files' entries."""
  if layout is None:
    return []
  describer = checksums.Describer()
  with open(directory / TABLES, 'wb') as file:
    for packed in packed_rows(rows_GE, layout):
      file.write(packed.data)
      describer.update(packed.reshape(-1).data)
  entry, digests = describer.finish(TABLES)
  (directory / DIGESTS[TABLES]).write_bytes(digests)
  return [entry, checksums.describe(directory, DIGESTS[TABLES])[0]]


def write_content(directory: Path, content: Content) -> list[str]:
  """Writes parameters, programs, what is known of items, and the card; returns the names of the files."""
  save_arrays(directory / PARAMETERS, content.arrays)
  (directory / 'programs').mkdir()
  for name, program in content.programs.items():
    (directory / _program(name)).write_bytes(program)
  return [PARAMETERS, *map(_program, content.programs), *write_items_of(directory, content)]


def write_items_of(directory: Path, content: Content) -> list[str]:
  """Writes what is known of items; returns the names of the files."""
  names = []
  if content.layout is not None and content.model.content:
    names += write_items(directory, content.items, content.model)
    _, digests = checksums.describe(directory, CONTENT)
    (directory / DIGESTS[CONTENT]).write_bytes(digests)
    names.append(DIGESTS[CONTENT])
  if content.layout is not None and content.catalogue is not None:
    names.append(write_catalogue(directory, content.catalogue))
  if content.card:
    (directory / MODEL_CARD).write_text(content.card, encoding='utf-8')
    names.append(MODEL_CARD)
  return names


def carried_over(path: Path, manifest: Manifest) -> dict[str, Any]:
  """What a bundle made of this one takes along unchanged: `catalogue` and `card` of `TrainedRanker`."""
  names = {entry.name for entry in manifest.files}
  return {
    'catalogue': read_catalogue(path) if CATALOGUE in names else None,
    'card': (path / MODEL_CARD).read_text(encoding='utf-8') if MODEL_CARD in names else '',
  }


def table_layout(ranker: TrainedRanker, storage: str) -> TableLayout | None:
  """How the ranker's tables are laid out; None without PinFM.

  Raises:
    UserError: a ranker without PinFM whose TransAct reads content, which is kept beside tables alone.
  """
  if ranker.ranker_config.sequence == 'none':
    if ranker.ranker_config.transact.length and ranker.model_config.content:
      raise UserError(
        'a ranker without PinFM is exported without the content of items, which its TransAct reads (model.content): '
        'train it with model.content=false, or export a ranker with PinFM'
      )
    return None
  tables = ranker.model_config.tables
  size = row_bytes(tables.width, storage)
  clip = ranker.clip and storage != 'float32'
  return TableLayout(storage, tables.sub_tables, tables.rows, tables.width, size, tables.hash_seed, clip)


def packed_rows(rows_GE: Any, layout: TableLayout) -> Iterator[np.ndarray]:
  """The packed rows of the tables, block after block; see `TrainedRanker.rows_GE` for what they are made of."""
  written = 0
  for packed in quantise_parts(rows_GE, layout.storage, layout.clip):
    if packed.shape[1] != layout.row_bytes:
      raise ValueError(f'got packed rows of {packed.shape[1]} bytes, expected {layout.row_bytes}')
    written += len(packed)
    yield packed
  if written != layout.sub_tables * layout.rows:
    raise ValueError(f'got {written} table rows, expected {layout.sub_tables} x {layout.rows}')


@contextmanager
def _no_call_stacks() -> Iterator[None]:
  """Keeps who called the export out of the programs: the same model then gives the same bytes, a third fewer."""
  names = {'jax_traceback_in_locations_limit': 0, 'jax_include_full_tracebacks_in_locations': False}
  before = {name: getattr(jax.config, name) for name in names}
  try:
    for name, value in names.items():
      jax.config.update(name, value)
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


def _program(name: str) -> str:
  return f'programs/{name}.bin'
