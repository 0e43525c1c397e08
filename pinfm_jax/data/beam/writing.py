"""Second half of the Beam preparation: parts of users become records, which are numbered, sorted and written."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import polars as pl

from pinfm_jax.data.beam.reading import packed, unpacked
from pinfm_jax.data.events import MAX_ACTIONS
from pinfm_jax.data.info import Features, TimeKnown
from pinfm_jax.data.preparation.assemble import last_hashes, requests_table
from pinfm_jax.data.preparation.config import PrepareConfig
from pinfm_jax.data.preparation.features import SideTable
from pinfm_jax.data.preparation.partition import event_part, history_ends, permute_bits, request_part
from pinfm_jax.data.preparation.spool import mix
from pinfm_jax.data.preparation.writing import ShardWriter
from pinfm_jax.data.records import encode_histories, encode_requests, with_user_row

HISTORIES, USERS, ITEMS, REQUESTS, COUNTS = 'histories', 'users', 'items', 'requests', 'counts'
_SAMPLES = 64
_CHUNK = 1024  # records of one element


@dataclass(frozen=True)
class Settled:
  """What the whole log says, known when all files are read.

  Attributes:
    actions, surfaces: names in the order of their stored codes.
    features: the candidates' features.
    shards: of the histories, of the requests.
  """

  actions: tuple[str, ...]
  surfaces: tuple[str, ...]
  features: Features
  shards: tuple[int, int]


class AssemblePart(beam.DoFn):
  """(part, canonical rows) -> everything that is stored of its users, users numbered from 0 in every part.

  Outputs:
    HISTORIES: (shard, ((part, place), records)).
    USERS: (part, Arrow bytes of the table of users).
    ITEMS: Arrow bytes for `ItemTable`.
    REQUESTS: (part, (Arrow bytes of the table of requests, records)), in no order.
    COUNTS: what became of the rows, and the first and last times.
  """

  def __init__(self, config: PrepareConfig, order_only: bool, time_known: TimeKnown, columns: Mapping[str, Any]):
    """Takes what is the same for all parts; `columns` are the types of the canonical rows by kind."""
    self._config, self._order_only, self._time_known, self._columns = config, order_only, time_known, columns

  def process(self, element: tuple[int, Iterable[tuple]], settled: Settled, sides: list[SideTable]) -> Iterator[Any]:
    """Merges, caps and encodes one part."""
    number, frames = element[0], {'events': [], 'impressions': []}
    for kind, content, actions, surfaces in element[1]:
      frames[kind].append(_recoded(unpacked(content), actions, surfaces, settled))
    shown, requests = self._rows('impressions', frames), None
    same = np.arange(len(settled.surfaces), dtype=np.uint16)
    if shown.height:
      truths = list(self._config.reference_columns)
      requests = request_part(shown, settled.features, self._config.labels, truths, sides, same)
    rows, users = self._rows('events', frames), requests.users if requests else None
    part = event_part(rows, users, self._order_only, self._config.cap, range(MAX_ACTIONS), same)
    shard = np.searchsorted(last_hashes(settled.shards[0]), part.users['mixed'].to_numpy())
    for place, chosen, records in _chunks(shard, encode_histories(part.events, part.offsets)):
      yield beam.pvalue.TaggedOutput(HISTORIES, (chosen, ((number, place), records)))
    yield beam.pvalue.TaggedOutput(USERS, (number, packed(part.users.drop('mixed'))))
    yield beam.pvalue.TaggedOutput(ITEMS, packed(part.items))
    fate = {'kept': len(part.events), 'merged': part.merged, 'duplicates': part.duplicates, 'cut': part.cut}
    times = [part.events.timestamp] if self._time_known.histories else []
    yield beam.pvalue.TaggedOutput(COUNTS, ('events', fate, _range(times)))
    if requests is None:
      return
    place, ends = history_ends(part, requests)
    records = list(encode_requests(requests.candidates, place, ends, requests.offsets))
    table = requests_table(requests, self._config.request_by, place)
    yield beam.pvalue.TaggedOutput(REQUESTS, (number, (packed(table), records)))
    yield beam.pvalue.TaggedOutput(ITEMS, packed(requests.items.with_columns(first_shown='first_seen')))
    fate = {'kept': len(requests.candidates), 'merged': requests.merged, 'duplicates': requests.duplicates}
    times = [requests.candidates.timestamp] if self._time_known.impressions else []
    yield beam.pvalue.TaggedOutput(COUNTS, ('impressions', fate, _range(times)))

  def _rows(self, kind: str, frames: Mapping[str, list[pl.DataFrame]]) -> pl.DataFrame:
    frame = pl.concat(frames[kind]) if frames[kind] else pl.DataFrame(schema=self._columns.get(kind, {}))
    if 'user_key' not in frame.columns:
      return frame
    return frame.with_columns(pl.Series('mixed', mix(frame['user_key'].to_numpy()), pl.UInt64))


def _recoded(frame: pl.DataFrame, actions: tuple, surfaces: tuple, settled: Settled) -> pl.DataFrame:
  """The rows with stored codes instead of the places in a reader's own names."""
  surface = np.array([settled.surfaces.index(name) for name in surfaces], np.uint32)[frame['surface'].to_numpy()]
  changed = [pl.Series('surface', surface, pl.UInt32)]
  if 'actions' in frame.columns:
    place = [settled.actions.index(name) for name in actions]
    changed.append(pl.Series('actions', permute_bits(frame['actions'].to_numpy(), place), pl.UInt32))
  return frame.with_columns(changed)


