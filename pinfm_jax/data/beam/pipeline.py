"""`prepare` on any Beam runner: the same files, byte for byte, from logs larger than one machine.

Log files are the units of reading, parts of the users those of writing, so give many files. The program that starts
the pipeline settles on the first rows what the whole log has in common, waits, and makes the data set appear.
"""

import itertools
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
import polars as pl
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions
from apache_beam.pvalue import AsSingleton
from apache_beam.transforms.combiners import ToList

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
from pinfm_jax.data.info import DataFile, DatasetInfo, Features, TimeKnown, features_of
from pinfm_jax.data.preparation.assemble import Assembled, Ingested, number_of_shards, users_table
from pinfm_jax.data.preparation.config import PrepareConfig
from pinfm_jax.data.preparation.features import SPARSE, SideTable, SparseCollector
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
from pinfm_jax.workdir import write_text

_PART_BYTES = 64 << 20  # of log files a part
_SUMMARY, _TOLD, _REJECTED = 'summary', 'summary.json', 'rejects.jsonl'
_TABLES = 'tables'
_TABLE_NAMES = ('users.parquet', 'items.parquet', 'requests.parquet')
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


@dataclass(frozen=True)
class _Rules:
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
    shards = tuple(number_of_shards(self.config, rows.get(kind, 0)) for kind in _KINDS)
    actions = _final('action', MAX_ACTIONS, self.config.actions, names)
    return Settled(actions, _final('surface', MAX_SURFACES, self.config.surfaces, names), features, shards)


class _Job:
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
    self.rules = _Rules(config, intakes, sides, columns, order_only, time_known(config, order_only), parts)

  def take_rejects(self) -> None:
    """Puts the malformed rows of the logs before those of the item and user files, and stops if they are too many.

    Raises:
      UserError: there are too many, or no good row.
    """
    for kind, text, read, reasons in map(json.loads, (self.folder / _SUMMARY / _REJECTED).open(encoding='utf-8')):
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
    summary = json.loads((self.folder / _SUMMARY / _TOLD).read_text(encoding='utf-8'))
    self._shared.actions.names, self._shared.surfaces.names = summary['actions'], summary['surfaces']
    files = {name: [] for name in (HISTORIES, REQUESTS, _TABLES)}
    for kind, file in summary['files']:
      files[kind].append(DataFile(*file))
    tables = sorted(files[_TABLES], key=lambda file: _TABLE_NAMES.index(file.name))
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


def _build(pipeline: beam.Pipeline, job: _Job) -> None:
  rules, folder = job.rules, str(job.folder)
  files = [(kind, number, path) for kind, paths in job.logs.items() for number, path in enumerate(paths)]
  read = (
    pipeline
    | 'files' >> beam.Create(files)
    | 'spread files' >> beam.Reshuffle()
    | 'read' >> beam.ParDo(ReadFile(rules.intakes, rules.parts)).with_outputs(
      VOCABULARY, SPARSE_VALUES, REJECTS, ROWS, main='good'
    )
  )  # fmt: skip
  names = read[VOCABULARY] | 'all names' >> ToList() | 'distinct names' >> beam.Map(merged_names)
  values = read[SPARSE_VALUES] | 'all values' >> ToList() | 'distinct values' >> beam.Map(merged_names)
  rows = read[ROWS] | 'count rows' >> beam.CombinePerKey(sum) | 'counts' >> beam.combiners.ToDict()
  once = pipeline | 'once' >> beam.Create([None])
  settled = once | 'settle' >> beam.Map(rules.settled, AsSingleton(names), AsSingleton(values), AsSingleton(rows))
  sides = pipeline | 'item and user files' >> beam.Create([rules.sides])
  read[REJECTS] | 'all rejects' >> ToList() | 'write rejects' >> beam.Map(_write_rejects, folder)
  assemble = AssemblePart(rules.config, rules.order_only, rules.time_known, rules.columns)
  parts = (
    read['good']
    | 'group parts' >> beam.GroupByKey()
    | 'assemble' >> beam.ParDo(assemble, AsSingleton(settled), AsSingleton(sides)).with_outputs(
      HISTORIES, USERS, ITEMS, REQUESTS, COUNTS
    )
  )  # fmt: skip
  users = parts[USERS] | 'all users' >> ToList()
  items = parts[ITEMS] | 'all items' >> ToList() | 'write items' >> beam.FlatMap(_write_items, folder, rules)
  written = [
    _write_shards(parts[HISTORIES], settled, folder, HISTORIES, 0),
    users | 'write users' >> beam.FlatMap(_write_users, folder),
    items | 'file of items' >> beam.Map(lambda pair: pair[0]),
  ]
  if rules.config.impressions:
    first_rows = users | 'first rows' >> beam.Map(_first_rows)
    written += _sorted_requests(parts[REQUESTS], first_rows, settled, folder, rules.parts)
  files = written | 'all files' >> beam.Flatten() | 'list of files' >> ToList()
  counts = parts[COUNTS] | 'all counts' >> ToList() | 'sum counts' >> beam.Map(summed)
  width = items | 'content width' >> beam.Map(lambda pair: pair[1]) | 'widths' >> ToList()
  once | 'summarise' >> beam.Map(
    _write_summary, folder, AsSingleton(settled), AsSingleton(counts), AsSingleton(files), AsSingleton(width)
  )


