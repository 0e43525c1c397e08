"""Checkpoints of a training run (Orbax v1): atomic, resumable, and checked against the data they were trained on."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from pinfm_jax.errors import UserError
from pinfm_jax.train.step import TrainState

logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax reports every file it touches


class Checkpoints:
  """The checkpoints of one run's directory.

  A checkpoint is a folder that appears by renaming, so a killed save leaves nothing that looks whole. Besides the
  state it holds the data position: the next step, the order's seed and the data set's checksum.
  """

  def __init__(self, directory: Path, keep: int = 2):
    """Opens (or makes) the directory; `keep` newest checkpoints stay."""
    self._directory = Path(directory).absolute()
    self._directory.mkdir(parents=True, exist_ok=True)
    self._checkpointer = ocp.training.Checkpointer(
      self._directory,
      preservation_policy=ocp.training.preservation_policies.LatestN(keep),
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      cleanup_tmp_directories=True,
    )

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, or None."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def save(self, state: TrainState, position: dict[str, Any]) -> None:
    """Writes the state and returns when it is on disk.

    It blocks: on CPU a save in the background makes the next step copy the tables that are being written.
    """
    step = int(state.step)
    if self.latest_step != step:
      self._checkpointer.save_checkpointables(step, {'state': _plain(state), 'position': position})

  def restore(self, abstract: TrainState, position: dict[str, Any]) -> TrainState:
    """Reads the newest checkpoint into the shardings of an abstract state.

    Args:
      abstract: shapes, types and shardings (`abstract_state`).
      position: what the run expects; but for the step it must equal what was saved.

    Raises:
      UserError: the checkpoint belongs to other data or another configuration, or cannot be read.
    """
    step = self.latest_step
    self._check_layout(step, _plain(abstract))
    try:
      loaded = self._checkpointer.load_checkpointables(step, {'state': _plain(abstract), 'position': None})
    except (ValueError, KeyError, FileNotFoundError, TypeError) as error:
      reason = str(error).strip().splitlines()[0][:300]
      raise UserError(
        f'{self._directory}/{step} does not fit this configuration ({reason}); '
        'use the configuration it was written with, or another --workdir'
      ) from error
    saved = loaded['position']
    for name, expected in position.items():
      if saved.get(name) != expected:
        raise UserError(
          f'{self._directory}/{step} was written with {name} {saved.get(name)!r}, this run has {expected!r}; '
          'use another --workdir or the settings it was written with'
        )
    return _rebuild(abstract, loaded['state'])

  def _check_layout(self, step: int, expected: dict[str, Any]) -> None:
    """Compares names and shapes before anything is read: Orbax would fail halfway, with reads under way."""
    found = _shapes(self._checkpointer.checkpointables_metadata(step).metadata['state'])
    wanted = _shapes(expected)
    for name in (*wanted, *found):
      if found.get(name) != wanted.get(name):
        raise UserError(
          f'{self._directory}/{step} does not fit this configuration (it has {name} of shape {found.get(name)}, '
          f'the model {wanted.get(name)}); use the configuration it was written with, or another --workdir'
        )

  def close(self) -> None:
    """Waits for what is under way."""
    self._checkpointer.close()


def abstract_state(create: Any, shardings: TrainState) -> TrainState:
  """Shapes, types and shardings of the state that `create` would make; nothing is allocated."""
  shapes = jax.eval_shape(create)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def load_arrays(directory: Path) -> dict[str, Any]:
  """The newest checkpoint's state as a nested dict of NumPy arrays, for export and warm starts across shapes.

  Raises:
    UserError: there is no checkpoint.
  """
  directory = Path(directory).absolute()
  if not directory.is_dir():
    raise UserError(f'{directory} has no checkpoints; run the stage that trains it first')
  checkpointer = ocp.training.Checkpointer(directory)
  if checkpointer.latest is None:
    raise UserError(f'{directory} has no checkpoints; run the stage that trains it first')
  step = checkpointer.latest.step
  layout = checkpointer.checkpointables_metadata(step).metadata['state']
  # Abstract NumPy arrays ask Orbax for host memory, whatever devices wrote the checkpoint; `empty` touches no page.
  abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), layout)
  loaded = checkpointer.load_checkpointables(step, {'state': abstract})
  checkpointer.close()
  return loaded['state']


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Shapes by name: 'params/pinfm/psi/..'."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape) for path, leaf in leaves}


def _plain(state: TrainState) -> dict[str, Any]:
  """The state as nested dicts, which is the layout on disk."""
  tables = state.tables
  plain = {
    'step': state.step,
    'rng': state.rng,
    'params': state.params,
    'opt_state': {'count': state.opt_state.count, 'mu': state.opt_state.mu, 'nu': state.opt_state.nu},
  }
  if tables is not None:
    plain['tables'] = {'rows': tables.rows_GE}
    if tables.accumulator_G is not None:
      plain['tables']['accumulator'] = tables.accumulator_G
  if state.constants is not None:
    plain['constants'] = {field: getattr(state.constants, field) for field in state.constants.__dataclass_fields__}
  return plain


def _rebuild(like: TrainState, plain: dict[str, Any]) -> TrainState:
  tables, constants = like.tables, like.constants
  if tables is not None:
    tables = type(tables)(plain['tables']['rows'], plain['tables'].get('accumulator'))
  if constants is not None:
    constants = type(constants)(**plain['constants'])
  opt_state = type(like.opt_state)(**plain['opt_state'])
  return TrainState(plain['step'], plain['rng'], plain['params'], opt_state, tables, constants)
