"""One jitted training step for any task: gather rows, differentiate, update parameters and rows in place."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pinfm_jax.config import MeshConfig, TableConfig
from pinfm_jax.model.hashing import hash_uniform
from pinfm_jax.model.tables import Tables, init_rows, table_rows
from pinfm_jax.train.exchange import Exchange, fitted_capacity
from pinfm_jax.train.optimizer import RowStep, Update
from pinfm_jax.train.sharding import parameter_shardings, replicated, table_sharding

Array = jax.Array
Batch = dict[str, Array]

# Tables are rounded up to it on every mesh, so that a checkpoint of 8 devices has the shapes that 1 or 256 expect.
ROW_MULTIPLE = 256


@flax.struct.dataclass
class TrainState:
  """Everything a checkpoint holds of a training run, but for the data position.

  Attributes:
    step: int32, updates done.
    rng: key data (uint32) from which every step's key is folded.
    params: dense parameters.
    opt_state: their optimizer state.
    tables: item tables with their accumulators, or None.
    constants: values that no gradient trains: normalisation statistics, running item counts (`Task.observe`); or None.
    average: running averages of the weights ('params', maybe 'rows'), if the task's update keeps them (`evaluated`).
  """

  step: Array
  rng: Array
  params: Any
  opt_state: optax.OptState
  tables: Tables | None
  constants: Any = None
  average: Any = None


class Task(Protocol):
  """What differs between pretraining and fine-tuning."""

  tables: TableConfig | None
  update: Update

  def init(self, key: Array) -> Any:
    """Fresh parameters, boxed with their logical axes."""

  def ids(self, batch: Batch, step: Array) -> tuple[Array, ...]:
    """uint32 arrays [A, B, 2] of every id whose vector the loss needs; A lies over the mesh as examples do."""

  def observe(self, constants: Any, batch: Batch, step: Array) -> Any:
    """The constants after a step's batch was seen, before its loss; most tasks return them as they are."""

  def loss(
    self, params: Any, vectors: tuple[Array, ...], batch: Batch, step: Array, key: Array, constants: Any
  ) -> tuple[Array, dict[str, Array]]:
    """The loss and the figures to log; `vectors` are those of `ids`, [A, B, V], none for a task without tables."""


def state_shardings(task: Task, mesh: Mesh, constants: Any = None, layout: MeshConfig = MeshConfig()) -> TrainState:
  """Shardings of the whole state: parameters by the logical rules, their moments alike, tables by rows."""
  boxed = jax.eval_shape(task.init, jax.random.key(0))
  params = parameter_shardings(mesh, boxed)
  rows = table_sharding(mesh, layout.table_axes)
  rule = task.update.config.table_rule
  tables = Tables(rows, rows if rule == 'adagrad' else None, rows if rule == 'adam' else None)
  return TrainState(
    step=replicated(mesh),
    rng=replicated(mesh),
    params=params,
    opt_state=optax.ScaleByAdamState(count=replicated(mesh), mu=params, nu=params),
    tables=tables if task.tables else None,
    constants=jax.tree.map(lambda _: replicated(mesh), constants),
    average=_averaged_part(task.update, params, rows),
  )


def stored_rows(task: Task, mesh: Mesh) -> int:
  """G, rows of the stored table on this mesh: all sub-tables, rounded up."""
  return table_rows(task.tables, math.lcm(mesh.size, ROW_MULTIPLE))


def init_state(
  task: Task, mesh: Mesh, seed: int, constants: Any = None, layout: MeshConfig = MeshConfig()
) -> Callable[[], TrainState]:
  """A function that makes the fresh state where its shards live; pass it to `jax.eval_shape` for the abstract state."""
  shardings = state_shardings(task, mesh, constants, layout)

  def create() -> TrainState:
    key_params, key_tables, key_run = jax.random.split(jax.random.key(seed), 3)
    params = nn.unbox(task.init(key_params))
    tables = None
    if task.tables:
      tables = _init_tables(task, mesh, jax.random.bits(key_tables, dtype=jnp.uint32), shardings.tables)
    run = jax.random.key_data(key_run)
    average = _averaged_part(task.update, params, tables and tables.rows_GE)
    return TrainState(jnp.zeros((), jnp.int32), run, params, task.update.init(params), tables, constants, average)

  return jax.jit(create, out_shardings=shardings)


