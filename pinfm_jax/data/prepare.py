"""Prepares raw logs: reads them once in batches, then has the data set assembled, and makes it appear whole."""

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pinfm_jax.data.events import EVENT_FIELDS, IMPRESSION_FIELDS
from pinfm_jax.data.info import (
  Counts,
  DataFile,
  DatasetInfo,
  EmbeddingFeature,
  Features,
  IdTypes,
  Partition,
  RowCounts,
  SparseFeature,
  TimeKnown,
)
from pinfm_jax.data.preparation.assemble import Assembled, Assembler, Ingested
from pinfm_jax.data.preparation.columns import check_mapping
from pinfm_jax.data.preparation.config import PrepareConfig
from pinfm_jax.data.preparation.features import DENSE, EMBEDDING, SPARSE, SideTable, load_side_table
from pinfm_jax.data.preparation.impressions import ImpressionIntake
from pinfm_jax.data.preparation.intake import EventIntake, Shared, ingest
from pinfm_jax.data.preparation.reading import column_names
from pinfm_jax.data.preparation.rejects import RejectLog
from pinfm_jax.data.preparation.spool import Spool
from pinfm_jax.data.preparation.stored import Stored
from pinfm_jax.errors import UserError
from pinfm_jax.files import complete_directory

__all__ = ['PrepareConfig', 'prepare']


def prepare(config: PrepareConfig) -> DatasetInfo:
  """Prepares logs into a data set directory, which appears only when it is complete.

  The log is read once, in batches that are spilled to disk by user, then merged, capped and encoded part by part:
  memory is bounded by the batches, the parts and the largest single user, and otherwise grows only with the number
  of distinct users, items and requests.

  Args:
    config: files, columns and limits.

  Returns:
    What `dataset.json` in `config.out` says.

  Raises:
    UserError: a setting, file or column is wrong, or too many rows are malformed (they are then kept in
      OUT.rejected.jsonl).
  """
  config.check()
  check_mappings(config)
  out = Path(config.out)
  with complete_directory(out, config.overwrite, 'dataset.json', 'prepared data set') as folder:
    made = build(config, folder, out.with_name(f'{out.name}.rejected.jsonl'))
    info = describe_dataset(made)
    info.write(folder / 'dataset.json')
  return info


@dataclass(frozen=True)
class Made:
  """The files of one preparation are written; what is left is to describe them."""

  ingested: Ingested
  assembled: Assembled
  counts: Counts


def build(config: PrepareConfig, folder: Path, beside: Path, stored: Stored | None = None) -> Made:
  """Reads the files and writes everything but the description.

  Args:
    config: files, columns and limits.
    folder: an empty directory.
    beside: where the malformed rows are kept if there are too many.
    stored: the data set that this is appended to.

  Raises:
    UserError: see `prepare`.
  """
  spill = folder / 'spill'
  spill.mkdir()
  with RejectLog(folder / 'rejected.jsonl', beside, config.max_rejected_share) as rejects:
    ingested = _ingest(config, spill, rejects, stored)
  if stored:
    stored.check_schema(ingested.features, config)
  assembled = Assembler(ingested, folder, spill).run()
  for file in spill.iterdir():
    file.unlink()
  spill.rmdir()
  return Made(ingested, assembled, count_rows(assembled, rejects))


def _ingest(config: PrepareConfig, spill: Path, rejects: RejectLog, stored: Stored | None) -> Ingested:
  shared = Shared.of(config, stored)
  intake, impressions = EventIntake(config, shared), ImpressionIntake(config, shared)
  spools = Spool(spill, 'events'), Spool(spill, 'impressions')
  ingest(config.logs, intake, spools[0], rejects)
  if not spools[0].rows:
    raise UserError(f'every row of the events is malformed: see the reasons in {rejects.keep()}')
  if intake.order_only:
    sys.stderr.write('no timestamp column: events get the ordinal times 0, 1, 2, .. in file order\n')
  sides: list[SideTable] = []
  if config.impressions:
    ingest(config.impressions, impressions, spools[1], rejects)
    if not spools[1].rows:
      raise UserError(f'every row of the impressions is malformed: see the reasons in {rejects.keep()}')
    sides = load_sides(config, impressions.names, shared, rejects)
  sparse = {name: collector.feature() for name, collector in impressions.sparse.items()}
  return Ingested(
    config=config,
    shared=shared,
    events=spools[0],
    impressions=spools[1],
    order_only=intake.order_only,
    time_known=time_known(config, intake.order_only),
    features=ordered_features(config, sparse, impressions.widths, sides) if config.impressions else Features(),
    sides=sides,
    stored=stored.users if stored else None,
  )


