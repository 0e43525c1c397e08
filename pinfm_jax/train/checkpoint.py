"""Checkpoints of a training run (Orbax v1): atomic, resumable, and checked against the data they were trained on."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from pinfm_jax.config import PinFMConfig
from pinfm_jax.errors import UserError
from pinfm_jax.train.alone import check_together
from pinfm_jax.train.step import TrainState
from pinfm_jax.train.stored_tables import chunked_saves, read_sharded

logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax reports every file it touches

SELECTED = 'selected'  # the one figure of a checkpoint by which the best are kept: the lower, the better


@dataclass(frozen=True)
class Keep:
  """Which checkpoints stay: the newest `last`, and the `best` by what was measured."""

  last: int = 2
  best: int = 0


class Checkpoints:
  """The checkpoints of one run's directory.

  A checkpoint is a folder that appears by renaming, so a killed save leaves nothing that looks whole. Besides the
  state it holds the data position: the next step, the order's seed and the data set's checksum.
  """

  def __init__(self, directory: Path, keep: Keep = Keep(), blocking: bool | None = None, read_only: bool = False):
    """Opens (or makes) the directory.

    Args:
      directory: of the checkpoints; all processes give the same one.
      keep: which checkpoints stay.
      blocking: whether `save` returns only when all is on disk; None = on CPU. There an array that is being written
        in the background cannot be donated, so the next step would copy the tables. An accelerator's save copies
        the state to the host first, then trains on while it is written.
      read_only: leave what lies there as it is, half-written saves of a run that may be at work included.
    """
    check_together()
    self._directory = Path(directory).absolute()
    self._directory.mkdir(parents=True, exist_ok=True)
    self.blocking = jax.default_backend() == 'cpu' if blocking is None else blocking
    self._checkpointer = ocp.training.Checkpointer(
      self._directory,
      context=chunked_saves(),
      preservation_policy=_policy(keep),
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      cleanup_tmp_directories=not read_only,
    )

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, or None."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  @property
  def best_step(self) -> int | None:
    """Step of the checkpoint that was measured best, the earlier of equals; None if none was measured."""
    measured = [(c.metrics[SELECTED], c.step) for c in self._checkpointer.checkpoints if c.metrics]
    return min(measured)[1] if measured else None

  def save(self, state: TrainState, position: dict[str, Any], held_out_loss: float | None = None) -> None:
    """Writes the state; see `blocking` for when it is on disk.

    Args:
      state: what `restore` gives back.
      position: what a run that continues must agree with.
      held_out_loss: by which the best are kept, if it was measured.
    """
    step = int(state.step)
    if self.latest_step == step:
      return
    metrics = None if held_out_loss is None else {SELECTED: held_out_loss}
    response = self._checkpointer.save_checkpointables_async(
      step, {'state': plain(state), 'position': position}, metrics=metrics
    )
    if self.blocking and response is not None:
      response.result()

  def restore(self, abstract: TrainState, position: dict[str, Any], step: int | None = None) -> TrainState:
    """Reads a checkpoint into the shardings of an abstract state.

    Args:
      abstract: shapes, types and shardings (`abstract_state`).
      position: what the run expects; it must equal what was saved.
      step: of the checkpoint; None = the newest.

    Raises:
      UserError: the checkpoint belongs to other data or another configuration, or cannot be read.
    """
    step = self.latest_step if step is None else step
    self._check_layout(step, plain(abstract))
    loaded = self._load(step, {'state': plain(abstract), 'position': None})
    saved = loaded['position']
    for name in (*position, *saved):
      if saved.get(name) != position.get(name):
        raise UserError(
          f'{self._directory}/{step} was written with {name} {saved.get(name)!r}, this run has {position.get(name)!r}; '
          'use another --workdir or the settings it was written with'
        )
    return rebuilt(abstract, loaded['state'])

  def position(self, step: int) -> dict[str, Any]:
    """The data position that a checkpoint was saved with."""
    return self._load(step, {'position': None})['position']

  def layout(self, step: int) -> dict[str, Any]:
    """Shape and type of every array of a checkpoint's state, as nested dicts."""
    return self._checkpointer.checkpointables_metadata(step).metadata['state']

  def read(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a part of a checkpoint's state, each array into its sharding; `...` leaves one out.

    Args:
      step: of the checkpoint.
      abstract: nested dicts as `layout` gives them, with shardings.

    Raises:
      UserError: it cannot be read.
    """
    return self._load(step, {'state': abstract})['state']

  def close(self) -> None:
    """Waits for what is under way."""
    self._checkpointer.close()

  def _load(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads through Orbax, but for tables: it would hold a device's whole part twice while it reads."""
    tables = abstract.get('state', {}).get('tables', {})
    if tables:
      left_out = {**abstract['state'], 'tables': jax.tree.map(lambda _: ..., tables)}
      abstract = {**abstract, 'state': left_out}
    try:
      loaded = self._checkpointer.load_checkpointables(step, abstract)
      if tables:
        path = self._directory / str(step)
        loaded['state']['tables'] = {
          name: wanted if wanted is ... else read_sharded(path, f'tables.{name}', wanted)
          for name, wanted in tables.items()
        }
      return loaded
    except (ValueError, KeyError, FileNotFoundError, TypeError) as error:
      reason = str(error).strip().splitlines()[0][:300]
      raise UserError(
        f'{self._directory}/{step} does not fit this configuration ({reason}); '
        'use the configuration it was written with, or another --workdir'
      ) from error

  def _check_layout(self, step: int, expected: dict[str, Any]) -> None:
    """Compares names, shapes and types before anything is read: Orbax would fail halfway, with reads under way."""
    found, wanted = described(self.layout(step)), described(expected)
    for name in (*wanted, *found):
      if found.get(name) != wanted.get(name):
        raise UserError(
          f'{self._directory}/{step} does not fit this configuration (it has {name} of shape {found.get(name)}, '
          f'the model {wanted.get(name)}); use the configuration it was written with, or another --workdir'
        )


def unseen_in_shapes(model: PinFMConfig) -> dict[str, Any]:
  """Settings that change what arrays mean and not their shapes; a part of a checkpoint's position."""
  tables, tower = model.tables, model.tower
  options = ['dot_product'] if tower.dot_product else []
  return {
    'hash': [tables.sub_tables, tables.rows, tables.hash_seed],
    'tower': [tower.backbone, tower.heads, tower.max_positions, *options],
  }


def abstract_state(create: Any, shardings: TrainState) -> TrainState:
  """Shapes, types and shardings of the state that `create` would make; nothing is allocated."""
  shapes = jax.eval_shape(create)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def described(tree: Any) -> dict[str, str]:
  """Type and shape by name: 'params/pinfm/psi/..' -> 'float32[8,4]'."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'
    for path, leaf in leaves
  }


def plain(state: TrainState) -> dict[str, Any]:
  """The state as nested dicts, which is the layout on disk; what a state does not have (None) is left out."""
  tables = state.tables
  nested = {
    'step': state.step,
    'rng': state.rng,
    'params': state.params,
    'opt_state': {'count': state.opt_state.count, 'mu': state.opt_state.mu, 'nu': state.opt_state.nu},
  }
  if tables is not None:
    nested['tables'] = {'rows': tables.rows_GE, 'accumulator': tables.accumulator_G, 'moments': tables.moments_G2E}
    nested['tables'] = {name: array for name, array in nested['tables'].items() if array is not None}
  if state.constants is not None:
    nested['constants'] = {field: getattr(state.constants, field) for field in state.constants.__dataclass_fields__}
  if state.average is not None:
    nested['average'] = state.average
  return nested


def rebuilt(like: TrainState, nested: dict[str, Any]) -> TrainState:
  """The inverse of `plain`, for a state of the same kind."""
  tables, constants = like.tables, like.constants
  if tables is not None:
    tables = type(tables)(*(nested['tables'].get(name) for name in ('rows', 'accumulator', 'moments')))
  if constants is not None:
    constants = type(constants)(**nested['constants'])
  opt_state = type(like.opt_state)(**nested['opt_state'])
  average = nested.get('average')
  return TrainState(nested['step'], nested['rng'], nested['params'], opt_state, tables, constants, average)


def _policy(keep: Keep) -> Any:
  policies = ocp.training.preservation_policies
  kept = [policies.LatestN(keep.last)]
  if keep.best:
    # Orbax keeps the last of its ascending order, so the order is reversed for a loss.
    best = policies.BestN(
      get_metric_fn=lambda metrics: metrics[SELECTED],
      reverse=True,
      n=keep.best,
      keep_checkpoints_without_metrics=False,
    )
    kept.append(best)
  return policies.AnyPreservationPolicy(kept)
