"""Your own Flax ranker with PinFM inside, your own loss, and the item tables frozen or trained along.

Command:   python experiments/bring_your_own_ranker.py runs/quickstart
           python experiments/bring_your_own_ranker.py runs/quickstart --bundle runs/quickstart/bundle
           python experiments/bring_your_own_ranker.py runs/quickstart --train-tables
Hardware:  2 CPU cores, 2 GB of memory
Time:      about a minute, after `pinfm run experiments/quickstart.py`
Expected:  in the share of validation requests whose first item was saved, 0.36 after one step (--steps 1) and about 0.5
           after 200, since the layers around the pretrained tower start untrained.

The run gives the data (any source of the same arrays will do: see `my_inputs`) and the pretrained model.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pinfm_jax.config import MeshConfig, PinFMConfig, TableConfig, UpdateConfig
from pinfm_jax.data.pipeline import evaluation_batches, training_batches
from pinfm_jax.errors import exit_code
from pinfm_jax.launch import saved_experiment
from pinfm_jax.model.pinfm import EventBatch, PinFM
from pinfm_jax.pretrained import load_pretrained
from pinfm_jax.stages.context import Run
from pinfm_jax.train.exchange import read_vectors
from pinfm_jax.train.optimizer import Update
from pinfm_jax.train.restore import WarmStart, fresh_state, warm_started
from pinfm_jax.train.sharding import make_mesh, put_batch
from pinfm_jax.train.step import make_step

Array = jax.Array
Batch = dict[str, Any]


class MyRanker(nn.Module):
  """One score a candidate, from what PinFM says and from plain features. Everything but `pinfm` is yours."""

  model: PinFMConfig

  @nn.compact
  def __call__(self, history_ULV: Array, candidate_UCV: Array, events: EventBatch, plain_UCF: Array) -> Array:
    """Scores [U, C].

    Args:
      history_ULV: id vectors of the histories, from the tables.
      candidate_UCV: those of the candidates.
      events: surface, actions and mask of the histories.
      plain_UCF: other features of the candidates.
    """
    pinfm = PinFM(self.model, name='pinfm')
    h_U1O, kv = pinfm.encode(history_ULV, events, every_output=False)  # once a user
    output_UCO = pinfm.cross(candidate_UCV, kv, events.mask_UL)  # once a candidate, over the user's keys and values
    h_U1O = jnp.where(events.mask_UL.any(axis=1)[:, None, None], h_U1O, 0)  # no events: no representation
    similarity_UC1 = jnp.sum(h_U1O * pinfm.targets(candidate_UCV), axis=-1, keepdims=True)
    x_UCF = jnp.concatenate([output_UCO, nn.Dense(16)(candidate_UCV), similarity_UC1, plain_UCF], axis=-1)
    return nn.Dense(1)(nn.gelu(nn.Dense(64)(x_UCF)))[..., 0]


def my_inputs(batch: Batch) -> tuple[EventBatch, Array]:
  """The arrays that the model reads besides the vectors; ids are two uint32 words (`model.hashing.key_words`)."""
  columns = (batch[f'history_{name}'] for name in ('item', 'surface', 'actions', 'mask'))
  dense_UCF = jnp.nan_to_num(batch['candidate_dense'])
  return EventBatch(*columns), jnp.sign(dense_UCF) * jnp.log1p(jnp.abs(dense_UCF))


def my_loss(scores_UC: Array, batch: Batch) -> Array:
  """Cross-entropy of the saved items against all items of their request."""
  scores_UC = jnp.where(batch['candidate_mask'], scores_UC, -1e9)
  saved_UC = batch['saved'] * batch['candidate_mask']
  return -jnp.sum(jax.nn.log_softmax(scores_UC) * saved_UC) / jnp.maximum(jnp.sum(saved_UC), 1)


def scores_of(model: PinFMConfig, params: Any, history_ULV: Array, candidate_UCV: Array, batch: Batch) -> Array:
  """The ranker's scores [U, C]."""
  return MyRanker(model).apply({'params': params}, history_ULV, candidate_UCV, *my_inputs(batch))


def init_params(model: PinFMConfig, key: Array, batch: Batch) -> Any:
  """Fresh parameters of the whole ranker, PinFM's included."""
  width = model.tables.item_width
  history, candidate = (jnp.zeros((*batch[f'{name}_item'].shape[:2], width)) for name in ('history', 'candidate'))
  return MyRanker(model).init(key, history, candidate, *my_inputs(batch))['params']


