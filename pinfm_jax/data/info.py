"""`dataset.json`, the description of a prepared data set, as frozen dataclasses."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pinfm_jax.errors import UserError

FORMAT = 'pinfm-dataset'
SCHEMA_VERSION = 1
APPENDED_VERSION = (
  2  # of a data set that was appended to: a program that knows no partitions must not read a part of it
)


@dataclass(frozen=True)
class IdTypes:
  """How ids are spelled: 'integer' or 'string'."""

  user: str
  item: str


@dataclass(frozen=True)
class TimeKnown:
  """Whether the timestamps are real times (False: ordinals, from which no gap and no age may be computed)."""

  histories: bool
  impressions: bool


@dataclass(frozen=True)
class SparseFeature:
  """A categorical feature: an index below `size`, 0 = missing or unknown.

  A vocabulary names its `values` (value i has the index i + 1; values that were appended later stand behind the
  first ones); a hashed feature has None and spreads values over the buckets 1 .. size - 1.
  """

  name: str
  kind: str
  size: int
  values: tuple[str, ...] | None = None

  @cached_property
  def codes(self) -> Mapping[str, int]:
    """Index of every value of the vocabulary; empty for a hashed feature."""
    return {value: index for index, value in enumerate(self.values or (), 1)}


@dataclass(frozen=True)
class EmbeddingFeature:
  """A vector feature of `width` floats."""

  name: str
  width: int


@dataclass(frozen=True)
class Features:
  """The candidates' features, in the order of the record's columns."""

  dense: tuple[str, ...] = ()
  sparse: tuple[SparseFeature, ...] = ()
  embedding: tuple[EmbeddingFeature, ...] = ()

  @property
  def embedding_width(self) -> int:
    """Width of all embedding features side by side."""
    return sum(feature.width for feature in self.embedding)


@dataclass(frozen=True)
class RowCounts:
  """What became of the rows of one kind of input: read = kept + rejected + merged + duplicates + cut."""

  read: int = 0
  kept: int = 0
  rejected: int = 0
  merged: int = 0
  duplicates: int = 0
  cut: int = 0

  def check(self, what: str) -> None:
    """Raises AssertionError (a bug, not a user's mistake) unless every row read is accounted for."""
    total = self.kept + self.rejected + self.merged + self.duplicates + self.cut
    if self.read != total:
      raise AssertionError(f'{what}: {self.read} rows read but {total} accounted for: {self}')

  def __add__(self, other: 'RowCounts') -> 'RowCounts':
    """What became of the rows of two inputs."""
    return RowCounts(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


@dataclass(frozen=True)
class Counts:
  """Sizes of the data set and what became of its input rows."""

  events: RowCounts
  impressions: RowCounts
  users: int
  items: int
  requests: int
  rejected_by_reason: dict[str, int]


@dataclass(frozen=True)
class DataFile:
  """A shard or a table: its name in the directory, records (rows), bytes and SHA-256."""

  name: str
  records: int
  bytes: int
  sha256: str


@dataclass(frozen=True)
class Partition:
  """What one preparation brought: the first one, or a day that was appended.

  Attributes:
    directory: below the data set, '' for the first one; its files in `shards` and `tables` begin with it.
    source, created: of this preparation.
    counts: of its rows; `users` and `items` are those that it met, known ones included.
    new_users: users that no earlier partition has; their rows stand behind all earlier ones.
    time_range_ms: of its events and impressions (0, 0 where times are not known).
    checksum: of the files of the data set up to and including this partition.
  """

  directory: str
  source: str
  created: str
  counts: Counts
  new_users: int
  time_range_ms: tuple[int, int]
  checksum: str


@dataclass(frozen=True)
class DatasetInfo:
  """Everything that `dataset.json` says.

  `shards` are the record files (histories, then requests), `tables` the Parquet files, partition after partition;
  `checksum` covers both and is the same for the same events whatever format they were read from. `counts` and
  `time_range_ms` are those of all partitions together.
  """

  source: str
  created: str
  licence: str | None
  notes: str
  id_type: IdTypes
  time_known: TimeKnown
  time_range_ms: tuple[int, int]
  actions: tuple[str, ...]
  surfaces: tuple[str, ...]
  labels: tuple[str, ...]
  features: Features
  content_width: int
  cap: int
  counts: Counts
  shards: tuple[DataFile, ...]
  tables: tuple[DataFile, ...]
  checksum: str
  partitions: tuple[Partition, ...]

  def shard_files(self, kind: str, partition: int | None = None) -> list['DataFile']:
    """The shards of `kind` ('histories' or 'requests'), of one partition or of all, in order."""
    wanted = range(len(self.partitions)) if partition is None else (partition,)
    folders = [self.partitions[number].directory for number in wanted]
    parts = [(*_split_name(shard.name), shard) for shard in self.shards]
    return [shard for folder, name, shard in parts if folder in folders and name.startswith(f'{kind}-')]

  def shard_names(self, kind: str) -> list[str]:
    """Names of the shards of `kind` ('histories' or 'requests'), in order."""
    return [shard.name for shard in self.shard_files(kind)]

  def write(self, path: Path) -> None:
    """Writes the description as JSON."""
    version = SCHEMA_VERSION if len(self.partitions) == 1 else APPENDED_VERSION
    document = {'format': FORMAT, 'schema_version': version, **asdict(self)}
    for feature in document['features']['sparse']:
      if feature['values'] is None:
        del feature['values']
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')

  @classmethod
  def read(cls, path: Path) -> 'DatasetInfo':
    """Reads a description.

    Raises:
      UserError: the file is no description, or of another version.
    """
    try:
      document = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, UnicodeDecodeError) as error:
      raise UserError(f'{path} is not valid JSON ({error}); prepare the data set again with `pinfm prepare`') from None
    if not isinstance(document, dict) or document.pop('format', None) != FORMAT:
      raise UserError(f'{path} is not the description of a prepared data set (expected "format": "{FORMAT}")')
    version = document.pop('schema_version', None)
    if version not in (SCHEMA_VERSION, APPENDED_VERSION):
      raise UserError(
        f'{path} has schema version {version}, this program reads {SCHEMA_VERSION} and {APPENDED_VERSION}: '
        'prepare the log again'
      )
    try:
      return _from_document(document)
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(f'{path} lacks or misspells a field ({error}); prepare the data set again') from None


def features_of(document: Mapping[str, Any]) -> Features:
  """Features from their JSON values."""
  sparse = (
    SparseFeature(f['name'], f['kind'], f['size'], _optional_tuple(f.get('values'))) for f in document['sparse']
  )
  vectors = tuple(EmbeddingFeature(**feature) for feature in document['embedding'])
  return Features(tuple(document['dense']), tuple(sparse), vectors)


def _from_document(document: dict) -> DatasetInfo:
  parsed = {
    'id_type': IdTypes(**document['id_type']),
    'time_known': TimeKnown(**document['time_known']),
    'features': features_of(document['features']),
    'counts': _counts(document['counts']),
    'shards': tuple(DataFile(**shard) for shard in document['shards']),
    'tables': tuple(DataFile(**table) for table in document['tables']),
  }
  for name in ('time_range_ms', 'actions', 'surfaces', 'labels'):
    parsed[name] = tuple(document[name])
  parsed['partitions'] = tuple(
    Partition(**{**part, 'counts': _counts(part['counts']), 'time_range_ms': tuple(part['time_range_ms'])})
    for part in document.get('partitions') or [_only_partition(document)]
  )
  return DatasetInfo(**{**document, **parsed})


def _counts(document: dict) -> Counts:
  rows = {kind: RowCounts(**document[kind]) for kind in ('events', 'impressions')}
  return Counts(**{**document, **rows})


def _only_partition(document: dict) -> dict:
  """The partition of a data set that was written before data sets could be appended to."""
  names = ('source', 'created', 'counts', 'time_range_ms', 'checksum')
  return {'directory': '', 'new_users': document['counts']['users'], **{name: document[name] for name in names}}


def _split_name(name: str) -> tuple[str, str]:
  """'partition-00001/histories-..' -> ('partition-00001', 'histories-..')."""
  folder, _, last = name.rpartition('/')
  return folder, last


def _optional_tuple(values: list[str] | None) -> tuple[str, ...] | None:
  return None if values is None else tuple(values)


def file_sha256(path: Path) -> str:
  """SHA-256 of a file, as hexadecimal digits."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
