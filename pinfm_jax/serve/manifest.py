"""`manifest.json`, the description of a serving bundle, as frozen dataclasses that guard their own text.

The manifest is the one file that no other file vouches for, so its last field is the SHA-256 of its own bytes without
that field's digits.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pinfm_jax.config import PinFMConfig, RankerConfig
from pinfm_jax.data.events import id_key
from pinfm_jax.data.featurize import FeatureSchema
from pinfm_jax.data.info import EmbeddingFeature, Features, IdTypes, SparseFeature
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import hash_rows, key_words
from pinfm_jax.overrides import from_dict

MANIFEST = 'manifest.json'
FORMAT = 'pinfm-bundle'
FORMAT_VERSION = 2
FORMAT_VERSIONS = (1, 2)  # that open; 1 had programs over stacked users, without a pool
_GOLDEN_IDS = {'integer': (0, 1, -1, 123_456_789_012_345), 'string': ('a', 'pin/7', 'ünïcode')}


@dataclass(frozen=True)
class FileEntry:
  """A file of the bundle: its path in the directory, bytes and SHA-256."""

  name: str
  bytes: int
  sha256: str


@dataclass(frozen=True)
class JaxRange:
  """The JAX versions that can run the exported programs: at_least <= version < below."""

  exported_with: str
  at_least: str
  below: str


@dataclass(frozen=True)
class TableLayout:
  """How `tables.bin` is laid out: sub_tables * rows packed rows (`serve.quantize`) of row_bytes, one after another.

  `clip` says how the rows were rounded, which a reader need not know and a delta must.
  """

  storage: str
  sub_tables: int
  rows: int
  width: int
  row_bytes: int
  hash_seed: int
  clip: bool = False


@dataclass(frozen=True)
class GoldenId:
  """An id with the key and the rows it must hash to, so that a reader in any language can check itself.

  The key is hexadecimal, since many JSON readers round 64-bit integers.
  """

  id: int | str
  key: str
  rows: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
  """Everything that `manifest.json` says.

  Attributes:
    created: ISO time of the export.
    jax: versions that can run the programs.
    platforms: that the programs were lowered for.
    id_type: how user and item ids are spelled.
    actions: names, bit a of an event's actions is action a.
    surfaces: names, in the order of their codes.
    schema: the candidates' features, in column order, and the labels; without labels the bundle is a tower alone.
    history_block: over histories longer than schema.history_length the window slides in blocks of this many events.
    utility: weight of each label in the score that orders a request; may be empty.
    tables: layout of the item tables, None for a ranker without PinFM.
    golden: ids whose rows are known (rows of the item tables; without tables, the bucket of the ranker's own hash).
    model: the typed configuration of PinFM, to lower the programs again.
    ranker: that of the ranking model.
    run: where the parameters came from.
    files: every other file.
    format_version: of the bundle.
  """

  created: str
  jax: JaxRange
  platforms: tuple[str, ...]
  id_type: IdTypes
  actions: tuple[str, ...]
  surfaces: tuple[str, ...]
  schema: FeatureSchema
  history_block: int
  utility: Mapping[str, float]
  tables: TableLayout | None
  golden: tuple[GoldenId, ...]
  model: Mapping[str, Any]
  ranker: Mapping[str, Any]
  run: Mapping[str, Any]
  files: tuple[FileEntry, ...]
  format_version: int = FORMAT_VERSION

  @property
  def pinfm(self) -> PinFMConfig | None:
    """The typed configuration of PinFM, defaults where an older bundle lacks a field; None for a ranker without it."""
    return from_dict(PinFMConfig, self.model) if self.tables else None

  @property
  def ranks(self) -> bool:
    """Whether it scores candidates; a tower alone recommends and embeds."""
    return bool(self.schema.labels)

  @property
  def ranking(self) -> RankerConfig:
    """The typed configuration of the ranking model, likewise."""
    return from_dict(RankerConfig, self.ranker)

  def write(self, directory: Path) -> None:
    """Writes `manifest.json`."""
    document = {'format': FORMAT, 'format_version': 0, **asdict(self), 'checksum': ''}  # the version in its place
    text = json.dumps(document, indent=1, ensure_ascii=False) + '\n'
    checksum = hashlib.sha256(text.encode()).hexdigest()
    (directory / MANIFEST).write_bytes(f'{checksum}"'.join(text.rsplit('"', 1)).encode())

  @classmethod
  def read(cls, directory: Path) -> 'Manifest':
    """Reads and checks `manifest.json`.

    Raises:
      UserError: no bundle there, a damaged manifest, another format version, or this program hashes ids otherwise.
    """
    path = directory / MANIFEST
    if not path.is_file():
      raise UserError(f'{directory} is not a bundle: it has no {MANIFEST}; make one with `pinfm export`')
    manifest = parse_manifest(_checked_document(path), path)
    for golden in manifest.golden:
      if golden != _golden(golden.id, manifest.id_type.item, manifest.tables):
        raise UserError(
          f'{path}: this program hashes the id {golden.id!r} to other rows than the bundle was trained with; '
          'install the pinfm_jax version that exported it, or export it again'
        )
    return manifest


def document_checksum(document: Mapping[str, Any]) -> str:
  """SHA-256 of a JSON object, whatever its layout: what the smaller descriptions beside `manifest.json` hold."""
  return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def golden_ids(id_type: str, tables: TableLayout | None) -> tuple[GoldenId, ...]:
  """A few ids of the type, as this program hashes them."""
  return tuple(_golden(value, id_type, tables) for value in _GOLDEN_IDS[id_type])


def _golden(value: int | str, id_type: str, tables: TableLayout | None) -> GoldenId:
  key = id_key(value, id_type)
  sizes = (tables.sub_tables, tables.rows, tables.hash_seed) if tables else (1, 1 << 30, 1)
  return GoldenId(value, f'{key:#018x}', tuple(hash_rows(key_words(key), *sizes).tolist()))


def _checked_document(path: Path) -> dict:
  """The JSON of the file, once format, version and checksum are found right (in this order: the clearest message)."""
  damaged = UserError(f'{path} is damaged (its checksum does not fit); copy the bundle again or export it again')
  try:
    text = path.read_bytes().decode()
    document = json.loads(text)
  except ValueError:
    raise damaged from None
  if not isinstance(document, dict) or document.get('format') != FORMAT:
    raise UserError(f'{path} is not the manifest of a bundle (expected "format": "{FORMAT}")')
  version, checksum = document.get('format_version'), document.get('checksum')
  if version not in FORMAT_VERSIONS:
    raise UserError(
      f'{path} has format version {version}, this program reads {" and ".join(map(str, FORMAT_VERSIONS))}: '
      'install the matching pinfm_jax, or export the bundle again'
    )
  blank = ''.join(text.rsplit(checksum, 1)) if checksum and isinstance(checksum, str) else ''
  if hashlib.sha256(blank.encode()).hexdigest() != checksum:
    raise damaged
  return document


def parse_manifest(document: dict, path: Path) -> Manifest:
  """The fields of a manifest as they stand in JSON; raises UserError if one is missing or misspelt."""
  fields = {name: value for name, value in document.items() if name not in ('format', 'checksum')}
  try:
    return Manifest(
      **{
        **fields,
        'jax': JaxRange(**fields['jax']),
        'platforms': tuple(fields['platforms']),
        'id_type': IdTypes(**fields['id_type']),
        'actions': tuple(fields['actions']),
        'surfaces': tuple(fields['surfaces']),
        'schema': _schema(fields['schema']),
        'tables': TableLayout(**fields['tables']) if fields['tables'] else None,
        'golden': tuple(GoldenId(g['id'], g['key'], tuple(g['rows'])) for g in fields['golden']),
        'files': tuple(FileEntry(**file) for file in fields['files']),
      }
    )
  except (KeyError, TypeError) as error:
    raise UserError(f'{path} lacks or misspells a field ({error}); export the bundle again') from None


def _schema(document: dict) -> FeatureSchema:
  features = document['features']
  sparse = (
    SparseFeature(f['name'], f['kind'], f['size'], None if f['values'] is None else tuple(f['values']))
    for f in features['sparse']
  )
  embedding = (EmbeddingFeature(**f) for f in features['embedding'])
  parsed = Features(tuple(features['dense']), tuple(sparse), tuple(embedding))
  return FeatureSchema(**{**document, 'features': parsed, 'labels': tuple(document['labels'])})