def _sorted_requests(
  requests: beam.PCollection, first_rows: beam.PCollection, settled: beam.PCollection, folder: str, ranges: int
) -> list[beam.PCollection]:
  """Sorts the requests by ranges of time that no worker need hold all of, and writes them."""
  edges = (
    requests
    | 'sample times' >> beam.FlatMap(sampled_times)
    | 'all samples' >> ToList()
    | 'ranges' >> beam.Map(range_edges, ranges)
  )
  ranged = requests | 'by time' >> beam.FlatMap(by_time, AsSingleton(edges), AsSingleton(first_rows))
  sizes = ranged | 'size of each' >> beam.Map(lambda e: (e[0], len(e[1][1]))) | 'sizes' >> beam.CombinePerKey(sum)
  sizes = sizes | 'all sizes' >> beam.combiners.ToDict()
  before, total = sizes | 'before' >> beam.Map(_before), sizes | 'total' >> beam.Map(lambda all: sum(all.values()))
  shards = settled | 'request shards' >> beam.Map(lambda known: known.shards[1])
  done = (
    ranged
    | 'group ranges' >> beam.GroupByKey()
    | 'sort' >> beam.FlatMap(sorted_range, AsSingleton(before), AsSingleton(shards), AsSingleton(total))
  )
  records = done | 'records' >> beam.Filter(lambda e: e[0] == 'records') | 'of shard' >> beam.Values()
  tables = done | 'tables' >> beam.Filter(lambda e: e[0] == 'table') | 'of range' >> beam.Values()
  return [
    _write_shards(records, settled, folder, REQUESTS, 1),
    tables | 'all tables' >> ToList() | 'write requests' >> beam.FlatMap(_write_requests, folder),
  ]


def _write_shards(
  records: beam.PCollection, settled: beam.PCollection, folder: str, kind: str, place: int
) -> beam.PCollection:
  count = settled | f'shards of {kind}' >> beam.Map(lambda known: known.shards[place])
  # A shard without records is a file too.
  empty = count | f'every shard of {kind}' >> beam.FlatMap(lambda n: [(shard, (-1, [])) for shard in range(n)])
  return (
    [records, empty]
    | f'with empty {kind}' >> beam.Flatten()
    | f'group {kind}' >> beam.GroupByKey()
    | f'write shards of {kind}' >> beam.ParDo(WriteShard(folder, kind), AsSingleton(count))
  )


def _first_rows(users: list[tuple[int, bytes]]) -> dict[int, int]:
  """Row of the first user of each part."""
  return _before({number: unpacked(content).height for number, content in users})


def _before(sizes: dict[int, int]) -> dict[int, int]:
  """Sum of the sizes of all smaller numbers."""
  numbers = sorted(sizes)
  return dict(zip(numbers, itertools.accumulate((sizes[number] for number in numbers), initial=0), strict=False))


def _write_users(users: list[tuple[int, bytes]], folder: str) -> Iterator[tuple[str, list]]:
  if users:
    yield _table(users_table([unpacked(content) for _, content in sorted(users)]), folder, 'users.parquet')


def _write_items(items: list[bytes], folder: str, rules: _Rules) -> Iterator[tuple[tuple[str, list], int]]:
  if items:
    table = ItemTable()
    for content in items:
      table.add(unpacked(content))
    id_type = rules.intakes['events'].shared.id_type['item']
    frame, width = table.finish(rules.config, id_type, rules.time_known, rules.sides)
    yield _table(frame, folder, 'items.parquet'), width


def _write_requests(tables: list[tuple[int, bytes]], folder: str) -> Iterator[tuple[str, list]]:
  if tables:
    frames = [unpacked(content) for _, content in sorted(tables)]
    yield _table(pl.concat(frames), folder, 'requests.parquet')


def _table(frame: pl.DataFrame, folder: str, name: str) -> tuple[str, list]:
  with tempfile.TemporaryDirectory(prefix='.table-', dir=folder) as scratch:
    file = write_table(frame.rechunk(), Path(scratch) / name)
    (Path(scratch) / name).replace(Path(folder) / name)
  return _TABLES, [file.name, file.records, file.bytes, file.sha256]


def _write_rejects(rejects: list[tuple], folder: str) -> None:
  ordered = sorted(rejects, key=lambda entry: (_KINDS.index(entry[0]), entry[1]))
  lines = (json.dumps([kind, text, read, reasons]) + '\n' for kind, _, text, read, reasons in ordered)
  write_text(Path(folder) / _SUMMARY / _REJECTED, ''.join(lines))


def _write_summary(
  _: None, folder: str, settled: Settled, counts: dict[str, Any], files: list[tuple[str, list]], widths: list[int]
) -> None:
  document = {'actions': settled.actions, 'surfaces': settled.surfaces, 'features': asdict(settled.features)}
  document |= {**counts, 'files': files, 'content_width': max(widths, default=0)}
  write_text(Path(folder) / _SUMMARY / _TOLD, json.dumps(document))


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
