"""Where a training run starts: its own checkpoint, another run's, a pretrained model, or nothing."""

import json
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from pinfm_jax.config import MeshConfig
from pinfm_jax.errors import UserError
from pinfm_jax.train.alone import newest
from pinfm_jax.train.checkpoint import SELECTED, Checkpoints, abstract_state, described, plain, rebuilt
from pinfm_jax.train.step import Task, TrainState, init_state, state_shardings
from pinfm_jax.train.stored_tables import StoredState

ROW_STATE = ('tables/accumulator', 'tables/moments')  # of the rows' update rule, which may be another one


class Start(Protocol):
  """What a fresh run can start from instead of scratch."""

  def begin(self, create: Callable[[], TrainState], abstract: TrainState) -> TrainState:
    """The state to start from; `create` makes the fresh state, `abstract` is its shapes, types and shardings."""


@dataclass(frozen=True)
class WarmStart:
  """A pretraining run whose model a fresh run takes over; implements `Start`.

  Attributes:
    directory: of the run (it holds checkpoints/).
    use: 'newest' or 'best', by what was measured.
    groups: the top-level parameter groups that are taken.
  """

  directory: Path
  use: str = 'newest'
  groups: tuple[str, ...] = ('pinfm', 'log_temperature')

  def begin(self, create: Callable[[], TrainState], abstract: TrainState) -> TrainState:
    """See `warm_started`."""
    return warm_started(create, abstract, self)


def starting_state(
  task: Task,
  mesh: Mesh,
  seed: int,
  constants: Any,
  position: dict[str, Any],
  checkpoints: Checkpoints,
  resume: str = '',
  warm_start: Start | None = None,
  layout: MeshConfig = MeshConfig(),
) -> TrainState:
  """The state from which a run goes on.

  Restore precedence:
    1. the newest checkpoint of the run's own directory, if there is one;
    2. the newest checkpoint of the run named by `resume`: everything, its step too; same shapes, same data order;
    3. `warm_start`: a pretrained model's tables, accumulators and parameter groups (`WarmStart`), all that an
       earlier run on less data has learned (`growth.Continued`), or a bundle or imported table rows
       (`serve.warm_start`); all else is initialised;
    4. scratch.
  Arrays are read straight into their shardings, and what is read is never initialised first.

  Raises:
    UserError: what should be read is not there, or does not fit.
  """
  create, abstract = fresh_state(task, mesh, seed, constants, layout)
  if checkpoints.latest_step is not None:
    return checkpoints.restore(abstract, position)
  if resume:
    return _resumed(Path(resume), abstract, position)
  if warm_start:
    return warm_start.begin(create, abstract)
  return create()


def fresh_state(
  task: Task, mesh: Mesh, seed: int, constants: Any, layout: MeshConfig = MeshConfig()
) -> tuple[Callable[[], TrainState], TrainState]:
  """A function that makes the fresh state, and its shapes, types and shardings; nothing is allocated."""
  create = init_state(task, mesh, seed, constants, layout)
  return create, abstract_state(create, state_shardings(task, mesh, constants, layout))


def warm_started(create: Any, abstract: TrainState, warm_start: WarmStart) -> TrainState:
  """The pretrained tables, accumulators and parameters, and fresh values for everything else.

  What the rows' update rule keeps starts fresh if the pretraining run had another rule. Where that run averaged its
  weights, the averages are taken.

  Args:
    create: jitted function that makes the fresh state.
    abstract: its shapes, types and shardings.
    warm_start: what to take.

  Raises:
    UserError: there is no checkpoint, or its arrays differ from the model's.
  """
  source = _open(warm_start.directory)
  step = _chosen(source, warm_start.directory, warm_start.use)
  wanted, found = plain(abstract), source.layout(step)
  have = described(found)
  expected = described(wanted)
  names = {
    name: what
    for name, what in expected.items()
    if _is_pretrained(name, warm_start.groups) and (name not in ROW_STATE or name in have)
  }
  for name in have:  # an option of the model's input brings parameters of its own: they must not be lost in silence
    if _is_pretrained(name, warm_start.groups) and name not in expected and name not in ROW_STATE:
      raise UserError(
        f'{warm_start.directory} holds {name}, which the model does not have; '
        'fine-tune with the model settings it was pretrained with, or set finetune.init=scratch'
      )
  for name, what in names.items():
    if have.get(name) != what:
      raise UserError(
        f'{warm_start.directory} holds {name} as {have.get(name)} where the model has {what}; '
        'fine-tune with the model settings it was pretrained with, or set finetune.init=scratch'
      )
  places = {_stored_name(name, have): name for name in names}
  read = _selected(source.read(step, _masked(wanted, found, places)))
  read = {places[name]: array for name, array in read.items()}
  source.close()
  fresh = rest_of(create, wanted, names)()
  leaves, tree = jax.tree_util.tree_flatten_with_path(wanted)
  merged = jax.tree_util.tree_unflatten(tree, [(read | fresh)[_name(path)] for path, _ in leaves])
  return rebuilt(abstract, merged)


