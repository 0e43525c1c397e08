"""The batcher with a fake, slow scorer: nothing lost, nothing answered twice, limits kept."""

import asyncio
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinfm_jax.serve.http.batching import Batcher, BatchLimits, ExpiredError, OverloadedError


@dataclass(eq=False)
class FakeRequest:
  number: int
  item_ids: tuple[int, ...] = (1, 2)
  poison: bool = False


@dataclass(eq=False)
class FakeModel:
  """Gives back each request's number; a poisoned request makes the whole call fail."""

  seconds: float = 0.002
  batches: list = field(default_factory=list)
  threads: set = field(default_factory=set)
  running: int = 0

  def probabilities(self, requests):
    self.running += 1
    assert self.running == 1, 'two batches at once'
    self.threads.add(threading.get_ident())
    self.batches.append([request.number for request in requests])
    time.sleep(self.seconds)
    self.running -= 1
    if any(request.poison for request in requests):
      raise ValueError('poison')
    return [np.full((len(request.item_ids), 1), request.number, np.float32) for request in requests]


class Observer:
  def __init__(self):
    self.sizes = []

  def batch(self, requests, rows, waited_s, seconds):
    self.sizes.append((requests, rows))
    assert min(waited_s) >= 0


LIMITS = BatchLimits(max_delay_s=0.003, max_batch=4, max_rows=10, max_queue=8)


async def call(batcher, model, requests, timeout, outcomes, key):
  try:
    with batcher.seat() as seat:
      seat.take(len(requests) - 1)
      scores = await batcher.score(model, requests, time.monotonic() + timeout)
    outcome = [int(each[0, 0]) for each in scores]
  except (OverloadedError, ExpiredError, ValueError) as error:
    outcome = type(error)
  outcomes.setdefault(key, []).append(outcome)


async def play(calls, limits=LIMITS, models=2, seconds=0.002):
  """Runs calls (pause_ms, requests, timeout_ms, poison, model); returns outcomes, numbers, models and the observer."""
  observer, fakes = Observer(), [FakeModel(seconds) for _ in range(models)]
  batcher = Batcher(limits, observer)
  batcher.start()
  outcomes, tasks, numbers, count = {}, [], {}, 0
  for key, (pause, size, timeout, poison, model) in enumerate(calls):
    requests = [FakeRequest(count + i, poison=poison) for i in range(size)]
    numbers[key], count = [request.number for request in requests], count + size
    await asyncio.sleep(pause / 1e3)
    tasks.append(asyncio.create_task(call(batcher, fakes[model], requests, timeout / 1e3, outcomes, key)))
  await asyncio.gather(*tasks)
  assert batcher.pending == 0
  assert batcher.alive
  await batcher.close()
  return outcomes, numbers, fakes, observer


