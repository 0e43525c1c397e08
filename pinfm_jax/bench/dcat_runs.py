"""The programs that `bench dcat` times: each form of DCAT over random histories and candidates."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.bench.timing import interleave
from pinfm_jax.config import PinFMConfig, TableConfig, TowerConfig
from pinfm_jax.model import dcat_forms
from pinfm_jax.model.pinfm import EventBatch, PinFM, no_events

Array = jax.Array

FORMS = ('DCAT', 'gather', 'gather in chunks', 'rotate-replace', 'dense', 'dense, last output')


@dataclass(frozen=True)
class Case:
  """A tower and the sizes of its passes.

  Attributes:
    name: of the tower.
    tower: its configuration; positions are made to fit.
    item_width: of the item vectors.
    candidates: C of each user.
    length: L.
    dense_rows: candidates that the dense form is timed on.
    gather_rows: rows that the gather form and rotate-replace run at a time.
    chunk_rows: rows of "gather in chunks", whose copies of K/V stay in the cache. Both divide users * candidates.
    training_users: histories of a training step.
    users: histories of a serving batch.
  """

  name: str
  tower: TowerConfig
  item_width: int
  candidates: int
  length: int
  dense_rows: int
  gather_rows: int
  chunk_rows: int
  training_users: int
  users: int = 1

  def describe(self) -> str:
    """In words."""
    tower = self.tower
    return (
      f'{tower.layers} layers x {tower.width}, {tower.heads} heads, {tower.dtype}, L={self.length}, '
      f'{self.users} x {self.candidates:,} candidates'
    )


class Run(NamedTuple):
  """A program, and how many candidates it handles."""

  call: Callable[[int], Any]
  candidates: int


def serving_runs(case: Case, forms: tuple[str, ...] = FORMS) -> dict[str, Run]:
  """Compiled on their first call; each returns the outputs at the candidates' positions."""
  model, params, history_ULV, events = _model(case, case.users)
  candidates_UCV = _normal(2, case.users, case.candidates, case.item_width)
  rows_BV = candidates_UCV.reshape(-1, case.item_width)
  user_B = jnp.repeat(jnp.arange(case.users), case.candidates)

  # Everything is an argument: what is a constant would be folded into the program.
  @jax.jit
  def ours(params: Any, history_ULV: Array, events: EventBatch, candidates_UCV: Array) -> Array:
    apply = partial(model.apply, params)
    _, context = apply(history_ULV, events, every_output=False, method='encode')
    return apply(candidates_UCV, context, events.mask_UL, method='cross')

  @partial(jax.jit, static_argnums=(0, 1))
  def by_rows(layout: Any, rows: int, params: Any, history_ULV: Array, events: EventBatch, rows_BV: Array) -> Array:
    apply = partial(model.apply, params)
    _, context = apply(history_ULV, events, every_output=False, method='encode')

    def chunk(inputs: tuple[Array, Array]) -> Array:
      vectors_BV, user_B = inputs
      return apply(vectors_BV[:, None], context, events.mask_UL, user_M=user_B, layout=layout, method='cross')

    chunks = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), (rows_BV, user_B))
    return jax.lax.map(chunk, chunks)

  @partial(jax.jit, static_argnums=0)
  def dense(every_output: bool, params: Any, history_ULV: Array, events: EventBatch, rows_BV: Array) -> Array:
    inputs = history_ULV, events, rows_BV, jnp.arange(len(rows_BV)) % case.users
    return model.apply(params, *inputs, every_output=every_output, method=dcat_forms.dense)

  user, total, few_BV = (params, history_ULV, events), case.users * case.candidates, rows_BV[: case.dense_rows]
  runs = {
    'DCAT': Run(lambda _: ours(*user, candidates_UCV), total),
    'gather': Run(lambda _: by_rows(dcat_forms.gather, case.gather_rows, *user, rows_BV), total),
    'gather in chunks': Run(lambda _: by_rows(dcat_forms.gather, case.chunk_rows, *user, rows_BV), total),
    'rotate-replace': Run(lambda _: by_rows(dcat_forms.rotate_replace, case.gather_rows, *user, rows_BV), total),
    'dense': Run(lambda _: dense(True, *user, few_BV), len(few_BV)),
    'dense, last output': Run(lambda _: dense(False, *user, few_BV), len(few_BV)),
  }
  return {form: runs[form] for form in forms}


def training_runs(case: Case, candidates: int) -> dict[str, Run]:
  """Gradients of a random sum of the outputs by parameters and item vectors: 'DCAT' and 'dense'."""
  users = case.training_users
  model, params, history_ULV, events = _model(case, users)
  candidates_UCV = _normal(2, users, candidates, case.item_width)
  weight_UCO = _normal(3, users, candidates, case.tower.output_width)

  def ours(params: Any, history_ULV: Array, candidates_UCV: Array) -> Array:
    h_ULO, context = model.apply(params, history_ULV, events, train=True, method='encode')
    output_UCO = model.apply(params, candidates_UCV, context, events.mask_UL, train=True, method='cross')
    return jnp.sum(weight_UCO * output_UCO) + jnp.sum(weight_UCO[:, :1] * h_ULO)

  def dense(params: Any, history_ULV: Array, candidates_UCV: Array) -> Array:
    rows_BV, user_B = candidates_UCV.reshape(-1, case.item_width), jnp.repeat(jnp.arange(users), candidates)
    output_BO = model.apply(params, history_ULV, events, rows_BV, user_B, method=dcat_forms.dense)
    return jnp.sum(weight_UCO.reshape(output_BO.shape) * output_BO)

  def run(loss: Callable[..., Array]) -> Run:
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return Run(lambda _: gradients(params, history_ULV, candidates_UCV), users * candidates)

  return {'DCAT': run(ours), 'dense': run(dense)}


def matmul_flops(side: int, dtype: str) -> float:
  """FLOP/s of a square matmul, at best: the peak that other programs are compared with."""
  x = jnp.asarray(_normal(4, side, side), jnp.dtype(dtype))
  product = jax.jit(lambda x: x @ x)
  seconds = interleave({'product': lambda _: product(x)}, 5)['product']
  return 2 * side**3 / min(seconds)


def pass_flops(tower: TowerConfig, length: int, candidates: int) -> float:
  """FLOPs of both passes for one user: matmuls alone, in the decoder and its MLPs phi_in and phi_out.

  The context pass computes just keys and values in its last layer, and half of the attention's square.
  """
  width, layers = tower.width, tower.layers
  block = 2 * width**2 * (4 + 2 * tower.mlp_ratio)  # a token
  keys_values = 2 * width**2 * 2
  phi_in = 2 * 2 * width**2
  history = length * (phi_in + (layers - 1) * (block + 2 * width * length) + keys_values)
  phi_out = 2 * width * (width + tower.output_width)
  return history + candidates * (phi_in + layers * (block + 4 * width * (length + 1)) + phi_out)


def _model(case: Case, users: int) -> tuple[PinFM, Any, Array, EventBatch]:
  """The model with fresh parameters, and full histories."""
  tower = replace(case.tower, max_positions=case.length + 1)
  tables = TableConfig(sub_tables=1, rows=1, width=case.item_width)
  model = PinFM(PinFMConfig(tables, tower, num_actions=3, num_surfaces=2))
  history_ULV, events = _normal(1, users, case.length, case.item_width), no_events(users, case.length)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), history_ULV, events))
  return model, params, history_ULV, events


def _normal(seed: int, *shape: int) -> Array:
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
