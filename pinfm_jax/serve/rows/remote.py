"""Table rows from row servers (`pinfm serve-rows`): the accelerator's host then needs no tables.

The servers may each have a part of the rows, and several may have the same one. A batch's rows travel once each; its
requests go to all parts in parallel, to the replicas of a part in turn. A server that fails is left alone, and asked
in the background until it answers again; its requests go to the other replicas.
"""

import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import hash_rows
from pinfm_jax.serve.manifest import Manifest, TableLayout
from pinfm_jax.serve.rows.connection import Replica, RequestError
from pinfm_jax.serve.rows.wire import ServedRows

_TABLES = 'tables.bin'
_BACKOFF_S = 0.02  # before a server is asked a second time, doubled each time


@dataclass(frozen=True)
class RowLimits:
  """How long a lookup may take.

  Attributes:
    timeout_s: of one request to one server.
    attempts: requests for the same rows before the lookup fails; every replica is asked at least once.
    recheck_s: between two questions whether a failed server answers again.
  """

  timeout_s: float = 2.0
  attempts: int = 3
  recheck_s: float = 2.0

  def __post_init__(self):
    if not (self.timeout_s > 0 and self.recheck_s > 0 and self.attempts >= 1):
      raise UserError(f'got {self}, expected times above 0 and at least one attempt')


class RowsUnavailableError(UserError):
  """No server answered for some rows; the same lookup may succeed later."""


