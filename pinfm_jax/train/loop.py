"""The training loop: dispatches steps, reads the metrics one step late, logs, saves and resumes."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pinfm_jax.config import MeshConfig
from pinfm_jax.errors import UserError
from pinfm_jax.progress import Progress
from pinfm_jax.train.checkpoint import Checkpoints, abstract_state
from pinfm_jax.train.sharding import put_batch
from pinfm_jax.train.step import Task, TrainState, init_state, make_step, state_shardings


@dataclass(frozen=True)
class LoopConfig:
  """How long, how often, and what the run's data position must agree with."""

  label: str
  steps: int
  seed: int
  examples: int  # of the global batch, for the rate
  checkpoint_every: int
  log_every: int
  position: dict[str, Any]


def train(
  task: Task,
  mesh: Mesh,
  directory: Path,
  config: LoopConfig,
  batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
  constants: Any = None,
  warm_start: Callable[[TrainState], TrainState] | None = None,
  layout: MeshConfig = MeshConfig(),
) -> TrainState:
  """Trains to `config.steps`, from the directory's newest checkpoint if it has one.

  Restore precedence: own checkpoint, then the warm start, then scratch.

  Args:
    task: what is trained.
    mesh: the devices.
    directory: of checkpoints/ and metrics.jsonl.
    config: see LoopConfig.
    batches: first step -> the batches from that step on.
    constants: goes into the state as it is.
    warm_start: changes the fresh state, for example to pretrained values.
    layout: how the tables lie over the mesh.

  Returns:
    The final state, which is also on disk.

  Raises:
    UserError: the batch does not divide over the mesh, the loss became NaN or infinite, or the checkpoint does not fit.
  """
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  if config.examples % parts:
    raise UserError(
      f'{config.label}: a global batch of {config.examples} examples does not divide over {parts} devices '
      '(mesh.data x mesh.fsdp); make the batch a multiple'
    )
  checkpoints = Checkpoints(directory / 'checkpoints')
  with jax.set_mesh(mesh):
    state = _start(task, mesh, config, checkpoints, constants, warm_start, layout)
    first = int(state.step)
    log = _Log(directory, config, first)
    if first < config.steps:
      state = _run(task, mesh, config, batches, checkpoints, state, log, layout)
    checkpoints.close()
    log.close()
  return state


def _start(
  task: Task,
  mesh: Mesh,
  config: LoopConfig,
  checkpoints: Checkpoints,
  constants: Any,
  warm_start: Callable[[TrainState], TrainState] | None,
  layout: MeshConfig,
) -> TrainState:
  create = init_state(task, mesh, config.seed, constants, layout)
  if checkpoints.latest_step is not None:
    abstract = abstract_state(create, state_shardings(task, mesh, constants, layout))
    return checkpoints.restore(abstract, config.position)
  state = create()
  return warm_start(state) if warm_start else state


def _run(
  task: Task,
  mesh: Mesh,
  config: LoopConfig,
  batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
  checkpoints: Checkpoints,
  state: TrainState,
  log: '_Log',
  layout: MeshConfig,
) -> TrainState:
  first = int(state.step)
  stream, run_step = batches(first), make_step(task, layout)
  pending = None
  for step in range(first, config.steps):
    begin = time.monotonic()
    batch = put_batch(next(stream), mesh)
    log.waited(time.monotonic() - begin)
    state, figures = run_step(state, batch)
    if pending is not None:
      log.read(*pending)  # metrics of the step before, while this one runs
    pending = (step + 1, figures)
    if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
      log.read(*pending)  # a non-finite loss stops here, before it is saved
      pending = None
      checkpoints.save(state, config.position)
  return state


class _Log:
  """metrics.jsonl (and TensorBoard when installed), the progress line, and the check that the loss is finite."""

  def __init__(self, directory: Path, config: LoopConfig, first: int):
    self._config = config
    self._path = directory / 'metrics.jsonl'
    _drop_after(self._path, first)
    self._progress = Progress(config.label, config.steps * config.examples, 'examples')
    self._progress.start_at(first * config.examples)
    self._waited = 0.0
    self._since, self._since_step = time.monotonic(), first
    self._board = _tensorboard(directory)
    self._ran = False

  def waited(self, seconds: float) -> None:
    """Counts time spent waiting for data."""
    self._waited += seconds

  def read(self, step: int, figures: dict[str, jax.Array]) -> None:
    """Takes the figures of a finished step."""
    loss = float(figures['loss'])
    if not math.isfinite(loss):
      raise UserError(
        f'{self._config.label}: the loss became {loss} at step {step}; the last checkpoint before it is kept. '
        'Lower the learning rate, or look at the data of that step'
      )
    self._ran = True
    now = time.monotonic()
    if step % self._config.log_every == 0 or step == self._config.steps:
      elapsed, steps = max(now - self._since, 1e-9), step - self._since_step
      row = {'step': step, 'time': time.time(), **{name: float(value) for name, value in figures.items()}}
      row['examples_per_s'] = steps * self._config.examples / elapsed
      row['data_wait_share'] = self._waited / elapsed
      with open(self._path, 'a') as file:
        file.write(json.dumps(row) + '\n')
      if self._board:
        for name in row.keys() - {'step', 'time'}:
          self._board.add_scalar(name, row[name], step)
      self._since, self._since_step, self._waited = now, step, 0.0
      self._wait_share = row['data_wait_share']
    wait = getattr(self, '_wait_share', 0.0)
    self._progress.update(step * self._config.examples, f'loss {loss:.4f}  waiting for data {100 * wait:.0f} %')

  def close(self) -> None:
    """Prints the closing line, if anything ran."""
    if self._ran:
      self._progress.update(self._config.steps * self._config.examples)
      self._progress.close()
    if self._board:
      self._board.close()


def _drop_after(path: Path, step: int) -> None:
  """Drops the lines of steps that a resumed run will do again, and a half-written last line."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)['step'] <= step:
        kept.append(line + '\n')
    except ValueError:
      continue
  temporary = path.with_suffix('.partial')
  temporary.write_text(''.join(kept))
  temporary.replace(path)


def _tensorboard(directory: Path) -> Any:
  try:
    from tensorboardX import SummaryWriter  # the extra `tensorboard`
  except ImportError:
    return None
  return SummaryWriter(str(directory / 'tensorboard'), write_to_disk=True)
