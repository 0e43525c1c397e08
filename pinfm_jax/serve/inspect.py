"""Says what a directory is that `pinfm export` wrote (a bundle, a delta, another form), and whether it is whole."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pinfm_jax.config import PinFMConfig
from pinfm_jax.errors import UserError
from pinfm_jax.model.interaction.settings import describe_interaction
from pinfm_jax.overrides import from_dict
from pinfm_jax.progress import Progress
from pinfm_jax.serve import checksums
from pinfm_jax.serve.bundle import DIGESTS, PARAMETERS
from pinfm_jax.serve.delta import DELTA, DeltaManifest
from pinfm_jax.serve.jax_range import runs_here
from pinfm_jax.serve.manifest import FORMAT_VERSION, MANIFEST, FileEntry, Manifest
from pinfm_jax.serve.portable.export import FORMS, PortableManifest


@dataclass(frozen=True)
class Inspected:
  """What a directory is.

  Attributes:
    kind: 'bundle', 'delta', 'onnx' or 'savedmodel'.
    facts: everything that its manifest says, as JSON values, and what follows from it.
    lines: the same for people: (title, text).
    files: every file but the manifest.
  """

  kind: str
  facts: Mapping[str, Any]
  lines: Sequence[tuple[str, str]]
  files: Sequence[FileEntry]

  def text(self, path: str | Path) -> str:
    """The description, a fact a line."""
    width = max(len(title) for title, _ in self.lines)
    size = sum(entry.bytes for entry in self.files)
    files = [f'  {entry.bytes:>15,}  {entry.name}' for entry in self.files]
    lines = [f'{title:{width}}  {text}' for title, text in self.lines]
    return '\n'.join([f'{path}: {self.kind}', *lines, f'{len(files)} files, {size:,} bytes:', *files])


def inspect(path: str | Path) -> Inspected:
  """Reads the manifest of a directory that `pinfm export` wrote; the files are not checked (`damaged_files` does that).

  Raises:
    UserError: no such directory, or a manifest that cannot be read.
  """
  path = Path(path)
  if (path / DELTA).is_file():
    delta = DeltaManifest.read(path)
    return Inspected('delta', {'kind': 'delta', **asdict(delta)}, _delta_lines(delta), delta.files)
  form = _form(path)
  if form != 'bundle':
    portable = PortableManifest.read(path)
    programs = [(name, _signature(program)) for name, program in portable.programs.items()]
    facts = {'kind': form, 'programs': portable.programs, **asdict(portable.bundle)}
    return Inspected(form, facts, [*_common_lines(portable.bundle), *programs], portable.bundle.files)
  manifest = Manifest.read(path)
  counts = count_parameters(path, manifest)
  here = runs_here(manifest.jax)
  facts = {'kind': 'bundle', **asdict(manifest), 'parameters': counts, 'runs_on_this_jax': here}
  facts |= {} if manifest.ranks else {'ranker': None}
  return Inspected('bundle', facts, _bundle_lines(path, manifest, counts, here), manifest.files)


def damaged_files(path: str | Path, files: Sequence[FileEntry]) -> dict[str, str]:
  """Reads every file and compares it with its checksum; prints progress.

  Args:
    path: the directory.
    files: its files as the manifest states them.

  Returns:
    What is wrong with each damaged file.
  """
  path, wrong, done = Path(path), {}, 0
  progress = Progress(f'verify {path.name}', sum(entry.bytes for entry in files) / 1e6, 'MB')
  for entry in files:
    try:
      checksums.check_size(path, entry)
    except UserError as error:
      wrong[entry.name] = str(error)
      continue
    describer = checksums.Describer()
    with open(path / entry.name, 'rb') as file:
      while block := file.read(checksums.BLOCK):
        describer.update(block)
        done += len(block)
        progress.update(done / 1e6)
    found, digests = describer.finish(entry.name)
    if found != entry:
      wrong[entry.name] = f'{path / entry.name} is damaged{_places(path, entry, digests)}'
  progress.close()
  return wrong


def count_parameters(path: Path, manifest: Manifest) -> dict[str, int] | None:
  """Numbers of parameters: of PinFM, of the rest of the ranker, of the tables; None if the file cannot be read."""
  counts = {'pinfm': 0, 'ranker': 0} if manifest.ranks else {'pinfm': 0}
  try:
    with np.load(path / PARAMETERS, allow_pickle=False) as archive:
      for name in archive.files:
        if name.startswith('params/'):
          counts['pinfm' if name.startswith('params/pinfm/') else 'ranker'] += archive[name].size
  except (OSError, ValueError, zipfile.BadZipFile):
    return None
  tables = manifest.tables
  return {**counts, 'tables': tables.sub_tables * tables.rows * tables.width if tables else 0}


def _form(path: Path) -> str:
  """'bundle' unless the manifest says that it is another form; a manifest that cannot be read is a bundle's."""
  try:
    named = json.loads((path / MANIFEST).read_text(encoding='utf-8'))['format']
  except (OSError, ValueError, KeyError, TypeError):
    return 'bundle'
  return next((form for form in FORMS if named == f'pinfm-{form}'), 'bundle')


