"""Continued pretraining: yesterday's state in a model whose vocabularies have grown.

What is known goes on: parameters and both Adam moments (and the count that corrects them), tables and accumulators.
New actions and surfaces start as in a fresh model, with zero moments. Steps, schedule, data order and random keys are
the new run's own: it warms up and decays over its `pretrain.steps`.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pinfm_jax.config import PinFMConfig
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import from_dict
from pinfm_jax.train.checkpoint import Checkpoints, described, plain, rebuilt
from pinfm_jax.train.restore import rest_of
from pinfm_jax.train.step import TrainState
from pinfm_jax.workdir import read_settings

Array = jax.Array
_HASH = ('sub_tables', 'rows', 'width', 'hash_seed')


@dataclass(frozen=True)
class EarlierRun:
  """A pretraining run that another one continues.

  Attributes:
    directory: of the run.
    step: of its newest checkpoint.
    model: its configuration, with the sizes of its vocabularies.
    data: checksum of the data set it was trained on.
    until_ms: the time before which it read events; None: all but each user's last.
    spared: of some users it read less than that (`data.pretrain_overlap_users`).
  """

  directory: Path
  step: int
  model: PinFMConfig
  data: str
  until_ms: int | None
  spared: bool = False

  @classmethod
  def open(cls, path: str | Path, seed: int) -> 'EarlierRun':
    """Finds the run.

    Args:
      path: the workdir of an earlier run (the tower of this seed is taken), or the directory of its pretraining.
      seed: see path.

    Raises:
      UserError: there is no checkpoint.
    """
    places = (Path(path) / f'seed{seed}' / 'pretrain', Path(path))
    directory = next((place for place in places if (place / 'checkpoints').is_dir()), None)
    if directory is None:
      raise UserError(
        f'pretrain.continue_from is {str(path)!r}, which has no checkpoints (looked in {places[0]} and {places[1]}); '
        'expected the workdir of an earlier run'
      )
    with closing(Checkpoints(directory / 'checkpoints', read_only=True)) as checkpoints:
      step = checkpoints.latest_step
      if step is None:
        raise UserError(f'{directory} has no checkpoint to continue from; let that run save one first')
      position = checkpoints.position(step)
    settings = read_settings(directory)
    spared = settings['data'].get('pretrain_overlap_users') == 'others' and settings['data'].get('pretrain_overlap')
    model = from_dict(PinFMConfig, settings['model'])
    return cls(directory, step, model, position['data'], position['until_ms'], bool(spared))


@dataclass(frozen=True)
class Continued:
  """Where continued pretraining starts: implements `restore.Start`.

  Attributes:
    earlier: the run that is continued.
    model: the configuration of the model that goes on.
  """

  earlier: EarlierRun
  model: PinFMConfig

  def begin(self, create: Callable[[], TrainState], abstract: TrainState) -> TrainState:
    """A fresh state with everything that the earlier run has learned; tables are read, never drawn.

    Args:
      create: jitted function that makes the fresh state.
      abstract: its shapes, types and shardings.

    Raises:
      UserError: the models differ in more than their vocabularies.
    """
    check_growth(self.earlier.model, self.model)
    wanted = plain(abstract)
    tables = wanted.get('tables', {})
    fresh = rest_of(create, wanted, {f'tables/{name}' for name in tables})()
    old = self._read(wanted)
    dense = {name: wanted[name] for name in ('params', 'opt_state')}
    grow = jax.jit(
      lambda old, fresh: grow_state(old, self.earlier.model, self.model, fresh),
      out_shardings=jax.tree.map(lambda leaf: leaf.sharding, dense),
    )
    fresh = jax.tree_util.tree_map_with_path(
      lambda path, leaf: fresh.get(_name(path)), {name: tree for name, tree in wanted.items() if name != 'tables'}
    )
    grown = grow({name: old[name] for name in dense}, {name: fresh[name] for name in dense})
    return rebuilt(abstract, {**fresh, **grown, 'tables': old.get('tables')})

  def _read(self, wanted: dict[str, Any]) -> dict[str, Any]:
    """Parameters and optimizer state of the earlier run on every device, and its tables where their shards live."""
    with closing(Checkpoints(self.earlier.directory / 'checkpoints', read_only=True)) as checkpoints:
      layout, tables = checkpoints.layout(self.earlier.step), wanted.get('tables', {})
      found, expected = described(layout.get('tables', {})), described(tables)
      if found != expected:
        raise UserError(f'{self.earlier.directory} has tables {found}, the model {expected}: use the same settings')
      everywhere = NamedSharding(jax.sharding.get_mesh(), P())
      read = {name: jax.tree.map(lambda _: ..., tree) for name, tree in layout.items()}
      for name in ('params', 'opt_state'):
        read[name] = jax.tree.map(
          lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), layout[name]
        )
      return checkpoints.read(self.earlier.step, read | ({'tables': tables} if tables else {}))


def check_growth(old: PinFMConfig, new: PinFMConfig) -> None:
  """Raises UserError unless the new model's tables are the old one's and its vocabularies are at least as large."""
  for name in _HASH:
    before, now = getattr(old.tables, name), getattr(new.tables, name)
    if before != now:
      raise UserError(f'model.tables.{name} is {now}, the run that is continued has {before}: use the same')
  for name, before, now in (
    *((name, getattr(old, name), getattr(new, name)) for name in ('content', 'content_width')),
    *(
      (f'tower.{name}', getattr(old.tower, name), getattr(new.tower, name))
      for name in ('backbone', 'heads', 'time_gap_buckets', 'dot_product')
    ),
  ):
    if before != now:
      raise UserError(f'model.{name} is {now}, the run that is continued has {before}: use the same')
  for name in ('num_actions', 'num_surfaces'):
    before, now = getattr(old, name), getattr(new, name)
    if now < before:
      raise UserError(
        f'the data set has {now} {name[4:]}, the run that is continued has {before}: '
        'continue on the same data set, grown'
      )


def grow_state(
  old: Mapping[str, Any], old_model: PinFMConfig, new_model: PinFMConfig, fresh: Mapping[str, Any]
) -> dict[str, Any]:
  """Puts learned arrays into the shapes of a model with larger vocabularies.

  Args:
    old: nested dicts of arrays, as a checkpoint has them ('params', 'opt_state', ..); those with the names of `fresh`
      are taken.
    old_model: the sizes of its vocabularies.
    new_model: those of the model that goes on.
    fresh: the fresh state of that model, likewise.

  Returns:
    Like `fresh`: an old row has the old value, a new row the fresh one.

  Raises:
    UserError: an array is missing, or differs in more than the vocabularies' sizes.
  """
  known = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(dict(old))}
  leaves, tree = jax.tree_util.tree_flatten_with_path(dict(fresh))
  extra = known.keys() - {_name(path) for path, _ in leaves}
  if extra:
    raise UserError(f'the run that is continued has {min(extra)}, which the model has not: use its model settings')
  grown = []
  for path, leaf in leaves:
    name = _name(path)
    if name not in known:
      raise UserError(f'the run that is continued has no {name}, which the model has: use its model settings')
    grown.append(_grown(name, known[name], leaf, old_model, new_model))
  return jax.tree_util.tree_unflatten(tree, grown)


def _grown(name: str, old: Array, fresh: Array, old_model: PinFMConfig, new_model: PinFMConfig) -> Array:
  if old.shape == fresh.shape:
    return jnp.asarray(old)
  actions = (old_model.num_actions, new_model.num_actions)
  surfaces = (old_model.num_surfaces, new_model.num_surfaces)
  axes = [axis for axis, (a, b) in enumerate(zip(old.shape, fresh.shape, strict=False)) if a != b]
  if old.ndim == fresh.ndim and len(axes) == 1:
    (axis,) = axes
    sizes, table = (old.shape[axis], fresh.shape[axis]), name.rpartition('/')[2]
    if table == 'action_embedding' and sizes == (actions[0] + 1, actions[1] + 1):
      # The last row marks a candidate and stays the last one.
      return jnp.asarray(fresh).at[: actions[0]].set(old[:-1]).at[-1].set(old[-1])
    if (table == 'surface_embedding' and sizes == surfaces) or (table != 'action_embedding' and sizes == actions):
      return jnp.asarray(fresh).at[(slice(None),) * axis + (slice(0, old.shape[axis]),)].set(old)
  raise UserError(
    f'the run that is continued has {name} of shape {tuple(old.shape)}, the model {tuple(fresh.shape)}: more than the '
    'vocabularies differs, use its model settings'
  )


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