CALLS = st.lists(
  st.tuples(
    st.sampled_from([0, 0, 0, 1, 4]), st.integers(1, 5), st.sampled_from([1, 5, 1000]),
    st.sampled_from([False, False, False, True]), st.integers(0, 1),
  ),
  max_size=14,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(CALLS)
def test_every_call_is_answered_once_with_its_own_scores(calls):
  outcomes, numbers, fakes, observer = asyncio.run(play(calls))
  assert sorted(outcomes) == list(range(len(calls)))
  assert all(len(answers) == 1 for answers in outcomes.values())
  times_scored = Counter(number for fake in fakes for batch in fake.batches for number in batch)
  poison = any(poison for *_, poison, _ in calls)
  for key, [outcome] in outcomes.items():
    pause, size, timeout, poisoned, model = calls[key]
    scored = {times_scored[number] for number in numbers[key]}
    if isinstance(outcome, list):
      assert outcome == numbers[key]
      assert not poisoned
      assert scored <= ({1, 2} if poison else {1})  # in a batch that failed, and then alone
    elif outcome is ValueError:
      assert poisoned
    else:
      assert scored == {0}  # refused or dropped before scoring
      assert outcome is OverloadedError or timeout < 1000
    belongs = {number for number in numbers[key] for batch in fakes[1 - model].batches if number in batch}
    assert not belongs  # never scored by another model
  most = max([LIMITS.max_batch, *(size for _, size, *_ in calls)])
  assert all(len(batch) <= most for fake in fakes for batch in fake.batches)
  assert sum(size for size, _ in observer.sizes) >= sum(len(o[0]) for o in outcomes.values() if isinstance(o[0], list))


def test_company_is_waited_for_and_limits_are_kept():
  calls = [(0, 1, 1000, False, 0)] * 6
  outcomes, _, [fake], observer = asyncio.run(play(calls, models=1))
  assert [len(batch) for batch in fake.batches] == [4, 2]  # max_batch
  assert observer.sizes == [(4, 8), (2, 4)]
  rows = BatchLimits(max_delay_s=0.003, max_batch=99, max_rows=5, max_queue=8)
  _, _, [fake], _ = asyncio.run(play(calls, rows, 1))
  assert [len(batch) for batch in fake.batches] == [2, 2, 2]  # 2 candidates each
  alone = BatchLimits(max_delay_s=0, max_batch=2, max_rows=1, max_queue=8)
  _, _, [fake], _ = asyncio.run(play([(0, 5, 1000, False, 0)], alone, 1))
  assert [len(batch) for batch in fake.batches] == [5]  # larger than any batch: alone


def test_a_lone_request_waits_no_longer_than_the_delay():
  limits = BatchLimits(max_delay_s=0.05, max_batch=4, max_rows=10, max_queue=8)
  begin = time.monotonic()
  asyncio.run(play([(0, 1, 1000, False, 0)], limits, 1))
  assert 0.05 <= time.monotonic() - begin < 0.5


def test_a_full_queue_refuses_at_once_and_says_when():
  async def scenario():
    batcher = Batcher(BatchLimits(max_queue=3, max_batch=1), Observer())
    batcher.start()
    model, outcomes = FakeModel(0.2), {}
    tasks = [asyncio.create_task(call(batcher, model, [FakeRequest(i)], 9, outcomes, i)) for i in range(3)]
    await asyncio.sleep(0.05)
    begin = time.monotonic()
    with pytest.raises(OverloadedError) as error, batcher.seat():
      pass
    assert time.monotonic() - begin < 0.05
    assert error.value.retry_after_s == 1  # nothing measured yet
    await asyncio.gather(*tasks)
    batcher.pending, batcher.limits = 40, BatchLimits(max_queue=40)
    with pytest.raises(OverloadedError) as error, batcher.seat():
      pass
    assert 7 <= error.value.retry_after_s <= 9  # 40 pending, about 5 a second
    await batcher.close()

  asyncio.run(scenario())


def test_expired_requests_are_answered_in_time_while_another_is_scored():
  async def scenario():
    batcher = Batcher(BatchLimits(max_batch=1), Observer())
    batcher.start()
    model, outcomes = FakeModel(0.4), {}
    first = asyncio.create_task(call(batcher, model, [FakeRequest(0)], 9, outcomes, 0))
    await asyncio.sleep(0.05)
    begin = time.monotonic()
    await call(batcher, model, [FakeRequest(1)], 0.05, outcomes, 1)
    assert time.monotonic() - begin < 0.2  # not when the first is done
    await first
    await batcher.close()
    assert outcomes == {0: [[0]], 1: [ExpiredError]}
    assert model.batches == [[0]]

  asyncio.run(scenario())


def test_drain_waits_for_what_was_taken_in():
  async def scenario():
    batcher = Batcher(BatchLimits(max_batch=1), Observer())
    batcher.start()
    model, outcomes = FakeModel(0.05), {}
    tasks = [asyncio.create_task(call(batcher, model, [FakeRequest(i)], 9, outcomes, i)) for i in range(3)]
    await asyncio.sleep(0)
    await batcher.drain()
    assert outcomes == {i: [[i]] for i in range(3)}
    await asyncio.gather(*tasks)
    await batcher.close()

  asyncio.run(scenario())


def test_a_caller_that_went_away_is_not_scored():
  async def scenario():
    batcher = Batcher(BatchLimits(max_batch=1), Observer())
    batcher.start()
    model, outcomes = FakeModel(0.05), {}
    tasks = [asyncio.create_task(call(batcher, model, [FakeRequest(i)], 9, outcomes, i)) for i in range(3)]
    await asyncio.sleep(0.02)
    tasks[1].cancel()
    await asyncio.wait(tasks)
    await batcher.close()
    assert outcomes == {0: [[0]], 2: [[2]]}
    assert model.batches == [[0], [2]]
    assert batcher.pending == 0

  asyncio.run(scenario())


def test_a_scorer_with_too_few_results_is_an_error_and_not_a_shift():
  class Short(FakeModel):
    def probabilities(self, requests):
      return super().probabilities(requests)[:-1]

  async def scenario():
    batcher = Batcher(BatchLimits(), Observer())
    batcher.start()
    with pytest.raises(RuntimeError, match='another number of results'):
      await batcher.score(Short(), [FakeRequest(0), FakeRequest(1)], time.monotonic() + 9)
    await batcher.close()
    with pytest.raises(RuntimeError, match='does not run'):
      await batcher.score(Short(), [FakeRequest(0)], time.monotonic() + 9)

  asyncio.run(scenario())