def _bundle_lines(
  path: Path, manifest: Manifest, counts: Mapping[str, int] | None, here: bool
) -> list[tuple[str, str]]:
  known = manifest.jax
  able = 'runs it' if here else f'cannot run it: pinfm export {path} --refresh --out NEW'
  programs = sorted(Path(entry.name).stem for entry in manifest.files if entry.name.startswith('programs/'))
  if manifest.format_version != FORMAT_VERSION:
    able = f'lowers them again at every start; pinfm export {path} --refresh --out NEW does it once'
  lines = [
    ('format', f'{manifest.format_version}{"" if manifest.format_version == FORMAT_VERSION else ", an older one"}'),
    ('JAX', f'{known.exported_with}, for >= {known.at_least}, < {known.below}; this JAX, {jax.__version__}, {able}'),
    ('platforms', ', '.join(manifest.platforms)),
    ('programs', ', '.join(programs)),
  ]
  if counts is None:
    lines.append(('parameters', f'{PARAMETERS} cannot be read; --verify says what is damaged'))
  else:
    ranker = f', {counts["ranker"]:,} of the ranker' if manifest.ranks else ''
    lines.append(('parameters', f'{counts["pinfm"]:,} of PinFM{ranker}, {counts["tables"]:,} in tables'))
  return lines + _common_lines(manifest)


def _common_lines(manifest: Manifest) -> list[tuple[str, str]]:
  """What bundles and other forms share."""
  schema, ids = manifest.schema, manifest.id_type
  return [
    ('created', manifest.created),
    ('model', _model_text(manifest)),
    ('tables', _tables_text(manifest)),
    ('history', f'{schema.history_length} events, slides in blocks of {manifest.history_block}'),
    *([('TransAct', f'reads the newest {schema.recent_length} events')] if schema.recent_length else []),
    ('ids', f'users {ids.user}, items {ids.item}'),
    ('actions', _names(manifest.actions)),
    ('surfaces', _names(manifest.surfaces)),
    *(_ranker_lines(manifest) if manifest.ranks else []),
    ('run', _names([f'{name} {value}' for name, value in manifest.run.items()])),
  ]


def _ranker_lines(manifest: Manifest) -> list[tuple[str, str]]:
  """What the ranker reads of candidates and predicts."""
  schema = manifest.schema
  sparse = [f'{f.name} ({f.size})' for f in schema.features.sparse]
  embedding = [f'{f.name} ({f.width})' for f in schema.features.embedding]
  content = [f'content ({schema.content_width})'] if schema.content_width else []
  return [
    ('dense', _names(schema.dense_names)),
    ('sparse', _names(sparse)),
    ('embedding', _names(embedding + content)),
    ('labels', _names(schema.labels)),
    ('utility', _names([f'{weight:g} x {label}' for label, weight in manifest.utility.items()])),
  ]


def _model_text(manifest: Manifest) -> str:
  ranking = manifest.ranking
  ranker = f'ranker with {describe_interaction(ranking)}, MLP {list(ranking.mlp)}'
  if manifest.tables is None:
    return f'{ranker}, without PinFM'
  model = from_dict(PinFMConfig, manifest.model)
  tower = model.tower
  options = [f'{tower.time_gap_buckets} time gaps'] if tower.time_gap_buckets else []
  options += [f'content of width {model.content_width}'] if model.content else []
  return ', '.join(
    [
      f'{tower.backbone} of {tower.layers} layers, width {tower.width}, {tower.heads} heads, {tower.dtype}',
      f'output {tower.output_width}, {tower.max_positions} positions',
      *options,
      ranker if manifest.ranks else 'without a ranker',
    ]
  )


def _tables_text(manifest: Manifest) -> str:
  tables = manifest.tables
  if tables is None:
    return 'none'
  total = tables.sub_tables * tables.rows * tables.row_bytes
  share = 100 * tables.row_bytes / (2 * tables.width)
  kind = f'{tables.storage}{" (clipped)" if tables.clip else ""}'
  return (
    f'{tables.sub_tables} x {tables.rows:,} rows x {tables.width}, {kind}: {total:,} bytes, '
    f'{share:.2f} % of float16; hash seed {tables.hash_seed}'
  )


def _delta_lines(delta: DeltaManifest) -> list[tuple[str, str]]:
  return [
    ('rows', delta.text()),
    ('base', f'the bundle whose {MANIFEST} has SHA-256 {delta.base}'),
    ('result', f'its {MANIFEST} will have SHA-256 {delta.result}'),
  ]


def _signature(program: Mapping[str, Any]) -> str:
  def tensors(side: str) -> str:
    return ', '.join(f'{n} {t["type"]}{t["shape"]}'.replace("'", '') for n, t in program[side].items())

  return f'{tensors("inputs")} -> {tensors("outputs")}'


def _places(path: Path, entry: FileEntry, digests: bytes) -> str:
  """Which MiB of a file differ, where the bundle has a digest of each."""
  name = DIGESTS.get(entry.name)
  if name is None or not (path / name).is_file():
    return ''
  known = (path / name).read_bytes()
  if len(known) != len(digests):
    return ''
  size = checksums.DIGEST
  wrong = [
    i for i in range(len(known) // size) if known[i * size : (i + 1) * size] != digests[i * size : (i + 1) * size]
  ]
  more = f' and {len(wrong) - 10} more' if len(wrong) > 10 else ''
  return f' in its MiB {", ".join(map(str, wrong[:10]))}{more}' if wrong else ''


def _names(names: Sequence[str]) -> str:
  more = f' and {len(names) - 20} more' if len(names) > 20 else ''
  return ', '.join(list(names)[:20]) + more if names else 'none'