def stored_state(directory: Path, use: str = 'newest') -> StoredState:
  """A checkpoint of a run, opened for reading a part of it.

  Args:
    directory: of the run (it holds checkpoints/).
    use: 'newest' or 'best', by what was measured.

  Raises:
    UserError: there is none.
  """
  return StoredState(directory / 'checkpoints', _best_step(directory) if use == 'best' else None)


def _best_step(directory: Path) -> int:
  """As `Checkpoints.best_step`, from the files: opening the checkpoints would wait for other processes."""
  files = newest(directory / 'checkpoints').parent.glob('[0-9]*/metrics/metrics')
  measured = [
    (json.loads(file.read_text())[SELECTED], int(file.parts[-3])) for file in files if file.parts[-3].isdigit()
  ]
  return _measured(min(measured)[1] if measured else None, directory)


def _chosen(source: Checkpoints, directory: Path, use: str) -> int:
  return _measured(source.best_step if use == 'best' else source.latest_step, directory)


def _measured(step: int | None, directory: Path) -> int:
  if step is None:
    raise UserError(
      f'no checkpoint of {directory} was measured; set pretrain.use_checkpoint=newest, '
      'or pretrain with pretrain.eval_every and pretrain.keep_best'
    )
  return step


def _is_pretrained(name: str, groups: tuple[str, ...]) -> bool:
  top, *rest = name.split('/')
  return top == 'tables' or (top == 'params' and rest[0] in groups)


def rest_of(create: Any, wanted: dict[str, Any], names: Container[str]) -> Any:
  """A jitted function that makes the initial values of everything but `names`, by name.

  The compiler drops what they do not need: a table that is read from elsewhere is not drawn.
  """
  shardings = {name: leaf.sharding for name, leaf in _selected(wanted).items() if name not in names}

  def rest() -> dict[str, jax.Array]:
    return {name: leaf for name, leaf in _selected(plain(create())).items() if name in shardings}

  return jax.jit(rest, out_shardings=shardings)


def _resumed(directory: Path, abstract: TrainState, position: dict[str, Any]) -> TrainState:
  source = _open(directory)
  state = source.restore(abstract, position)
  source.close()
  return state


def _open(directory: Path) -> Checkpoints:
  """The checkpoints of another run; nothing is made or deleted there."""
  path = directory if directory.name == 'checkpoints' else directory / 'checkpoints'
  if not path.is_dir():
    raise UserError(f'{path} has no checkpoints; run the stage that trains it first')
  checkpoints = Checkpoints(path, read_only=True)
  if checkpoints.latest_step is None:
    raise UserError(f'{path} has no checkpoints; run the stage that trains it first')
  return checkpoints


def _stored_name(name: str, have: Container[str]) -> str:
  """Where a checkpoint holds what is used as an array: among the averages of the weights, if they were kept."""
  averaged = 'average/rows' if name == 'tables/rows' else f'average/{name}'
  return averaged if averaged in have else name


def _masked(wanted: dict[str, Any], found: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
  """The layout found on disk with shardings for the arrays that are taken and `...` for the rest.

  Args:
    wanted: abstract arrays by nested name.
    found: the layout.
    places: name on disk -> name in `wanted` of each array that is taken.
  """
  targets = _selected(wanted)

  def take(path: tuple[Any, ...], _: Any) -> Any:
    return targets[places[_name(path)]] if _name(path) in places else ...

  return jax.tree_util.tree_map_with_path(take, found)


def _selected(tree: Any) -> dict[str, Any]:
  """Leaves by name, without those that were left out."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {_name(path): leaf for path, leaf in leaves if leaf is not ...}


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