def _init_tables(task: Task, mesh: Mesh, salt: Array, shardings: Tables) -> Tables:
  """Each device makes its own rows; nothing the size of a table stands beside the table."""
  rows, spec = stored_rows(task, mesh), shardings.rows_GE.spec
  axes = spec[0] if isinstance(spec[0], tuple) else (spec[0],)
  own = rows // math.prod(mesh.shape[axis] for axis in axes)

  def make(salt: Array) -> Array:
    return init_rows(task.tables, own, salt, jax.lax.axis_index(axes) * own)

  rows_GE = jax.shard_map(make, mesh=mesh, in_specs=P(), out_specs=spec, check_vma=False)(salt)
  accumulator_G = None if shardings.accumulator_G is None else jnp.zeros(rows, jnp.float32)
  moments_G2E = None if shardings.moments_G2E is None else jnp.zeros((rows, 2, rows_GE.shape[1]), jnp.float32)
  return Tables(rows_GE, accumulator_G, moments_G2E)


def _averaged_part(update: Update, params: Any, rows: Any) -> Any:
  """Of parameters and rows (or what stands for them), those that are averaged."""
  if not update.ema_decay:
    return None
  return {'params': params} | ({'rows': rows} if update.ema_tables else {})


def _with_average(update: Update, state: TrainState) -> TrainState:
  """The state after a step with its average brought up to it, if it keeps one."""
  if state.average is None:
    return state
  weights = _averaged_part(update, state.params, state.tables and state.tables.rows_GE)
  return state.replace(average=update.averaged(state.average, weights, state.step))


def evaluated(state: TrainState) -> TrainState:
  """The state with the averaged weights in place of the last ones, if it has any: what is measured and used."""
  if state.average is None:
    return state
  tables = state.tables
  if 'rows' in state.average:
    tables = tables._replace(rows_GE=state.average['rows'])
  return state.replace(params=state.average['params'], tables=tables)


def fitted_layout(task: Task, state: TrainState, layout: MeshConfig, batch: Batch) -> MeshConfig:
  """The layout with an exchange capacity that serves batches like this one in a single round; one that is set stays."""
  owners = math.prod(jax.sharding.get_mesh().shape[axis] for axis in layout.table_axes)
  if state.tables is None or layout.exchange_capacity or owners == 1:
    return layout
  ids = jax.jit(task.ids)(batch, state.step)
  capacity = fitted_capacity(task.tables, state.tables.rows_GE.shape[0], layout.table_axes, ids)
  return replace(layout, exchange_capacity=capacity)


def make_step(
  task: Task, layout: MeshConfig = MeshConfig()
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """The jitted step, to be called under `jax.set_mesh`. The state is donated: everything is updated in place."""

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    state = state.replace(constants=task.observe(state.constants, batch, state.step))
    state, figures = move(state, batch, key)
    return _with_average(task.update, state), figures

  def move(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, dict[str, Array]]:
    if state.tables is None:
      return _dense_step(task, state, batch, key)
    exchange = Exchange(task.tables, state.tables.rows_GE.shape[0], layout.table_axes, layout.exchange_capacity)
    ids = task.ids(batch, state.step)
    plan = exchange.plan(ids)

    def loss(params: Any, rows_KE: Array) -> tuple[Array, dict[str, Array]]:
      vectors = exchange.vectors(rows_KE, plan, ids)
      return task.loss(params, vectors, batch, state.step, key, state.constants)

    rows_KE = exchange.lookup(state.tables.rows_GE, plan)
    if 'tables' in task.update.config.frozen:
      (value, figures), grads = jax.value_and_grad(loss, has_aux=True)(state.params, rows_KE)
      state, _, figures = _apply(task, state, value, figures, grads, 0.0)
      return state, figures | exchange.traffic(plan)
    (value, figures), (grads, row_grad_KE) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
      state.params, rows_KE
    )
    summed = exchange.sum_gradients(plan, row_grad_KE)
    state, row_step, figures = _apply(task, state, value, figures, grads, summed.squares)
    salt = hash_uniform(state.step, state.rng[-1])
    tables = exchange.update(
      state.tables, plan, row_grad_KE, summed, row_step.clip, row_step.learning_rate, salt, row_step.adam
    )
    return state.replace(tables=tables), figures | exchange.traffic(plan)

  return jax.jit(step, donate_argnums=0)


def _dense_step(task: Task, state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, dict[str, Array]]:
  """The step of a model without item tables."""

  def loss(params: Any) -> tuple[Array, dict[str, Array]]:
    return task.loss(params, (), batch, state.step, key, state.constants)

  (value, figures), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
  state, _, figures = _apply(task, state, value, figures, grads, 0.0)
  return state, figures


def _apply(
  task: Task, state: TrainState, loss: Array, figures: dict[str, Array], grads: Any, row_squares: Array | float
) -> tuple[TrainState, RowStep, dict[str, Array]]:
  """Moves the parameters and completes the figures."""
  params, opt_state, row_step, norm = task.update.apply(state.params, state.opt_state, grads, row_squares, state.step)
  figures = {'loss': loss, 'grad_norm': norm, 'learning_rate': task.update.schedule(state.step), **figures}
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state), row_step, figures