def load_sides(
  config: PrepareConfig, names: Mapping[str, Sequence[str]], shared: Shared, rejects: RejectLog
) -> list[SideTable]:
  """Reads the features that the impressions lack (they have `names` of each kind) from the item and user files."""
  wanted = {DENSE: config.dense, SPARSE: config.sparse, EMBEDDING: config.embedding}
  missing = {kind: [name for name in those if name not in names[kind]] for kind, those in wanted.items()}
  files = [('item', config.items, config.item_columns), ('user', config.users, config.user_columns)]
  files = [(who, Path(path), mapping) for who, path, mapping in files if path is not None]
  sides = []
  for place, (who, path, mapping) in enumerate(files):
    header = column_names(path)
    # The last file must have all that is still missing: looking it up there makes an error with a suggestion.
    last = place == len(files) - 1
    here = {kind: [n for n in names if last or mapping.get(n, n) in header] for kind, names in missing.items()}
    missing = {kind: [n for n in names if n not in here[kind]] for kind, names in missing.items()}
    grown = shared.stored.sparse if shared.stored else None
    sides.append(load_side_table(path, who, shared.id_type[who], mapping, here, rejects, grown))
  return sides


def time_known(config: PrepareConfig, order_only: bool) -> TimeKnown:
  """What is known about the times of logs with or without (`order_only`) a time column."""
  known = not order_only and config.time_unit != 'order'
  return TimeKnown(
    histories=known if config.time_known is None else config.time_known,
    impressions=bool(config.impressions) and config.impression_time_unit != 'order',
  )


def ordered_features(
  config: PrepareConfig, sparse: Mapping[str, SparseFeature], widths: Mapping[str, int], sides: Sequence[SideTable]
) -> Features:
  """The features in the order of the configuration, those of the impressions and those of the item and user files."""
  for side in sides:
    sparse = {**sparse, **side.sparse}
    widths = {**widths, **side.widths}
  vectors = tuple(EmbeddingFeature(name, widths[name]) for name in config.embedding)
  return Features(config.dense, tuple(sparse[name] for name in config.sparse), vectors)


def count_rows(assembled: Assembled, rejects: RejectLog) -> Counts:
  """Sizes, and what became of every row read."""
  kinds = (('events', assembled.events), ('impressions', assembled.impressions))
  rows = {kind: RowCounts(read=rejects.read[kind], rejected=rejects.rejected(kind), **fate) for kind, fate in kinds}
  for kind, counts in rows.items():
    counts.check(kind)
  return Counts(
    **rows,
    users=assembled.users,
    items=assembled.items,
    requests=assembled.requests,
    rejected_by_reason=rejects.by_reason(),
  )


def describe_dataset(made: Made) -> DatasetInfo:
  """What `dataset.json` says of a data set's first partition."""
  ingested, assembled = made.ingested, made.assembled
  config, shared = ingested.config, ingested.shared
  part = describe_partition(made, '', files_checksum((*assembled.shards, *assembled.tables)))
  return DatasetInfo(
    source=part.source,
    created=part.created,
    licence=config.licence,
    notes=config.notes,
    id_type=IdTypes(shared.id_type['user'], shared.id_type['item']),
    time_known=ingested.time_known,
    time_range_ms=part.time_range_ms,
    actions=tuple(shared.actions.final()[0]),
    surfaces=tuple(shared.surfaces.final()[0]),
    labels=config.labels,
    features=ingested.features,
    content_width=assembled.content_width,
    cap=config.cap,
    counts=made.counts,
    shards=assembled.shards,
    tables=assembled.tables,
    checksum=part.checksum,
    partitions=(part,),
  )


def describe_partition(made: Made, directory: str, checksum: str) -> Partition:
  """What `dataset.json` says of one preparation."""
  config = made.ingested.config
  return Partition(
    directory=directory,
    source=config.source or ', '.join(Path(path).name for path in config.logs),
    created=datetime.now(UTC).isoformat(timespec='seconds'),
    counts=made.counts,
    new_users=made.assembled.new_users,
    time_range_ms=made.assembled.time_range_ms,
    checksum=checksum,
  )


def files_checksum(files: Iterable[DataFile]) -> str:
  """One checksum of many files."""
  return hashlib.sha256(''.join(file.sha256 for file in files).encode()).hexdigest()


def check_mappings(config: PrepareConfig) -> None:
  """Raises UserError if a mapping of columns names something that is no canonical name."""
  features = [*config.dense, *config.sparse, *config.embedding]
  check_mapping('columns', config.columns, EVENT_FIELDS)
  check_mapping('impression_columns', config.impression_columns, [*IMPRESSION_FIELDS, *config.labels, *features])
  check_mapping('item_columns', config.item_columns, ['item_id', 'created_at', 'content', *features])
  check_mapping('user_columns', config.user_columns, ['user_id', *features])
