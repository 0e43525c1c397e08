"""The starting program's side of the Beam preparation: what is settled before the run, and what is read after it."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pinfm_jax.data.beam.reading import Intakes
from pinfm_jax.data.beam.writing import HISTORIES, REQUESTS, Settled
from pinfm_jax.data.events import MAX_ACTIONS, MAX_SURFACES, Vocabulary
from pinfm_jax.data.info import DataFile, DatasetInfo, Features, TimeKnown, features_of
from pinfm_jax.data.preparation.assemble import Assembled, Ingested, number_of_shards
from pinfm_jax.data.preparation.config import PrepareConfig
from pinfm_jax.data.preparation.features import SPARSE, SideTable, SparseCollector
from pinfm_jax.data.preparation.impressions import ImpressionIntake
from pinfm_jax.data.preparation.intake import EventIntake, Shared
from pinfm_jax.data.preparation.reading import read_batches
from pinfm_jax.data.preparation.rejects import RejectLog
from pinfm_jax.data.preparation.spool import BUCKETS
from pinfm_jax.data.prepare import Made, count_rows, describe_dataset, load_sides, ordered_features, time_known
from pinfm_jax.errors import UserError

SUMMARY, TOLD, REJECTED = 'summary', 'summary.json', 'rejects.jsonl'
KINDS = ('events', 'impressions')
TABLES = 'tables'
_TABLE_NAMES = ('users.parquet', 'items.parquet', 'requests.parquet')
_PART_BYTES = 64 << 20  # of log files a part


@dataclass(frozen=True)
class Rules:
  """What every worker is told; all of it can be pickled."""

  config: PrepareConfig
  intakes: Intakes
  sides: list[SideTable]
  columns: dict[str, Any]
  order_only: bool
  time_known: TimeKnown
  parts: int

  def settled(
    self, _: None, names: dict[str, list[str]], values: dict[str, list[str]], rows: dict[str, int]
  ) -> Settled:
    """What the whole log says, from what its files say."""
    impressions, features = self.intakes.get('impressions'), Features()
    if impressions is not None:
      sparse = {}
      for name in impressions.names[SPARSE]:
        collector = SparseCollector(name)
        collector.add(pl.Series(values.get(name, []), dtype=pl.String))
        sparse[name] = collector.feature()
      features = ordered_features(self.config, sparse, impressions.widths, self.sides)
    shards = tuple(number_of_shards(self.config, rows.get(kind, 0)) for kind in KINDS)
    actions = _final('action', MAX_ACTIONS, self.config.actions, names)
    return Settled(actions, _final('surface', MAX_SURFACES, self.config.surfaces, names), features, shards)


class Job:
  """The starting program's side: settles what the files have in common, and reads the summary of the run."""

  def __init__(self, config: PrepareConfig, folder: Path, rejects: RejectLog):
    self.folder, self._config, self._rejects = folder, config, rejects
    self._shared = Shared.of(config)
    intakes: Intakes = {'events': EventIntake(config, self._shared)}
    self.logs = {'events': [str(Path(log).absolute()) for log in config.logs]}
    if config.impressions:
      intakes['impressions'] = ImpressionIntake(config, self._shared)
      self.logs['impressions'] = [str(Path(log).absolute()) for log in config.impressions]
    columns = {kind: _settle(intake, self.logs[kind]) for kind, intake in intakes.items()}
    order_only = intakes['events'].order_only
    if order_only:
      sys.stderr.write('no timestamp column: events get the ordinal times 0, 1, 2, .. in file order\n')
    sides = load_sides(config, intakes['impressions'].names, self._shared, rejects) if config.impressions else []
    size = sum(Path(log).stat().st_size for logs in self.logs.values() for log in logs)
    parts = min(config.partitions or max(1, math.ceil(size / _PART_BYTES)), BUCKETS)
    self.rules = Rules(config, intakes, sides, columns, order_only, time_known(config, order_only), parts)

  def take_rejects(self) -> None:
    """Puts the malformed rows of the logs before those of the item and user files, and stops if they are too many.

    Raises:
      UserError: there are too many, or no good row.
    """
    for kind, text, read, reasons in map(json.loads, (self.folder / SUMMARY / REJECTED).open(encoding='utf-8')):
      self._rejects.absorb(kind, text, read, reasons)
    for kind, logs in self.logs.items():
      read, rejected = self._rejects.read[kind], self._rejects.rejected(kind)
      if not read:
        raise UserError(f'{", ".join(logs)} has no rows: expected at least one of the {kind}')
      if rejected == read:
        raise UserError(f'every row of the {kind} is malformed: see the reasons in {self._rejects.keep()}')
      self._rejects.check(kind)

  def describe(self) -> DatasetInfo:
    """The description of the finished data set."""
    summary = json.loads((self.folder / SUMMARY / TOLD).read_text(encoding='utf-8'))
    self._shared.actions.names, self._shared.surfaces.names = summary['actions'], summary['surfaces']
    files = {name: [] for name in (HISTORIES, REQUESTS, TABLES)}
    for kind, file in summary['files']:
      files[kind].append(DataFile(*file))
    tables = sorted(files[TABLES], key=lambda file: _TABLE_NAMES.index(file.name))
    sizes = {table.name: table.records for table in tables}
    assembled = Assembled(
      shards=tuple(sorted(files[HISTORIES], key=_name) + sorted(files[REQUESTS], key=_name)),
      tables=tuple(tables),
      users=sizes['users.parquet'],
      new_users=sizes['users.parquet'],
      items=sizes['items.parquet'],
      requests=sizes.get('requests.parquet', 0),
      content_width=summary['content_width'],
      time_range_ms=tuple(summary['times']),
      events=summary['events'],
      impressions=summary['impressions'],
    )
    rules, features = self.rules, features_of(summary['features'])
    ingested = Ingested(
      self._config, self._shared, None, None, rules.order_only, rules.time_known, features, rules.sides
    )
    return describe_dataset(Made(ingested, assembled, count_rows(assembled, self._rejects)))


def _name(file: DataFile) -> str:
  return file.name


def _settle(intake: EventIntake | ImpressionIntake, logs: Sequence[str]) -> dict[str, Any]:
  """Opens all files and reads the first rows, off which types, units and widths are read; returns the row's types."""
  for log in logs:
    intake.open(Path(log))
  for log in logs:
    wanted = intake.open(Path(log))
    for batch in read_batches(Path(log), wanted):
      if batch.frame.height:
        return dict(intake.canonical(batch, 0)[0].schema)
  raise UserError(f'{", ".join(logs)} has no rows: expected at least one of the {intake.kind}')


def _final(kind: str, limit: int, fixed: Sequence[str] | None, names: dict[str, list[str]]) -> tuple[str, ...]:
  vocabulary = Vocabulary.of(kind, limit, fixed)
  vocabulary.add(names.get(kind, []))
  return tuple(vocabulary.final()[0])
