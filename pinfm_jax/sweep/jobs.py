"""Runs of a sweep as processes: what may start, how many at once, what became of each."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pinfm_jax
from pinfm_jax.config import Experiment
from pinfm_jax.errors import ERROR, UserError
from pinfm_jax.overrides import to_dict
from pinfm_jax.progress import duration
from pinfm_jax.workdir import is_done

CHILD = ('-m', 'pinfm_jax.sweep.child')
FINISHED, FAILED, WAITING = 'finished', 'failed', 'waiting'  # waiting: for a run that failed
_POLL_S = 0.1
_poll = time.sleep  # a name of its own, so that tests can interrupt here
_GRACE_S = 10.0
_LAST_LINES = 12


@dataclass(frozen=True)
class Job:
  """One run.

  Attributes:
    label: how messages call it.
    stage: of `pinfm run`: 'prepare', 'pretrain' or 'finetune'.
    experiment: with the one arm and seed that the run is about.
    directory: that the run fills; no two jobs have the same.
    log: file of what it prints.
    needs: directory of the job that must be finished before.
    towers_alone: the experiment has no rankers: the arm is a tower.
  """

  label: str
  stage: str
  experiment: Experiment
  directory: Path
  log: Path
  needs: Path | None = None
  towers_alone: bool = False


@dataclass(frozen=True)
class Outcome:
  """What became of a job: its status, the seconds it took, the last lines it printed if it failed."""

  status: str
  seconds: float = 0.0
  message: str = ''


@dataclass
class _Running:
  job: Job
  process: subprocess.Popen
  begin: float


def run_jobs(
  jobs: Sequence[Job],
  workdir: Path,
  at_once: int = 1,
  ended: Callable[[Job, Outcome], None] = lambda job, outcome: None,
) -> dict[Path, Outcome]:
  """Runs the jobs in order, as many at once as told; one that fails does not stop the others.

  Args:
    jobs: what to run; a job stands behind the one that it needs.
    workdir: of the experiment.
    at_once: processes at a time; they share the cores (or the GPUs) out.
    ended: called with every job that has ended.

  Returns:
    {job's directory: what became of it}.

  Raises:
    UserError: more jobs at once than GPUs.
  """
  slots = machine_slots(at_once)
  waiting, running, outcomes = list(jobs), {}, {}
  clock = _Clock(jobs, at_once)

  def end(job: Job, outcome: Outcome) -> None:
    outcomes[job.directory] = outcome
    ended(job, outcome)
    clock.ended(job, outcome)

  try:
    while waiting or running:
      for job in [job for job in waiting if _lacks(job, outcomes)]:
        waiting.remove(job)
        end(job, Outcome(WAITING, message=f'{job.needs} failed'))
      for slot in range(at_once):
        job = next((job for job in waiting if not _must_wait(job, waiting, running)), None)
        if slot not in running and job is not None:
          waiting.remove(job)
          running[slot] = _Running(job, _start(job, workdir, slots[slot]), time.monotonic())
          print(f'start {job.label}  (log: {job.log})', flush=True)
      for slot, one in list(running.items()):
        if one.process.poll() is not None:
          del running[slot]
          end(one.job, _outcome(one))
      if running:
        _poll(_POLL_S)
  finally:
    _stop([one.process for one in running.values()])
  return outcomes


@dataclass(frozen=True)
class Slot:
  """What a job may use: cores (none = all) and variables of its environment."""

  cores: tuple[int, ...] = ()
  environment: Mapping[str, str] | None = None


def machine_slots(at_once: int) -> list[Slot]:
  """Shares the machine out to jobs that run at the same time.

  GPUs: one or more for each job, by CUDA_VISIBLE_DEVICES. Otherwise cores: each job is bound to its part, so that the
  jobs do not wait for each other's threads; with more jobs than cores several jobs share a core.

  Raises:
    UserError: fewer than one job, or more jobs than GPUs.
  """
  if at_once < 1:
    raise UserError(f'--jobs is {at_once}; expected at least 1')
  if at_once == 1:
    return [Slot()]
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []
  shares = [tuple(cores[slot % len(cores) :: at_once]) if cores else () for slot in range(at_once)]
  gpus = _gpus()
  if not gpus:
    return [Slot(share) for share in shares]
  if at_once > len(gpus):
    raise UserError(f'--jobs is {at_once}, but there are {len(gpus)} GPUs, of which a run needs one; lower it')
  return [Slot(share, {'CUDA_VISIBLE_DEVICES': ','.join(gpus[s::at_once])}) for s, share in enumerate(shares)]


def _gpus() -> list[str]:
  """The NVIDIA GPUs that JAX would use, without starting it: this process must not take their memory."""
  if os.environ.get('JAX_PLATFORMS', 'cuda').split(',')[0] not in ('cuda', 'gpu'):
    return []
  if 'CUDA_VISIBLE_DEVICES' in os.environ:
    return [name for name in os.environ['CUDA_VISIBLE_DEVICES'].split(',') if name not in ('', '-1')]
  return sorted((p.name.removeprefix('nvidia') for p in Path('/dev').glob('nvidia[0-9]*')), key=int)


def _lacks(job: Job, outcomes: Mapping[Path, Outcome]) -> bool:
  return job.needs in outcomes and outcomes[job.needs].status != FINISHED


def _must_wait(job: Job, waiting: Sequence[Job], running: Mapping[int, _Running]) -> bool:
  return any(job.needs == other.directory for other in (*waiting, *(one.job for one in running.values())))


def _start(job: Job, workdir: Path, slot: Slot) -> subprocess.Popen:
  request: dict[str, Any] = {
    'stage': job.stage,
    'experiment': to_dict(job.experiment),
    'workdir': str(workdir),
    'towers_alone': job.towers_alone,
    'cores': list(slot.cores),
  }
  job.log.parent.mkdir(parents=True, exist_ok=True)
  with job.log.open('wb') as log:
    process = subprocess.Popen(
      [sys.executable, *CHILD],
      stdin=subprocess.PIPE,
      stdout=log,
      stderr=subprocess.STDOUT,
      env={**os.environ, **this_package(), 'PYTHONUNBUFFERED': '1', **(slot.environment or {})},
      start_new_session=True,  # Ctrl-C reaches the sweep alone, which ends its runs in order
    )
  with suppress(BrokenPipeError):  # it died while starting: its log says why
    process.stdin.write((json.dumps(request) + '\n').encode())
    process.stdin.flush()
  return process


def this_package() -> dict[str, str]:
  """Lets a run import the very files that the sweep runs from."""
  source = str(Path(pinfm_jax.__file__).resolve().parent.parent)
  return {'PYTHONPATH': os.pathsep.join(filter(None, [source, os.environ.get('PYTHONPATH', '')]))}


def _close_input(process: subprocess.Popen) -> None:
  with suppress(BrokenPipeError):  # what it never read
    process.stdin.close()


def _outcome(one: _Running) -> Outcome:
  _close_input(one.process)
  seconds, code = time.monotonic() - one.begin, one.process.returncode
  if code == 0 and (one.job.stage == 'prepare' or is_done(one.job.directory)):
    return Outcome(FINISHED, seconds)
  lines = one.job.log.read_text(encoding='utf-8', errors='replace').splitlines()
  how = f'killed by signal {-code}' if code < 0 else f'exit code {code}, {one.job.directory} has no result'
  errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
  last = errors[-1:] if code == 2 else [how, *lines[-_LAST_LINES:]]
  return Outcome(FAILED, seconds, '\n'.join(last or [how]))


def _stop(processes: Sequence[subprocess.Popen]) -> None:
  """Ends processes that still run: their standard input ends, which they take as their end."""
  for process in processes:
    _close_input(process)
  deadline = time.monotonic() + _GRACE_S
  for process in processes:
    try:
      process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


class _Clock:
  """Says how far the sweep is, and when it will end if each kind of run goes on as it did."""

  def __init__(self, jobs: Sequence[Job], at_once: int):
    self._left = [job.stage for job in jobs]
    self._total, self._at_once = len(jobs), at_once
    self._seconds: dict[str, list[float]] = {}

  def ended(self, job: Job, outcome: Outcome) -> None:
    """Prints a job's line; a failed one's last lines too."""
    self._left.remove(job.stage)
    if outcome.status == FINISHED:
      self._seconds.setdefault(job.stage, []).append(outcome.seconds)
    count = f'[{self._total - len(self._left)}/{self._total}]'
    if outcome.status == WAITING:
      print(f'{count} {job.label}: cannot run, {outcome.message}', flush=True)
      return
    verb = 'finished in' if outcome.status == FINISHED else 'FAILED after'
    print(f'{count} {job.label}: {verb} {duration(outcome.seconds)}{self._eta()}', flush=True)
    if outcome.status == FAILED:
      print(f'  {job.log}:\n' + '\n'.join(f'  | {line}' for line in outcome.message.splitlines()), flush=True)

  def _eta(self) -> str:
    known = [second for seconds in self._seconds.values() for second in seconds]
    if not self._left or not known:
      return ''
    means = {stage: sum(seconds) / len(seconds) for stage, seconds in self._seconds.items()}
    left = sum(means.get(stage, sum(known) / len(known)) for stage in self._left)
    return f'  ETA {duration(left / self._at_once)}'
