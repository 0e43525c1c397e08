"""The training loop: dispatches steps, reads the metrics one step late, measures, saves and resumes."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pinfm_jax.config import MeshConfig, TableConfig
from pinfm_jax.errors import UserError
from pinfm_jax.model.tables import Tables
from pinfm_jax.train.checkpoint import Checkpoints, Keep, plain
from pinfm_jax.train.distributed import is_first, on_first
from pinfm_jax.train.metrics_log import MetricsLog
from pinfm_jax.train.prefetch import Prefetch
from pinfm_jax.train.profiling import Tracer, Window
from pinfm_jax.train.restore import Start, fresh_state, starting_state
from pinfm_jax.train.sharding import put_batch
from pinfm_jax.train.step import Task, TrainState, evaluated, fitted_layout, make_step

Evaluate = Callable[[TrainState], dict[str, float]]


@dataclass(frozen=True)
class LoopConfig:
  """How long, how often, and what the run's data position must agree with.

  Attributes:
    label: of the progress line and of errors.
    steps: of the whole run.
    seed: of initialisation.
    examples: of the global batch.
    checkpoint_every: steps between checkpoints; the last step is always saved.
    log_every: steps between lines of metrics.jsonl.
    position: what a checkpoint must agree with to be continued.
    eval_every: steps between measurements by `evaluate`, which also runs before every checkpoint.
    keep: which checkpoints stay.
    use_checkpoint: 'newest' or 'best': the state that the run returns in the end.
    best_by: the measured figure by which a state is better; with '-' in front, a higher one is.
    patience: measurements without a better one after which the run ends; 0 = it goes on.
    resume: directory of another run to go on from.
    profile: steps to trace.
    layout: how the tables lie over the mesh.
  """

  label: str
  steps: int
  seed: int
  examples: int
  checkpoint_every: int
  log_every: int
  position: dict[str, Any]
  eval_every: int = 0
  keep: Keep = Keep()
  use_checkpoint: str = 'newest'
  best_by: str = 'loss'
  patience: int = 0
  resume: str = ''
  profile: Window | None = None
  layout: MeshConfig = MeshConfig()

  def score(self, figures: dict[str, float]) -> float:
    """What is lower the better a measured state is."""
    return -figures[self.best_by[1:]] if self.best_by.startswith('-') else figures[self.best_by]


def train(
  task: Task,
  mesh: Mesh,
  directory: Path,
  config: LoopConfig,
  batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
  constants: Any = None,
  warm_start: Start | None = None,
  evaluate: Evaluate | None = None,
) -> TrainState:
  """Trains to `config.steps`; where it starts is told by `restore.starting_state`.

  Args:
    task: what is trained.
    mesh: the devices.
    directory: of checkpoints/ and metrics.jsonl.
    config: see LoopConfig.
    batches: first step -> this process's rows of the batches from that step on.
    constants: goes into the state as it is.
    warm_start: what a fresh run starts from; None = scratch.
    evaluate: measures a state, with averaged weights if it has them, on what does not train.

  Returns:
    The state of `config.use_checkpoint`, which is also on disk.

  Raises:
    UserError: the batch does not divide over the mesh, a loss or the state became NaN or infinite, or a checkpoint
      does not fit.
  """
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  if config.examples % parts:
    raise UserError(
      f'{config.label}: a global batch of {config.examples} examples does not divide over {parts} devices '
      '(mesh.data x mesh.fsdp); make the batch a multiple'
    )
  with jax.set_mesh(mesh), closing(Checkpoints(directory / 'checkpoints', config.keep)) as checkpoints:
    state = starting_state(
      task, mesh, config.seed, constants, config.position, checkpoints, config.resume, warm_start, config.layout
    )
    if state.tables is not None and is_first():
      print(f'{config.label}: {described_tables(task.tables, state.tables)}', flush=True)
    run = _Training(task, mesh, directory, config, batches, checkpoints, evaluate)
    state = run.to_the_end(state)
    best = checkpoints.best_step
    if config.use_checkpoint == 'best' and best not in (None, int(state.step)):
      del state  # its memory is needed for the one that is read
      _, abstract = fresh_state(task, mesh, config.seed, constants, config.layout)
      state = checkpoints.restore(abstract, config.position, best)
    return state


def described_tables(config: TableConfig, tables: Tables) -> str:
  """One line on the tables: sizes, how many rows were added so that they divide over any mesh, bytes."""
  stored, real = tables.rows_GE.shape[0], config.sub_tables * config.rows
  size = sum(array.size * array.dtype.itemsize for array in tables if array is not None)
  return (
    f'tables {config.sub_tables} x {config.rows:,} rows x {config.width} ({config.dtype}), {real:,} rows stored as '
    f'{stored:,} to divide over any mesh, {size / 1e9:.2f} GB with accumulators'
  )


class _Training:
  """The steps of one run, and what happens between them."""

  def __init__(
    self,
    task: Task,
    mesh: Mesh,
    directory: Path,
    config: LoopConfig,
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
    checkpoints: Checkpoints,
    evaluate: Evaluate | None,
  ):
    self._task, self._mesh, self._directory, self._config = task, mesh, directory, config
    self._batches, self._checkpoints, self._evaluate = batches, checkpoints, evaluate
    self._scores: list[float] = []  # of all measurements, earlier attempts' too

  def to_the_end(self, state: TrainState) -> TrainState:
    """Runs the steps that are left."""
    config, first = self._config, int(state.step)
    if first >= config.steps:
      if self._checkpoints.latest_step is None:  # another run's last state: from now on it is this run's too
        self._checkpoints.save(state, config.position)
      return state
    log = MetricsLog(self._directory, config.label, config.steps, config.examples, config.log_every, first)
    if config.patience:
      self._scores = on_first(f'{config.label}: measurements', log.measured_before)
    try:
      state = self._steps(state, first, log)
    except BaseException:
      log.close(finished=False)
      raise
    log.close(finished=True)
    return state

  def _steps(self, state: TrainState, first: int, log: MetricsLog) -> TrainState:
    config = self._config
    source = itertools.islice(self._batches(first), config.steps - first)
    stream = Prefetch(source, lambda batch: put_batch(batch, self._mesh))
    steps = range(first + 1, config.steps + 1)
    tracer = Tracer(config.profile if is_first() else None, self._directory, config.label, steps)
    pending = run_step = None
    with closing(stream), closing(tracer):
      for step in () if self._exhausted else steps:
        begin = time.monotonic()
        batch = next(stream)
        log.waited(time.monotonic() - begin)
        run_step = run_step or make_step(self._task, fitted_layout(self._task, state, config.layout, batch))
        tracer.before(step)
        state, figures = run_step(state, batch)
        tracer.after(step, figures)
        if pending is not None:
          log.read(*pending)  # metrics of the step before, while this one runs
        pending = (step, figures)
        if self._stops_after(step):
          log.read(*pending)  # a non-finite loss stops here, before it is saved
          pending = None
          self._measure_and_save(state, step, log)
          if self._exhausted:
            log.note(f'no better in {config.patience} measurements: stops at step {step}')
            break
    return state

  @property
  def _exhausted(self) -> bool:
    """Whether the last `patience` measurements were no better than the best before them."""
    patience = self._config.patience
    return 0 < patience < len(self._scores) and min(self._scores[-patience:]) >= min(self._scores[:-patience])

  def _saves(self, step: int) -> bool:
    return step % self._config.checkpoint_every == 0 or step == self._config.steps

  def _stops_after(self, step: int) -> bool:
    measures = self._evaluate is not None and self._config.eval_every and step % self._config.eval_every == 0
    return bool(measures) or self._saves(step)

  def _measure_and_save(self, state: TrainState, step: int, log: MetricsLog) -> None:
    held_out = None
    broken = non_finite(state) if self._saves(step) or self._config.patience else None  # which may end and save here
    if broken:
      log.refuse(step, broken)
    if self._evaluate is not None:
      begin = time.monotonic()
      figures = self._evaluate(evaluated(state))
      held_out = self._config.score(figures)
      log.measured(step, figures, held_out)
      log.paused(time.monotonic() - begin)
      self._scores.append(held_out)
    if self._saves(step) or self._exhausted:
      self._checkpoints.save(state, self._config.position, held_out)
      log.saved(step)


def non_finite(state: TrainState) -> str | None:
  """Name of the first array of a state that holds NaN or infinity, or None."""
  for name, good in _finite(plain(state)).items():
    if not bool(good):
      return name
  return None


@jax.jit
def _finite(arrays: Any) -> dict[str, jax.Array]:
  """One flag an array, without a temporary array of its size.

  A sum is finite if all its terms are (but for values near 1e38, which are past saving too); `isfinite` of every
  element, or the maximum, would be a whole array on CPU, or lose a NaN there.
  """
  flags = {}
  for path, array in jax.tree_util.tree_leaves_with_path(arrays):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if jnp.issubdtype(array.dtype, jnp.floating):
      flags[name] = jnp.isfinite(jnp.sum(array, dtype=jnp.float32))
    elif array.dtype == jnp.uint16 and name.startswith('tables/'):
      # bfloat16 bits: without the sign, NaN and infinity are the largest. By rows first: one value a row is kept.
      flags[name] = jnp.max(jax.lax.reduce(array, np.uint16(0), _larger_magnitude, (1,))) < 0x7F80
  return flags


def _larger_magnitude(a: jax.Array, b: jax.Array) -> jax.Array:
  return jax.lax.max(a & np.uint16(0x7FFF), b & np.uint16(0x7FFF))