class RemoteRows:
  """A `RowSource` over the network; several threads may use it. Close it, or use it as a context manager."""

  def __init__(self, urls: Sequence[str], tables: TableLayout, sha256: str, limits: RowLimits = RowLimits()):
    """Asks every server what it has.

    Args:
      urls: of the servers, for example 'http://10.0.0.7:9000'.
      tables: layout of the tables that the model was trained with.
      sha256: of their tables.bin.
      limits: how long a lookup may take.

    Raises:
      UserError: a server has other tables, the servers that answer have not all rows, or no URL.
    """
    if not urls:
      raise UserError('got no row servers, expected their URLs: http://HOST:PORT,http://HOST:PORT')
    self.layout, self._sha256, self._limits = tables, sha256, limits
    self._replicas = [Replica(url) for url in dict.fromkeys(urls)]
    self._lock, self._closed, self._watch = threading.Lock(), threading.Event(), None
    self._turn = 0
    # Two requests a server, so that one is under way while another's answer is read.
    self._pool = ThreadPoolExecutor(2 * len(self._replicas), 'rows')
    try:
      errors = [error for error in self._pool.map(self._greet, self._replicas) if error]
      self._check_complete(errors)
    except UserError:
      self.close()
      raise
    if errors:
      self._start_watch()

  @classmethod
  def connect(cls, bundle: str | Path, urls: Sequence[str], limits: RowLimits = RowLimits()) -> 'RemoteRows':
    """Connects to the servers of a bundle's rows; the bundle needs no tables.bin here.

    Raises:
      UserError: no bundle there, one without tables, or see `__init__`.
    """
    manifest = Manifest.read(Path(bundle))
    if manifest.tables is None:
      raise UserError(f'{bundle} has no tables (its ranker is without PinFM): it needs no row servers')
    sha256 = next(entry.sha256 for entry in manifest.files if entry.name == _TABLES)
    return cls(urls, manifest.tables, sha256, limits)

  def rows(self, words: np.ndarray) -> np.ndarray:
    """uint32 id words [..., 2] -> packed uint8 rows [..., S, row_bytes].

    Raises:
      RowsUnavailableError: no server answered for some of them.
    """
    layout, ids_N2 = self.layout, np.ascontiguousarray(words).reshape(-1, 2)
    shape = (*words.shape[:-1], layout.sub_tables, layout.row_bytes)
    # One 64-bit number an id: equal words, equal numbers, in either byte order.
    distinct_V, id_N = np.unique(ids_N2.view(np.uint64)[:, 0], return_inverse=True)
    numbers_VS = hash_rows(distinct_V.view(np.uint32).reshape(-1, 2), layout.sub_tables, layout.rows, layout.hash_seed)
    wanted_K, row_VS = np.unique(numbers_VS, return_inverse=True)
    packed = self._fetch(wanted_K)
    return packed.take(row_VS.reshape(numbers_VS.shape), axis=0).take(id_N, axis=0).reshape(shape)

  def close(self) -> None:
    """Ends the threads and the connections."""
    self._closed.set()
    self._pool.shutdown(wait=False, cancel_futures=True)
    for replica in self._replicas:
      replica.close()

  def __enter__(self) -> 'RemoteRows':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _fetch(self, numbers_K: np.ndarray) -> np.ndarray:
    """The rows of ascending numbers."""
    pieces = []
    for first, last, replicas in self._parts():
      low, high = np.searchsorted(numbers_K, [first, last])
      most = min(replica.served.most_rows for replica in replicas)
      pieces += [(replicas, numbers_K[start : min(start + most, high)]) for start in range(low, high, most)]
    if len(pieces) < 2:
      parts = [self._ask(*piece) for piece in pieces]
    else:
      futures = [self._pool.submit(self._ask, *piece) for piece in pieces]
      parts = [future.result() for future in futures]
    return np.concatenate([np.zeros((0, self.layout.row_bytes), np.uint8), *parts])

  def _ask(self, replicas: list[Replica], numbers: np.ndarray) -> np.ndarray:
    """The rows of some numbers, from whichever replica gives them."""
    body, size = numbers.astype('<u4').tobytes(), len(numbers) * self.layout.row_bytes
    tries, errors = max(self._limits.attempts, len(replicas)), {}
    for number, replica in enumerate(islice(cycle(self._in_turn(replicas)), tries)):
      if number >= len(replicas) and self._closed.wait(_BACKOFF_S * 2 ** (number - len(replicas))):
        break
      try:
        packed = replica.rows(body, self._sha256, size, self._limits.timeout_s)
      except RequestError as error:
        errors[replica.url] = error
        replica.up = False
        self._start_watch()
      else:
        return np.frombuffer(packed, np.uint8).reshape(len(numbers), self.layout.row_bytes)
    said = '; '.join(f'{url}: {error}' for url, error in errors.items())
    raise RowsUnavailableError(
      f'no row server gave the rows {numbers[0]} to {numbers[-1]} ({said or "closed"}): '
      'start one again with `pinfm serve-rows`'
    )

  def _in_turn(self, replicas: list[Replica]) -> list[Replica]:
    """All of them, another one first each time, those that failed last."""
    with self._lock:
      self._turn += 1
      turn = self._turn % len(replicas)
    return sorted(replicas[turn:] + replicas[:turn], key=lambda replica: not replica.up)

  def _parts(self) -> list[tuple[int, int, list[Replica]]]:
    """Ranges of rows (first, behind the last) that the same servers have, in ascending order, with these servers."""
    known = [replica for replica in self._replicas if replica.served]
    edges = {0, self.layout.sub_tables * self.layout.rows}
    edges = sorted(edges.union(*((r.served.first, r.served.last) for r in known)))
    return [
      (first, last, [r for r in known if r.served.first <= first and last <= r.served.last])
      for first, last in pairwise(edges)
    ]

  def _check_complete(self, errors: list[str]) -> None:
    missing = [f'{first} to {last - 1}' for first, last, replicas in self._parts() if not replicas]
    if missing:
      said = f' ({"; ".join(errors)})' if errors else ''
      raise RowsUnavailableError(
        f'no row server has the rows {", ".join(missing)}{said}: '
        'start one with `pinfm serve-rows`, and name the servers of all parts'
      )

  def _greet(self, replica: Replica) -> str | None:
    """Asks a server what it has; returns why it did not answer.

    Raises:
      UserError: it has other tables.
    """
    try:
      served = replica.layout(self._limits.timeout_s)
    except RequestError as error:
      replica.up = False
      return f'{replica.url}: {error}'
    self._check_same(replica.url, served)
    replica.served, replica.up = served, True
    return None

  def _check_same(self, url: str, served: ServedRows) -> None:
    if served.sha256 != self._sha256 or served.tables != self.layout or served.last > self._total:
      raise UserError(
        f'{url} serves the tables of another bundle ({served.sha256[:16]}.., expected {self._sha256[:16]}..): start it '
        'with this one'
      )

  @property
  def _total(self) -> int:
    return self.layout.sub_tables * self.layout.rows

  def _start_watch(self) -> None:
    """Starts to look after the servers that failed, unless that goes on already."""
    with self._lock:
      if (self._watch is None or not self._watch.is_alive()) and not self._closed.is_set():
        arguments = (weakref.ref(self), self._closed, self._limits.recheck_s)
        self._watch = threading.Thread(target=_watch_failed, args=arguments, name='rows-watch', daemon=True)
        self._watch.start()

  def _recheck(self) -> bool:
    """Asks the servers that failed; returns whether all answer now, in which case the watch ends."""
    for replica in self._replicas:
      if not replica.up:
        try:
          self._greet(replica)
        except UserError:
          replica.up = False  # it came back with other tables, which its requests would be told as well
    with self._lock:
      well = all(replica.up for replica in self._replicas)
      if well:
        self._watch = None
      return well


def _watch_failed(client: weakref.ref, closed: threading.Event, recheck_s: float) -> None:
  """Rechecks until all is well; a client that nobody holds any more (its bundle was replaced) is not kept by this."""
  while not closed.wait(recheck_s):
    rows = client()
    if rows is None or rows._recheck():
      return
    del rows