def train_frozen(source: str, batches: Iterator[Batch], steps: int) -> Callable[[Batch], Array]:
  """A plain Optax loop over tables that stay as they are: a bundle's packed rows, or a checkpoint's.

  Returns:
    The trained ranker: a batch's scores.
  """
  pretrained = load_pretrained(source)
  model, optimizer = pretrained.model, optax.adam(optax.cosine_decay_schedule(2e-3, steps))

  def with_vectors(batch: Batch) -> Batch:
    names = ('history', 'candidate')
    return batch | {f'{name}_vectors': pretrained.vectors(batch[f'{name}_item']) for name in names}

  def score(params: Any, batch: Batch) -> Array:
    return scores_of(model, params, batch['history_vectors'], batch['candidate_vectors'], batch)

  @jax.jit
  def step(params: Any, state: Any, batch: Batch) -> tuple[Any, Any, Array]:
    loss, grads = jax.value_and_grad(lambda params: my_loss(score(params, batch), batch))(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, loss

  first = next(batches)
  params = {**init_params(model, jax.random.key(0), first), 'pinfm': jax.tree.map(jnp.asarray, pretrained.params)}
  state = optimizer.init(params)
  for number in range(steps):
    params, state, loss = step(params, state, with_vectors(next(batches)))
    report(number, steps, loss)
  trained = jax.jit(score)
  return lambda batch: trained(params, with_vectors(batch))


@dataclass(frozen=True)
class MyTask:
  """The same ranker as a task of this project's step: tables of any size, sharded over a mesh, learn with it."""

  model: PinFMConfig
  steps: int
  example: Any  # a batch, for shapes

  @property
  def tables(self) -> TableConfig:
    """Sizes of the item tables."""
    return self.model.tables

  @property
  def update(self) -> Update:
    """AdamW, row-wise Adagrad; the pretrained parts learn at a tenth of the rate (PinFM section 4)."""
    config = UpdateConfig(learning_rate=2e-3, warmup_steps=10, pretrained_ratio=0.1)
    return Update(config, self.steps, pretrained=('pinfm',))

  def init(self, key: Array) -> Any:
    """Fresh parameters."""
    return init_params(self.model, key, self.example)

  def ids(self, batch: Batch, step: Array) -> tuple[Array, ...]:
    """The ids whose vectors the loss needs."""
    return batch['history_item'], batch['candidate_item']

  def observe(self, constants: None, batch: Batch, step: Array) -> None:
    """Nothing is counted."""

  def loss(
    self, params: Any, vectors: tuple[Array, ...], batch: Batch, step: Array, key: Array, constants: None
  ) -> tuple[Array, dict[str, Array]]:
    """The loss; gradients with respect to `vectors` move the tables."""
    return my_loss(scores_of(self.model, params, *vectors, batch), batch), {}


def train_tables(run: Run, batches: Iterator[Batch], steps: int) -> Callable[[Batch], Array]:
  """The project's step: rows are exchanged over the mesh, and updated in place.

  Returns:
    The trained ranker: a batch's scores.
  """
  mesh, task = make_mesh(MeshConfig()), MyTask(run.model, steps, next(batches))

  @jax.jit
  def score(params: Any, rows_GE: Array, batch: Batch) -> Array:
    vectors = read_vectors(rows_GE, task.ids(batch, 0), task.tables)
    return scores_of(task.model, params, *vectors, batch)

  def trained(batch: Batch) -> Array:
    with jax.set_mesh(mesh):
      return score(state.params, state.tables.rows_GE, put_batch(batch, mesh))

  with jax.set_mesh(mesh):
    create, abstract = fresh_state(task, mesh, 0, None)
    state = warm_started(create, abstract, WarmStart(run.pretrain_directory(0), groups=('pinfm',)))
    step = make_step(task)
    for number in range(steps):
      state, figures = step(state, put_batch(next(batches), mesh))
      report(number, steps, figures['loss'])
  return trained


def batches_of(run: Run, part: str, size: int) -> Iterator[tuple[Batch, int]]:
  """Batches of the run's requests, and how many real ones each holds: endless for 'finetune', else once over all."""
  requests = run.requests(part)
  saved = requests.schema.labels.index('save')
  many = ((b, size) for b in training_batches(requests, size, seed=0, first_step=0))
  for batch, count in many if part == 'finetune' else evaluation_batches(requests, size):
    yield {**batch, 'saved': batch['candidate_labels'][..., saved].astype(np.float32)}, count


def first_saved(score: Callable[[Batch], Array], run: Run, size: int) -> float:
  """Share of the validation requests with a saved item in which the ranker's first item is a saved one."""
  hits = []
  for batch, count in batches_of(run, 'validation', size):
    scores_UC = np.where(batch['candidate_mask'], np.asarray(score(batch)), -np.inf)[:count]
    saved_UC = batch['saved'][:count]
    first_U = np.take_along_axis(saved_UC, scores_UC.argmax(axis=1)[:, None], axis=1)[:, 0]
    hits.append(first_U[saved_UC.any(axis=1)])
  return float(np.concatenate(hits).mean())


def report(step: int, steps: int, loss: Array) -> None:
  """A line now and then."""
  if step % 50 == 0 or step == steps - 1:
    print(f'step {step:4}  loss {float(loss):.4f}', flush=True)


def main(argv: list[str] | None = None) -> float:
  """Trains and prints the share of validation requests whose first item was saved; returns it."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('run', help='the workdir of `pinfm run`: data, and the pretrained model')
  parser.add_argument('--bundle', help="take PinFM from a bundle instead of the run's checkpoint")
  parser.add_argument('--train-tables', action='store_true', help='the item tables learn too')
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--batch', type=int, default=64, help='requests of a batch')
  arguments = parser.parse_args(argv)
  run = Run(saved_experiment(arguments.run), Path(arguments.run))
  batches = (batch for batch, _ in batches_of(run, 'finetune', arguments.batch))
  if arguments.train_tables:
    score = train_tables(run, batches, arguments.steps)
  else:
    score = train_frozen(arguments.bundle or arguments.run, batches, arguments.steps)
  share = first_saved(score, run, arguments.batch)
  print(f'first item saved, validation requests with a saved item: {share:.4f}')
  return share


if __name__ == '__main__':
  sys.exit(exit_code(main))
