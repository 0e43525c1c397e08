"""`prepare` on any Beam runner: the same files, byte for byte, from logs larger than one machine.

Log files are the units of reading, parts of the users those of writing, so give many files. The program that starts
the pipeline settles on the first rows what the whole log has in common, waits, and makes the data set appear.
"""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import polars as pl
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions

from pinfm_jax.data.beam.reading import (
  REJECTS,
  ROWS,
  SPARSE_VALUES,
  VOCABULARY,
  Intakes,
  ReadFile,
  merged_names,
  unpacked,
)
from pinfm_jax.data.beam.writing import (
  COUNTS,
  HISTORIES,
  ITEMS,
  REQUESTS,
  USERS,
  AssemblePart,
  Settled,
  WriteShard,
  by_time,
  range_edges,
  sampled_times,
  sorted_range,
  summed,
)
from pinfm_jax.data.events import MAX_ACTIONS, MAX_SURFACES, Vocabulary
from pinfm_jax.data.info import DataFile, DatasetInfo, Features
from pinfm_jax.data.preparation.assemble import Assembled, Ingested, number_of_shards, users_table
from pinfm_jax.data.preparation.config import PrepareConfig
from pinfm_jax.data.preparation.features import SPARSE, SparseCollector
from pinfm_jax.data.preparation.impressions import ImpressionIntake
from pinfm_jax.data.preparation.intake import EventIntake, Shared
from pinfm_jax.data.preparation.item_table import ItemTable
from pinfm_jax.data.preparation.reading import read_batches
from pinfm_jax.data.preparation.rejects import RejectLog
from pinfm_jax.data.preparation.spool import BUCKETS
from pinfm_jax.data.preparation.writing import atomic_directory, write_table
from pinfm_jax.data.prepare import (
  Made,
  check_mappings,
  count_rows,
  describe_dataset,
  load_sides,
  ordered_features,
  time_known,
)
from pinfm_jax.errors import UserError

_PART_BYTES = 64 << 20  # of log files a part
_SUMMARY = 'summary'
_KINDS = ('events', 'impressions')


def prepare_with_beam(config: PrepareConfig, runner: Sequence[str] = ()) -> DatasetInfo:
  """Prepares logs into the data set directory `config.out`, as `prepare` does.

  Args:
    config: files, columns and limits. The log files and `out` are paths that all workers share.
    runner: options of the Beam pipeline, for example --runner=FlinkRunner.

  Returns:
    What `dataset.json` says.

  Raises:
    UserError: see `prepare`.
  """
  config.check()
  check_mappings(config)
  out = Path(config.out).absolute()
  with atomic_directory(out, config.overwrite) as folder:
    (folder / _SUMMARY).mkdir()
    beside = out.with_name(f'{out.name}.rejected.jsonl')
    with RejectLog(folder / 'rejected.jsonl', beside, config.max_rejected_share) as rejects:
      job = _Job(config, folder, rejects)
      _run(job, runner)
      job.take_rejects()
      info = job.describe()
    shutil.rmtree(folder / _SUMMARY)
    info.write(folder / 'dataset.json')
  return info


def _run(job: '_Job', runner: Sequence[str]) -> None:
  options = PipelineOptions(list(runner))
  options.view_as(SetupOptions).save_main_session = False
  try:
    with beam.Pipeline(options=options) as pipeline:
      _build(pipeline, job)
  except UserError as error:
    raise UserError(str(error).partition(' [while running')[0]) from None


class _Job:
  """What the starting program knows: the settled intakes before the run, the summary after it."""

  def __init__(self, config: PrepareConfig, folder: Path, rejects: RejectLog):
    self.config, self.folder, self._rejects = config, folder, rejects
    self.shared = Shared.of(config)
    self.intakes: Intakes = {'events': EventIntake(config, self.shared)}
    self.logs = {'events': [str(log) for log in config.logs]}
    if config.impressions:
      self.intakes['impressions'] = ImpressionIntake(config, self.shared)
      self.logs['impressions'] = [str(log) for log in config.impressions]
    self.columns = {kind: _settle(intake, self.logs[kind]) for kind, intake in self.intakes.items()}
    self.order_only = self.intakes['events'].order_only
    if self.order_only:
      sys.stderr.write('no timestamp column: events get the ordinal times 0, 1, 2, .. in file order\n')
    self.sides = []
    if config.impressions:
      self.sides = load_sides(config, self.intakes['impressions'].names, self.shared, rejects)
    self.time_known = time_known(config, self.order_only)
    size = sum(Path(log).stat().st_size for logs in self.logs.values() for log in logs)
    self.parts = min(config.partitions or max(1, math.ceil(size / _PART_BYTES)), BUCKETS)

  def settled(self, names: dict[str, list[str]], values: dict[str, list[str]], rows: dict[str, int]) -> Settled:
    """What the whole log says, from what its files say."""
    impressions = self.intakes.get('impressions')
    features = Features()
    if impressions is not None:
      sparse = {}
      for name in impressions.names[SPARSE]:
        collector = SparseCollector(name)
        collector.add(pl.Series(values.get(name, []), dtype=pl.String))
        sparse[name] = collector.feature()
      features = ordered_features(self.config, sparse, impressions.widths, self.sides)
    shards = tuple(number_of_shards(self.config, rows.get(kind, 0)) for kind in _KINDS)
    actions = _final('action', MAX_ACTIONS, self.config.actions, names)
    return Settled(actions, _final('surface', MAX_SURFACES, self.config.surfaces, names), features, shards)

  def take_rejects(self) -> None:
    """Puts the malformed rows of all files before those of the item and user files, and stops if they are too many.

    Raises:
      UserError: there are too many, or no good row.
    """
    with open(self.folder / _SUMMARY / 'rejects.jsonl', encoding='utf-8') as lines:
      for kind, text, read, reasons in map(json.loads, lines):
        self._rejects.absorb(kind, text, read, reasons)
    for kind in self.intakes:
      if not self._rejects.read[kind]:
        raise UserError(f'{", ".join(self.logs[kind])} has no rows: expected at least one of the {kind}')
      if self._rejects.rejected(kind) == self._rejects.read[kind]:
        raise UserError(f'every row of the {kind} is malformed: see the reasons in {self._rejects.keep()}')
      self._rejects.check(kind)

  def describe(self) -> DatasetInfo:
    """The description of the finished data set."""
    summary = json.loads((self.folder / _SUMMARY / 'summary.json').read_text(encoding='utf-8'))
    self.shared.actions.names, self.shared.surfaces.names = summary['actions'], summary['surfaces']
    files = {name: [DataFile(*file) for file in sorted(summary['files'].get(name, []))] for name in _FILES}
    tables = [files[name][0] for name in (USERS, ITEMS, 'requests_table') if files[name]]
    counts = {table.name.partition('.')[0]: table.records for table in tables}
    assembled = Assembled(
      shards=(*files[HISTORIES], *files[REQUESTS]),
      tables=tuple(tables),
      users=counts['users'],
      new_users=counts['users'],
      items=counts['items'],
      requests=counts.get('requests', 0),
      content_width=summary['content_width'],
      time_range_ms=tuple(summary['times']),
      events=summary['events'],
      impressions=summary['impressions'],
    )
    features = Features()
    if self.config.impressions:
      features = DatasetInfo.features_of(summary['features'])
    ingested = Ingested(
      self.config, self.shared, None, None, self.order_only, self.time_known, features, self.sides
    )  # fmt: skip
    return describe_dataset(Made(ingested, assembled, count_rows(assembled, self._rejects)))


_FILES = (HISTORIES, REQUESTS, USERS, ITEMS, 'requests_table')


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
