"""Interleaved timing: everything that is compared runs in turn, A B A B, so that a slow minute slows all of it."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax

from pinfm_jax.errors import UserError


@dataclass(frozen=True)
class Spread:
  """Median, least and greatest of repeated measurements of one figure."""

  median: float
  least: float
  greatest: float

  @classmethod
  def of(cls, values: tuple[float, ...]) -> 'Spread':
    """The spread of one or more values."""
    return cls(median(values), min(values), max(values))


def interleave(
  runs: Mapping[str, Callable[[int], Any]],
  rounds: int,
  warmup: int = 2,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[float, ...]]:
  """Times several programs in one process, one after another in every round.

  Args:
    runs: name -> a function of the round's number, which returns the JAX arrays to wait for (or anything else).
    rounds: that are timed.
    warmup: rounds before them that are not: compilation, page faults, filling caches.
    clock: seconds.

  Returns:
    Seconds of each program in each timed round.
  """
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for number in range(-warmup, rounds):
    for name, run in runs.items():
      begin = clock()
      jax.block_until_ready(run(number + warmup))
      elapsed = clock() - begin
      if number >= 0:
        seconds[name].append(elapsed)
  return {name: tuple(values) for name, values in seconds.items()}


def ratios(above: tuple[float, ...], below: tuple[float, ...]) -> Spread:
  """Ratio of two programs' times, taken within each round and then summarised."""
  return Spread.of(tuple(a / b for a, b in zip(above, below, strict=True)))


def use_threads(threads: int) -> None:
  """Binds the process to as many processors; call it before JAX starts, whose thread pool has their number.

  Raises:
    UserError: more than the machine gives, or none.
  """
  available = sorted(os.sched_getaffinity(0))
  if not 1 <= threads <= len(available):
    raise UserError(f'--threads is {threads}; this process may use 1 to {len(available)} processors')
  os.sched_setaffinity(0, available[:threads])


def peak_memory_gb() -> float:
  """The most memory that this process has held at once, in 10^9 bytes."""
  with open('/proc/self/status', encoding='utf-8') as file:
    line = next(line for line in file if line.startswith('VmHWM'))
  return int(line.split()[1]) * 1024 / 1e9
