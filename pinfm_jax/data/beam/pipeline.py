"""`prepare` on any Beam runner: the same files, byte for byte, from logs larger than one machine.

Log files are the units of reading, parts of the users those of writing, so give many files. The program that starts
the pipeline settles on the first rows what the whole log has in common, waits, and makes the data set appear.
"""

import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import apache_beam as beam
import polars as pl
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions
from apache_beam.pvalue import AsSingleton
from apache_beam.transforms.combiners import ToList

from pinfm_jax.data.beam.job import KINDS, REJECTED, SUMMARY, TABLES, TOLD, Job, Rules
from pinfm_jax.data.beam.reading import (
  REJECTS,
  ROWS,
  SPARSE_VALUES,
  VOCABULARY,
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
from pinfm_jax.data.info import DatasetInfo
from pinfm_jax.data.preparation.assemble import users_table
from pinfm_jax.data.preparation.config import PrepareConfig
from pinfm_jax.data.preparation.item_table import ItemTable
from pinfm_jax.data.preparation.rejects import RejectLog
from pinfm_jax.data.preparation.writing import write_table
from pinfm_jax.data.prepare import check_mappings
from pinfm_jax.errors import UserError
from pinfm_jax.files import complete_directory
from pinfm_jax.workdir import write_text

_TOLD_BY_WORKER = re.compile(r'pinfm_jax\.errors\.UserError: (.*?) \[while running')


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
  with complete_directory(out, config.overwrite, 'dataset.json', 'prepared data set') as folder:
    (folder / SUMMARY).mkdir()
    beside = out.with_name(f'{out.name}.rejected.jsonl')
    with RejectLog(folder / 'rejected.jsonl', beside, config.max_rejected_share) as rejects:
      job = Job(config, folder, rejects)
      _run(job, runner)
      job.take_rejects()
      info = job.describe()
    shutil.rmtree(folder / SUMMARY)
    info.write(folder / 'dataset.json')
  return info


def _run(job: Job, runner: Sequence[str]) -> None:
  options = PipelineOptions(list(runner))
  options.view_as(SetupOptions).save_main_session = False
  try:
    with beam.Pipeline(options=options) as pipeline:
      _build(pipeline, job)
  except Exception as error:
    # A runner adds where it happened; one with workers of its own makes the worker's traceback a text.
    told = _TOLD_BY_WORKER.search(str(error))
    if told is None and not isinstance(error, UserError):
      raise
    raise UserError(told[1] if told else str(error).partition(' [while running')[0]) from None


def _build(pipeline: beam.Pipeline, job: Job) -> None:
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


def _write_items(items: list[bytes], folder: str, rules: Rules) -> Iterator[tuple[tuple[str, list], int]]:
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
  return TABLES, [file.name, file.records, file.bytes, file.sha256]


def _write_rejects(rejects: list[tuple], folder: str) -> None:
  ordered = sorted(rejects, key=lambda entry: (KINDS.index(entry[0]), entry[1]))
  lines = (json.dumps([kind, text, read, reasons]) + '\n' for kind, _, text, read, reasons in ordered)
  write_text(Path(folder) / SUMMARY / REJECTED, ''.join(lines))


def _write_summary(
  _: None, folder: str, settled: Settled, counts: dict[str, Any], files: list[tuple[str, list]], widths: list[int]
) -> None:
  document = {'actions': settled.actions, 'surfaces': settled.surfaces, 'features': asdict(settled.features)}
  document |= {**counts, 'files': files, 'content_width': max(widths, default=0)}
  write_text(Path(folder) / SUMMARY / TOLD, json.dumps(document))
