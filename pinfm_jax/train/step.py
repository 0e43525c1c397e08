"""One jitted training step for any task: gather rows, differentiate, update parameters and rows in place."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pinfm_jax.config import TableConfig
from pinfm_jax.model.tables import Tables, gather_rows, init_tables, item_vectors, plan_rows
from pinfm_jax.train.optimizer import Update
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
  """

  step: Array
  rng: Array
  params: Any
  opt_state: optax.OptState
  tables: Tables | None
  constants: Any = None


class Task(Protocol):
  """What differs between pretraining and fine-tuning."""

  tables: TableConfig | None
  update: Update

  def init(self, key: Array) -> Any:
    """Fresh parameters, boxed with their logical axes."""

  def ids(self, batch: Batch, step: Array) -> Array:
    """uint32 [M, 2]: every id whose vector the loss needs."""

  def observe(self, constants: Any, batch: Batch, step: Array) -> Any:
    """The constants after a step's batch was seen, before its loss; most tasks return them as they are."""

  def loss(
    self, params: Any, vectors_MV: Array | None, batch: Batch, step: Array, key: Array, constants: Any
  ) -> tuple[Array, dict[str, Array]]:
    """The loss and the figures to log."""


def state_shardings(task: Task, mesh: Mesh, constants: Any = None) -> TrainState:
  """Shardings of the whole state: parameters by the logical rules, their moments alike, tables by rows."""
  boxed = jax.eval_shape(task.init, jax.random.key(0))
  params = parameter_shardings(mesh, boxed)
  rows = table_sharding(mesh)
  return TrainState(
    step=replicated(mesh),
    rng=replicated(mesh),
    params=params,
    opt_state=optax.ScaleByAdamState(count=replicated(mesh), mu=params, nu=params),
    tables=Tables(rows, rows) if task.tables else None,
    constants=jax.tree.map(lambda _: replicated(mesh), constants),
  )


def init_state(task: Task, mesh: Mesh, seed: int, constants: Any = None) -> Callable[[], TrainState]:
  """A function that makes the fresh state where its shards live; pass it to `jax.eval_shape` for the abstract state."""
  shardings = state_shardings(task, mesh, constants)

  def create() -> TrainState:
    key_params, key_tables, key_run = jax.random.split(jax.random.key(seed), 3)
    params = nn.unbox(task.init(key_params))
    tables = init_tables(key_tables, task.tables, math.lcm(mesh.size, ROW_MULTIPLE)) if task.tables else None
    run = jax.random.key_data(key_run)
    return TrainState(jnp.zeros((), jnp.int32), run, params, task.update.init(params), tables, constants)

  return jax.jit(create, out_shardings=shardings)


def make_step(task: Task) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """The jitted step. The state is donated: parameters and tables are updated in place."""

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    plan = gathered_KE = None
    if state.tables is not None:
      plan = plan_rows(task.ids(batch, state.step), task.tables)
      gathered_KE = gather_rows(state.tables.rows_GE, plan)

    constants = task.observe(state.constants, batch, state.step)

    def loss(params: Any, rows_KE: Array | None) -> tuple[Array, dict[str, Array]]:
      vectors_MV = None if rows_KE is None else item_vectors(rows_KE, plan)
      return task.loss(params, vectors_MV, batch, state.step, key, constants)

    (value, figures), (grads, row_grad_KE) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
      state.params, gathered_KE
    )
    params, opt_state, tables, norm = task.update.apply(
      state.params, state.opt_state, grads, state.tables, plan, row_grad_KE, state.step
    )
    figures = {'loss': value, 'grad_norm': norm, 'learning_rate': task.update.schedule(state.step), **figures}
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, tables=tables, constants=constants)
    return state, figures

  return jax.jit(step, donate_argnums=0)
