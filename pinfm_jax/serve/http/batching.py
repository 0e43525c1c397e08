"""Dynamic batching: requests wait for company until a deadline, in a bounded queue, before one scoring thread.

All bookkeeping happens on the event loop's thread; the scoring thread gets a batch and gives back its scores. Each
request that was taken in is answered once: with scores, as expired, or with the error of scoring it.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pinfm_jax.serve.requests import ScoringRequest

_RATE_MEMORY = 0.2  # weight of the newest batch in the measured rate


class Scoring(Protocol):
  """What scores a batch: the scorer of one opened bundle."""

  def probabilities(self, requests: list[ScoringRequest]) -> list[np.ndarray]:
    """[C, labels] of each request."""


class BatchObserver(Protocol):
  """Hears of every batch."""

  def batch(self, requests: int, rows: int, waited_s: Sequence[float], seconds: float) -> None:
    """A batch was scored."""


class OverloadedError(Exception):
  """The queue is full; try again after `retry_after_s` seconds."""

  def __init__(self, retry_after_s: int):
    super().__init__(f'the queue is full; try again in {retry_after_s} s')
    self.retry_after_s = retry_after_s


class ExpiredError(Exception):
  """The deadline passed before the request was scored."""


@dataclass(frozen=True)
class BatchLimits:
  """How requests are batched.

  Attributes:
    max_delay_s: longest that a request waits for others while the scoring thread is free.
    max_batch: requests scored at once.
    max_rows: candidates scored at once; a longer request is scored alone.
    max_queue: requests taken in and not yet answered.
  """

  max_delay_s: float = 0.002
  max_batch: int = 32
  max_rows: int = 8192
  max_queue: int = 256


@dataclass(eq=False)
class _Work:
  """Requests of one call, which are scored in the same batch."""

  model: Scoring
  requests: list[ScoringRequest]
  deadline: float
  queued: float
  answer: asyncio.Future

  @property
  def rows(self) -> int:
    return sum(len(request.item_ids) for request in self.requests)


class Seat:
  """A caller's places in the queue, given back when its block ends."""

  def __init__(self, batcher: 'Batcher'):
    self._batcher, self.places = batcher, 0

  def take(self, places: int) -> None:
    """Takes more places.

    Raises:
      OverloadedError: the queue is full.
    """
    batcher = self._batcher
    if batcher.pending + places > batcher.limits.max_queue:
      raise OverloadedError(batcher.retry_after_s())
    batcher.pending += places
    self.places += places