def _chunks(shard: np.ndarray, records: Iterator[bytes]) -> Iterator[tuple[int, int, list[bytes]]]:
  """(place, shard, records) of consecutive records of one shard."""
  place, waiting = 0, []
  for index, record in enumerate(records):
    if waiting and (len(waiting) == _CHUNK or shard[index] != shard[place]):
      yield place, int(shard[place]), waiting
      place, waiting = index, []
    waiting.append(record)
  if waiting:
    yield place, int(shard[place]), waiting


def _range(times: list[np.ndarray]) -> tuple[int, int] | None:
  return (int(times[0].min()), int(times[0].max())) if times and len(times[0]) else None


def sampled_times(element: tuple[int, tuple[bytes, list[bytes]]]) -> list[int]:
  """Evenly spaced times of a part's requests: users are in parts by hash, so all parts' times are alike."""
  times = np.sort(unpacked(element[1][0])['timestamp'].to_numpy())
  return times[np.linspace(0, len(times) - 1, min(len(times), _SAMPLES)).astype(int)].tolist()


def range_edges(samples: Iterable[int], ranges: int) -> list[int]:
  """Times at which the ranges begin in which requests are sorted, but for the first range."""
  ordered = sorted(samples)
  return sorted({ordered[len(ordered) * i // ranges] for i in range(1, ranges)}) if ordered else []


def by_time(
  element: tuple[int, tuple[bytes, list[bytes]]], edges: list[int], first_rows: Mapping[int, int]
) -> Iterator[tuple[int, tuple[bytes, list[bytes]]]]:
  """Gives a part's requests the rows of their users, and splits them by ranges of time."""
  number, (content, records) = element
  table = unpacked(content).with_columns((pl.col('user_row') + first_rows[number]).cast(pl.UInt32))
  rows, place = table['user_row'].to_list(), np.searchsorted(edges, table['timestamp'].to_numpy(), side='right')
  for chosen in np.unique(place).tolist():
    index = np.flatnonzero(place == chosen)
    yield chosen, (packed(table[index]), [with_user_row(records[i], rows[i]) for i in index.tolist()])


def sorted_range(
  element: tuple[int, Iterable[tuple[bytes, list[bytes]]]], before: Mapping[int, int], shards: int, total: int
) -> Iterator[tuple[str, Any]]:
  """Puts a range's requests in the order of their first impressions.

  Args:
    element: (range, requests).
    before: how many requests all earlier ranges hold.
    shards: record files of requests.
    total: all requests.

  Yields:
    ('records', (shard, (first rank, records))) and ('table', (range, Arrow bytes)).
  """
  number, contents = element
  tables, records = [], []
  for content, more in contents:
    tables.append(unpacked(content))
    records += more
  table = pl.concat(tables)
  order = np.lexsort((table['order'].to_numpy(), table['timestamp'].to_numpy()))
  rank = before[number] + np.arange(len(order))
  ends = np.array([total * (shard + 1) // shards for shard in range(shards)])
  shard = np.searchsorted(ends, rank, side='right')
  for place, chosen, chunk in _chunks(shard, (records[i] for i in order.tolist())):
    yield 'records', (chosen, (int(rank[place]), chunk))
  yield 'table', (number, packed(table[order].drop('order')))


class WriteShard(beam.DoFn):
  """(shard, chunks of records that begin with their place) -> a description of the file that now stands in `folder`."""

  def __init__(self, folder: str, kind: str):
    """`folder` is one that all workers share."""
    self._folder, self._kind = folder, kind

  def process(self, element: tuple[int, Iterable[tuple]], count: int) -> Iterator[tuple[str, list]]:
    """Writes shard `element[0]` of `count`."""
    number, chunks = element
    with tempfile.TemporaryDirectory(prefix='.shard-', dir=self._folder) as scratch:
      writer = ShardWriter(Path(scratch), self._kind, count, only=number)
      for _, records in sorted((chunk for chunk in chunks if chunk[1]), key=lambda chunk: chunk[0]):
        writer.write(number, records)
      (file,) = writer.close()
      (Path(scratch) / file.name).replace(Path(self._folder) / file.name)
    yield self._kind, [file.name, file.records, file.bytes, file.sha256]


def summed(counts: Iterable[tuple[str, Mapping[str, int], tuple[int, int] | None]]) -> dict[str, Any]:
  """The parts' accounts together, as JSON values."""
  total, times = {'events': Counter(), 'impressions': Counter()}, []
  for kind, fate, span in counts:
    total[kind].update(fate)
    times += span or ()
  return {**total, 'times': [min(times), max(times)] if times else [0, 0]}
