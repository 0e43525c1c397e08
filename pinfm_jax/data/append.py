"""Appends a new day's logs to a prepared data set, as a new partition: nothing that is stored is rewritten.

The partition is a directory in the data set, and `dataset.json` is replaced last: before that moment, whoever opens the
data set sees the old one, whole, and a reader that has it open goes on reading the files that it knows.

Names are appended to the vocabularies and users to the rows, so codes, rows and history ends that are stored stay
right. A row that is not later than everything stored is late, hence malformed: merging it would move history ends.
Impressions of one request in two logs are two requests.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.info import Counts, DataFile, DatasetInfo, Partition
from pinfm_jax.data.preparation.columns import source_column
from pinfm_jax.data.preparation.config import PrepareConfig
from pinfm_jax.data.preparation.reading import column_names
from pinfm_jax.data.preparation.stored import Stored
from pinfm_jax.data.prepare import Made, build, check_mappings, describe_partition, files_checksum
from pinfm_jax.errors import UserError
from pinfm_jax.files import complete_directory
from pinfm_jax.workdir import only_one

_DESCRIPTION = 'dataset.json'
_FIXED = ('cap', 'labels', 'dense', 'sparse', 'embedding', 'user_id_type', 'item_id_type')


def append(dataset: str | Path, logs: str | Path | Sequence[str | Path], **settings: Any) -> DatasetInfo:
  """Adds events, and maybe impressions, that are later than everything in a prepared data set.

  Time and memory follow the new rows, and beside them the numbers of stored users and items: no stored event is read
  (where the times are not known: one record of each user who comes again).

  Args:
    dataset: the prepared data set.
    logs: the new event files.
    **settings: other fields of `PrepareConfig`. What the data set fixes (cap, id types, labels, features) is left out
      or the same; `actions` and `surfaces` begin with the data set's names.

  Returns:
    What `dataset.json` says now.

  Raises:
    UserError: no data set there, another one is being appended, a setting or file does not fit it, or see `prepare`.
  """
  path = Path(dataset)
  with _only_append(path):
    stored = Stored(PreparedDataset.open(path))
    config = _config(stored, logs, settings)
    name = f'partition-{len(stored.info.partitions):05}'
    shutil.rmtree(path / name, ignore_errors=True)  # of an append that was killed before dataset.json named it
    with complete_directory(path / name, overwrite=False) as folder:
      made = build(config, folder, path.with_name(f'{path.name}.rejected.jsonl'), stored)
      _check_content(stored, config, made)
    info = _grown(stored, made, name)
    partial = path / f'{_DESCRIPTION}.partial'
    info.write(partial)
    os.replace(partial, path / _DESCRIPTION)
  return info


def _config(stored: Stored, logs: str | Path | Sequence[str | Path], settings: Mapping[str, Any]) -> PrepareConfig:
  """The settings, with what the data set fixes filled in."""
  info, path = stored.info, stored.dataset.path
  for name in ('overwrite', 'time_known'):
    if settings.get(name):
      raise UserError(f'got {name} while appending to {path}: leave it out, or prepare all logs together')
  features = info.features
  fixed = {'cap': info.cap, 'user_id_type': info.id_type.user, 'item_id_type': info.id_type.item}
  shapes = {'labels': info.labels, 'dense': features.dense}
  shapes |= {kind: tuple(feature.name for feature in getattr(features, kind)) for kind in ('sparse', 'embedding')}
  if settings.get('impressions'):
    if not info.labels or not info.shard_files('requests'):
      raise UserError(f'{path} was prepared without impressions, so none can be appended: prepare all logs together')
    fixed |= shapes
  for name in _FIXED:
    given = settings.get(name)
    given = tuple(given) if isinstance(given, list) else given
    expected = fixed.get(name, shapes.get(name, ()))
    if given not in (None, 'auto', ()) and given != expected:
      raise UserError(f'got {name} {given!r}, but {path} has {expected!r}: leave {name} out, or prepare all together')
  for name, known in (('actions', info.actions), ('surfaces', info.surfaces)):
    given = settings.get(name)
    if given is not None and tuple(given[: len(known)]) != known:
      raise UserError(f'got {name} {", ".join(given)}, expected them to begin with those of {path}: {", ".join(known)}')
  config = PrepareConfig(logs, path, **{**settings, **fixed})
  config.check()
  check_mappings(config)
  _check_times(stored, config)
  return config


def _check_times(stored: Stored, config: PrepareConfig) -> None:
  known, path = stored.info.time_known, stored.dataset.path
  for log in map(Path, config.logs):
    timed = source_column(log, column_names(log), config.columns, 'timestamp', required=False) is not None
    if timed != known.histories or config.time_unit == 'order':
      has, got = ('times', 'none') if known.histories else ('an order but no times', 'a timestamp column')
      got = "time unit 'order'" if config.time_unit == 'order' else got
      raise UserError(
        f'{path} has {has} and {log} has {got}; expected the same of both: '
        'name the column (--columns timestamp=NAME), or prepare all logs together'
      )
  ordinal = config.impression_time_unit == 'order'
  if stored.info.shard_files('requests') and not (known.histories and known.impressions and not ordinal):
    raise UserError(f'{path} has requests without known times, so nothing can be appended: prepare all logs together')


def _check_content(stored: Stored, config: PrepareConfig, made: Made) -> None:
  width, found = stored.info.content_width, made.assembled.content_width
  if found not in (0, width):
    raise UserError(
      f'{config.items} has contents of the width {found}, {stored.dataset.path} has '
      f'{f"the width {width}" if width else "none"}; expected the same: leave the column out, or prepare all together'
    )


def _grown(stored: Stored, made: Made, name: str) -> DatasetInfo:
  """The description with one more partition."""
  info, ingested = stored.info, made.ingested
  shards, tables = (_within(name, files) for files in (made.assembled.shards, made.assembled.tables))
  # The partition keeps it, so that a run on this state of the data set is recognised when more has been appended.
  checksum = files_checksum((*info.shards, *info.tables, *shards, *tables))
  part = describe_partition(made, name, checksum)
  return replace(
    info,
    time_range_ms=_range(info.partitions, part),
    actions=tuple(ingested.shared.actions.final()[0]),
    surfaces=tuple(ingested.shared.surfaces.final()[0]),
    features=ingested.features if ingested.config.impressions else info.features,
    counts=_counts(stored, made, name),
    shards=info.shards + shards,
    tables=info.tables + tables,
    checksum=checksum,
    partitions=(*info.partitions, part),
  )


def _within(name: str, files: tuple[DataFile, ...]) -> tuple[DataFile, ...]:
  return tuple(replace(file, name=f'{name}/{file.name}') for file in files)


def _range(earlier: tuple[Partition, ...], part: Partition) -> tuple[int, int]:
  ranges = [p.time_range_ms for p in (*earlier, part) if p.time_range_ms != (0, 0)]
  return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else (0, 0)


def _counts(stored: Stored, made: Made, name: str) -> Counts:
  """Counts over all partitions; items that were known already are counted once."""
  old, new = stored.info.counts, made.counts
  keys = pl.read_parquet(stored.dataset.path / name / 'items.parquet', columns=['item_key'])['item_key']
  new_items = int((~keys.is_in(stored.dataset.parts.item_keys().implode())).sum())
  reasons = old.rejected_by_reason | {
    reason: old.rejected_by_reason.get(reason, 0) + count for reason, count in new.rejected_by_reason.items()
  }
  return Counts(
    events=old.events + new.events,
    impressions=old.impressions + new.impressions,
    users=old.users + made.assembled.new_users,
    items=old.items + new_items,
    requests=old.requests + new.requests,
    rejected_by_reason=dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
  )


def _only_append(path: Path) -> AbstractContextManager[None]:
  """Holds the data set's lock."""
  if not (path / _DESCRIPTION).is_file():
    raise UserError(
      f'{path} is not a prepared data set, so nothing can be appended: make one with `pinfm prepare --out`'
    )
  return only_one(path, f'another append is writing to {path}: wait for it')