class Batcher:
  """Batches and scores the requests of one event loop."""

  def __init__(self, limits: BatchLimits, observer: BatchObserver):
    """Starts nothing; see `start`."""
    self.limits, self.pending = limits, 0
    self._observer = observer
    self._queue: deque[_Work] = deque()
    self._wake = asyncio.Event()
    self._thread = ThreadPoolExecutor(1, 'scoring')
    self._task: asyncio.Task | None = None
    self._rate = 0.0  # requests a second while scoring

  def start(self) -> None:
    """Begins to score; called on the event loop."""
    self._task = asyncio.get_running_loop().create_task(self._run())

  @property
  def alive(self) -> bool:
    """Whether it scores what it takes in."""
    return self._task is not None and not self._task.done()

  async def close(self) -> None:
    """Ends; call `drain` first."""
    if self._task is not None:
      self._task.cancel()
      await asyncio.wait([self._task])
    self._thread.shutdown()

  async def drain(self) -> None:
    """Waits until everything that was taken in is answered."""
    while self.pending and self.alive:
      await asyncio.sleep(0.01)

  @contextmanager
  def seat(self) -> Iterator[Seat]:
    """Places in the queue for one call, one to begin with.

    Raises:
      OverloadedError: the queue is full.
    """
    seat = Seat(self)
    seat.take(1)
    try:
      yield seat
    finally:
      self.pending -= seat.places

  def retry_after_s(self) -> int:
    """Whole seconds until what is pending now is answered, at the measured rate; at least 1."""
    return max(1, math.ceil(self.pending / self._rate)) if self._rate else 1

  async def score(self, model: Scoring, requests: list[ScoringRequest], deadline: float) -> list[np.ndarray]:
    """Scores the requests of one call, together with those of others.

    Args:
      model: scores them; a batch has one model.
      requests: at least one.
      deadline: by `time.monotonic`, when scoring must have begun.

    Raises:
      ExpiredError: it had not.
      Exception: what the scorer raised for these requests.
    """
    loop = asyncio.get_running_loop()
    if not self.alive:
      raise RuntimeError('the batcher does not run')
    work = _Work(model, requests, deadline, time.monotonic(), loop.create_future())
    self._queue.append(work)
    self._wake.set()
    timer = loop.call_later(max(deadline - work.queued, 0), self._expire, work)
    try:
      return await work.answer
    finally:
      timer.cancel()

  def _expire(self, work: _Work) -> None:
    if work in self._queue:  # else it is being scored, or answered
      self._queue.remove(work)
      _fail(work, ExpiredError())

  async def _run(self) -> None:
    loop = asyncio.get_running_loop()
    try:
      while True:
        await self._until_due()
        batch = self._take()
        if not batch:
          continue
        begin = time.monotonic()
        answers = await loop.run_in_executor(self._thread, _score, batch)
        self._account(batch, begin)
        for work, answer in zip(batch, answers, strict=True):
          if isinstance(answer, Exception):
            _fail(work, answer)
          elif not work.answer.done():
            work.answer.set_result(answer)
    finally:
      while self._queue:
        _fail(self._queue.popleft(), RuntimeError('the server stopped'))

  async def _until_due(self) -> None:
    """Until the oldest request has waited long enough, or a batch is full."""
    while True:
      self._wake.clear()
      remaining = None
      if self._queue:
        remaining = self._queue[0].queued + self.limits.max_delay_s - time.monotonic()
        if remaining <= 0 or self._full():
          return
      try:
        await asyncio.wait_for(self._wake.wait(), remaining)
      except TimeoutError:
        return

  def _full(self) -> bool:
    requests = sum(len(work.requests) for work in self._queue)
    rows = sum(work.rows for work in self._queue)
    other = any(work.model is not self._queue[0].model for work in self._queue)
    return requests >= self.limits.max_batch or rows >= self.limits.max_rows or other

  def _take(self) -> list[_Work]:
    """The next batch, oldest first: one model, within the limits, without those that expired or went away."""
    batch: list[_Work] = []
    requests = rows = 0
    while self._queue:
      work = self._queue[0]
      if work.answer.done() or work.deadline <= time.monotonic():
        _fail(self._queue.popleft(), ExpiredError())
        continue
      requests, rows = requests + len(work.requests), rows + work.rows
      too_many = requests > self.limits.max_batch or rows > self.limits.max_rows
      if batch and (too_many or work.model is not batch[0].model):
        break
      batch.append(self._queue.popleft())
    return batch

  def _account(self, batch: list[_Work], begin: float) -> None:
    seconds = time.monotonic() - begin
    requests = sum(len(work.requests) for work in batch)
    rate = requests / max(seconds, 1e-9)
    self._rate = rate if not self._rate else (1 - _RATE_MEMORY) * self._rate + _RATE_MEMORY * rate
    self._observer.batch(requests, sum(work.rows for work in batch), [begin - work.queued for work in batch], seconds)


def _score(batch: list[_Work]) -> list[Any]:
  """Scores of each work, or the exception that scoring it raised: a bad request harms no other."""
  try:
    scores = batch[0].model.probabilities([request for work in batch for request in work.requests])
    if len(scores) != sum(len(work.requests) for work in batch):
      raise RuntimeError('the scorer gave another number of results than requests')
  except Exception as error:  # noqa: BLE001 (whatever it is, it concerns requests, not the server)
    return [error] if len(batch) == 1 else [answer for work in batch for answer in _score([work])]
  rest = iter(scores)
  return [[next(rest) for _ in work.requests] for work in batch]


def _fail(work: _Work, error: Exception) -> None:
  if not work.answer.done():
    work.answer.set_exception(error)
