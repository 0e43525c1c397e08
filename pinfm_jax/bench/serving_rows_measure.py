"""The process that `bench.serving_rows` measures: opens a bundle, looks rows up, scores; prints one line of JSON."""

import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pinfm_jax.bench.serving_rows import RowSizes
from pinfm_jax.bench.timing import interleave, peak_memory_gb
from pinfm_jax.model.hashing import hash_rows, key_words
from pinfm_jax.serve.bundle import TABLES, load_bundle
from pinfm_jax.serve.manifest import TableLayout
from pinfm_jax.serve.rows.mapped import MappedRows
from pinfm_jax.serve.scorer import Scorer


def measure(bundle: Path, sizes: RowSizes) -> dict[str, Any]:
  """All measurements; see `bench.serving_rows._figures`."""
  tables, started = bundle / TABLES, _age_s()
  drop_from_cache(tables)
  begin = time.perf_counter()
  opened = load_bundle(bundle)
  open_s = time.perf_counter() - begin
  layout = opened.manifest.tables
  drop_from_cache(tables)
  memory = _memory(opened.rows, layout, _words(1, 4 * sizes.cold_ids, 1)[0])
  del opened
  score_s, peak = _score(bundle, sizes), int(peak_memory_gb() * 1e9)  # before the plain gather adds its own memory
  return {
    'open_s': open_s,
    'start_s': started + open_s,
    'memory': memory,
    'cold': _cold(tables, layout, sizes),
    'warm': _warm(tables, layout, sizes),
    'score_s': score_s,
    'peak': peak,
  }


def drop_from_cache(path: Path) -> None:
  """Drops a file's pages from the page cache; those that a process has mapped stay."""
  with open(path, 'rb') as file:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _memory(rows: MappedRows, layout: TableLayout, words_N2: np.ndarray) -> dict[str, int]:
  """What looking up rows adds to the process's file-backed memory."""
  before = _status('RssFile')
  rows.rows(words_N2)
  return {
    'rows': len(np.unique(_numbers(words_N2, layout))),
    'file': _status('RssFile') - before,
    'anonymous': _status('RssAnon'),
    'page': mmap.PAGESIZE,
  }


def _cold(path: Path, layout: TableLayout, sizes: RowSizes) -> dict[str, Any]:
  """Rows that are on the disk alone: other ids each time, the page cache dropped before."""
  make = {'own': _own, 'plain': _plain, 'advised': partial(_plain, advise=True)}
  found: dict[str, Any] = {'rows': 0} | {name: [] for name in make} | {f'{name}_bytes': 0 for name in make}
  for words_N2 in _words(max(3, sizes.rounds // 4), len(make) * sizes.cold_ids, 2):
    found['rows'] += sizes.cold_ids * layout.sub_tables
    for name, part_N2 in zip(make, np.split(words_N2, len(make)), strict=True):
      drop_from_cache(path)
      run = make[name](path, layout, [part_N2])
      before, begin = _read_bytes(), time.perf_counter()
      run(0)
      found[name].append(time.perf_counter() - begin)
      found[f'{name}_bytes'] += _read_bytes() - before
      del run  # unmaps the file, so that its pages can be dropped
  return found


def _warm(path: Path, layout: TableLayout, sizes: RowSizes) -> dict[str, Any]:
  """Rows in the page cache: both go through the same batches, which the untimed rounds have brought there."""
  words = _words(sizes.batches, sizes.warm_ids, 3)
  runs = {'own': _own(path, layout, words), 'plain': _plain(path, layout, words)}
  return {name: list(times) for name, times in interleave(runs, sizes.rounds, warmup=sizes.batches).items()}


def _own(path: Path, layout: TableLayout, words: Any) -> Callable[[int], np.ndarray]:
  rows = MappedRows(path, layout)
  return lambda number: rows.rows(words[number % len(words)])


def _plain(path: Path, layout: TableLayout, words: Any, advise: bool = False) -> Callable[[int], np.ndarray]:
  with open(path, 'rb') as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  if advise:
    mapped.madvise(mmap.MADV_RANDOM)
  packed = np.frombuffer(mapped, np.uint8).reshape(layout.sub_tables * layout.rows, layout.row_bytes)
  numbers = [_numbers(words_N2, layout) for words_N2 in words]
  return lambda number: packed[numbers[number % len(numbers)]]


def _score(bundle: Path, sizes: RowSizes) -> float:
  """Seconds of a batch of requests through the scorer, the second time."""
  rng = np.random.default_rng(4)
  requests = [
    {
      'request_id': f'r{number}',
      'history': [
        {'item_id': int(item), 'surface': 'feed', 'actions': ['save']} for item in rng.integers(0, 10**9, 32)
      ],
      'candidates': [{'item_id': int(item)} for item in rng.integers(0, 10**9, 256)],
    }
    for number in range(sizes.requests)
  ]
  scorer = Scorer.load(bundle)
  list(scorer.score(requests))
  begin = time.perf_counter()
  results = list(scorer.score(requests))
  elapsed = time.perf_counter() - begin
  scores = [score['save'] for result in results for score in result['scores']]
  if len(scores) != 256 * sizes.requests or not all(0 < score < 1 for score in scores) or len(set(scores)) < 9:
    raise RuntimeError('the bundle does not score')
  return elapsed


def _words(batches: int, ids: int, seed: int) -> list[np.ndarray]:
  """Different random ids: [ids, 2] words of each batch."""
  rng = np.random.default_rng(seed)
  return [key_words(rng.integers(0, 2**64, ids, np.uint64)) for _ in range(batches)]


def _numbers(words_N2: np.ndarray, layout: TableLayout) -> np.ndarray:
  return hash_rows(words_N2, layout.sub_tables, layout.rows, layout.hash_seed)


def _status(name: str) -> int:
  """Bytes of a kind of this process's memory, of /proc/self/status."""
  with open('/proc/self/status', encoding='utf-8') as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f'{name}:'))


def _read_bytes() -> int:
  """What this process has caused to be read from disks."""
  with open('/proc/self/io', encoding='utf-8') as file:
    return next(int(line.split()[1]) for line in file if line.startswith('read_bytes'))


def _age_s() -> float:
  """Seconds since this process was started."""
  with open('/proc/self/stat', encoding='utf-8') as file:
    ticks = int(file.read().rsplit(')', 1)[1].split()[19])
  with open('/proc/uptime', encoding='utf-8') as file:
    return float(file.read().split()[0]) - ticks / os.sysconf('SC_CLK_TCK')


if __name__ == '__main__':
  print(json.dumps(measure(Path(sys.argv[1]), RowSizes(**json.loads(sys.argv[2])))))
