"""`dataset.json`, the description of a prepared data set, as frozen dataclasses."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pinfm_jax.errors import UserError

FORMAT = 'pinfm-dataset'
SCHEMA_VERSION = 1


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

  A vocabulary names its `values` (value i has the index i + 1); a hashed feature has None and spreads values over
  the buckets 1 .. size - 1.
  """

  name: str
  kind: str
  size: int
  values: tuple[str, ...] | None = None


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
class DatasetInfo:
  """Everything that `dataset.json` says.

  `shards` are the record files (histories, then requests), `tables` the Parquet files; `checksum` covers both and is
  the same for the same events whatever format they were read from.
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

  def shard_names(self, kind: str) -> list[str]:
    """Names of the shards of `kind` ('histories' or 'requests'), in order."""
    return [shard.name for shard in self.shards if shard.name.startswith(f'{kind}-')]

  def write(self, path: Path) -> None:
    """Writes the description as JSON."""
    document = {'format': FORMAT, 'schema_version': SCHEMA_VERSION, **asdict(self)}
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
    if version != SCHEMA_VERSION:
      raise UserError(
        f'{path} has schema version {version}, this program reads {SCHEMA_VERSION}: prepare the log again'
      )
    try:
      return _from_document(document)
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(f'{path} lacks or misspells a field ({error}); prepare the data set again') from None


def _from_document(document: dict) -> DatasetInfo:
  features, counts = document['features'], document['counts']
  sparse = (
    SparseFeature(f['name'], f['kind'], f['size'], _optional_tuple(f.get('values'))) for f in features['sparse']
  )
  parsed = {
    'id_type': IdTypes(**document['id_type']),
    'time_known': TimeKnown(**document['time_known']),
    'features': Features(
      tuple(features['dense']), tuple(sparse), tuple(EmbeddingFeature(**f) for f in features['embedding'])
    ),
    'counts': Counts(
      **{**counts, 'events': RowCounts(**counts['events']), 'impressions': RowCounts(**counts['impressions'])}
    ),
    'shards': tuple(DataFile(**shard) for shard in document['shards']),
    'tables': tuple(DataFile(**table) for table in document['tables']),
  }
  for name in ('time_range_ms', 'actions', 'surfaces', 'labels'):
    parsed[name] = tuple(document[name])
  return DatasetInfo(**{**document, **parsed})


def _optional_tuple(values: list[str] | None) -> tuple[str, ...] | None:
  return None if values is None else tuple(values)
