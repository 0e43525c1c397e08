"""Trains the ranker on a click-through table: Adam, L2, early stopping on the validation logloss."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pinfm_jax.clicks.config import ClickTraining
from pinfm_jax.config import RankerConfig
from pinfm_jax.data.click_through import ClickTable
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate import metrics
from pinfm_jax.model.features import CandidateBatch, DenseStats, FeatureSpec
from pinfm_jax.model.ranker import Ranker
from pinfm_jax.progress import Progress
from pinfm_jax.train.finetune import dense_stats_of, ranking_loss

Array = jax.Array
_STATS_SAMPLE = 1_000_000  # training rows
_SCORED_AT_ONCE = 8192


class Rates(NamedTuple):
  """What may differ between runs of one compiled step."""

  learning_rate: Array
  embedding_l2: Array
  kernel_l2: Array


@dataclass(frozen=True)
class Trained:
  """A ranker with its best weights.

  Attributes:
    params: its parameters.
    looks: one line for each look at the validation part: epochs, logloss, AUC.
    best: which of them is the best one.
    steps: that were trained.
  """

  params: Any
  looks: tuple[Mapping[str, float], ...]
  best: int
  steps: int


def click_spec(table: ClickTable) -> FeatureSpec:
  """Shapes of a table's features, for a ranker with one label."""
  return FeatureSpec(len(table.dense_names), table.sparse_sizes, (), 1)


def click_stats(table: ClickTable) -> DenseStats:
  """Normalisation of the dense features, taken from training rows."""
  rows = table.rows_of('train')
  return dense_stats_of(table.dense_NF[rows[:: -(-len(rows) // _STATS_SAMPLE)]])


def train_clicks(table: ClickTable, ranker: RankerConfig, training: ClickTraining, seed: int, label: str) -> Trained:
  """Trains until the validation logloss no longer falls.

  Args:
    table: the rows, of which those of 'test' are not read.
    ranker: its features and layers; `dropout` is of its MLP.
    training: rates, batch, when to stop.
    seed: of initial values, order and dropout.
    label: of the progress line.

  Raises:
    UserError: fewer training rows than a batch, or a loss that is no number.
  """
  rows, spec, stats = table.rows_of('train'), click_spec(table), click_stats(table)
  if len(rows) < training.batch:
    raise UserError(f'training.batch is {training.batch}, but there are {len(rows)} training rows; lower it')
  step, programs = 0, _programs(ranker, spec)
  params = programs.init(jax.random.key(seed))
  state, key = programs.optimizer.init(params), jax.random.fold_in(jax.random.key(seed), 1)
  rate, looks, best, kept = training.learning_rate, [], 0, None
  every = max(1, round(training.evaluate_every * len(rows) / training.batch))
  total = training.epochs * (len(rows) // training.batch)
  progress = Progress(label, total, 'steps')
  for chosen in _batches(rows, training.batch, seed, training.epochs):
    rates = Rates(*map(jnp.float32, (rate, training.embedding_l2, training.kernel_l2)))
    batch = (table.dense_NF[chosen], table.sparse_NF[chosen], table.label_N[chosen].astype(np.float32))
    params, state = programs.step(params, state, batch, stats, rates, jax.random.fold_in(key, step))
    step += 1
    if step % every and step < total:
      continue
    figures = measure_clicks(table, ranker, params, stats, 'validation')
    looks.append({'epochs': step * training.batch / len(rows), **figures})
    progress.update(step, f'validation logloss {figures["logloss"]:.4f} AUC {figures["auc"]:.4f}')
    if kept is None or figures['logloss'] < looks[best]['logloss']:
      best, kept = len(looks) - 1, jax.tree.map(np.array, params)  # the step takes the arrays' memory
      continue
    rate *= training.decay
    if len(looks) - 1 - best >= training.patience:
      break
  progress.close()
  return Trained(kept, tuple(looks), best, step)


def measure_clicks(
  table: ClickTable, ranker: RankerConfig, params: Any, stats: DenseStats, part: str
) -> dict[str, float]:
  """{'auc', 'logloss'} of a part; `stats` are the training rows' (`click_stats`).

  Raises:
    UserError: predictions that are no numbers.
  """
  rows = table.rows_of(part)
  scores = score_clicks(table, ranker, params, stats, rows)
  if not np.isfinite(scores).all():
    raise UserError('the training diverged: a prediction is no number; lower training.learning_rate')
  labels = table.label_N[rows]
  return {'auc': metrics.auc(labels, scores), 'logloss': metrics.logloss(labels, scores)}


def score_clicks(
  table: ClickTable, ranker: RankerConfig, params: Any, stats: DenseStats, rows: np.ndarray
) -> np.ndarray:
  """Probabilities of rows, float32."""
  score, found = _programs(ranker, click_spec(table)).score, []
  for start in range(0, len(rows), _SCORED_AT_ONCE):
    chosen = rows[start : start + _SCORED_AT_ONCE]
    padded = np.resize(chosen, _SCORED_AT_ONCE)  # one size, one program
    found.append(np.asarray(score(params, table.dense_NF[padded], table.sparse_NF[padded], stats))[: len(chosen)])
  return np.concatenate(found)


def _batches(rows: np.ndarray, batch: int, seed: int, epochs: int) -> Iterator[np.ndarray]:
  """Places of each batch's rows; every epoch is shuffled anew, what does not fill a batch waits for another epoch."""
  for epoch in range(epochs):
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    for start in range(0, len(order) - batch + 1, batch):
      yield order[start : start + batch]


@dataclass(frozen=True)
class _Programs:
  """Compiled functions of a ranker: the same for all seeds and rates."""

  init: Any
  step: Any
  score: Any
  optimizer: optax.GradientTransformation


@lru_cache(maxsize=1)
def _programs(ranker: RankerConfig, spec: FeatureSpec) -> _Programs:
  module, optimizer = Ranker(spec, ranker), optax.scale_by_adam()

  def logits(params: Any, dense_BF: Array, sparse_BF: Array, stats: DenseStats, **options: Any) -> Array:
    """One request of B candidates: [1, B, 1]."""
    empty = jnp.zeros((1, dense_BF.shape[0], 0))
    candidates = CandidateBatch(None, None, None, dense_BF[None], sparse_BF[None], empty)
    return module.apply({'params': params}, candidates, stats, None, **options)

  def init(key: Array) -> Any:
    dense, sparse = jnp.zeros((1, 1, spec.num_dense)), jnp.zeros((1, 1, len(spec.sparse_sizes)), jnp.int32)
    candidates = CandidateBatch(None, None, None, dense, sparse, jnp.zeros((1, 1, 0)))
    zeros = jnp.zeros(spec.num_dense)
    return nn.unbox(module.init(key, candidates, DenseStats(zeros, zeros, zeros, zeros), None)['params'])

  def step(params: Any, state: Any, batch: tuple[Array, ...], stats: DenseStats, rates: Rates, key: Array):
    dense_BF, sparse_BF, label_B = batch

    def loss(params: Any) -> Array:
      made = logits(params, dense_BF, sparse_BF, stats, train=True, rngs={'dropout': key})
      mask = jnp.ones(made.shape[:2], bool)
      value = ranking_loss(made, label_B[None, :, None], mask, jnp.ones(1))
      return value + penalty(params, rates)

    moved, state = optimizer.update(jax.grad(loss)(params), state, params)
    return jax.tree.map(lambda p, d: p - rates.learning_rate * d, params, moved), state

  def score(params: Any, dense_BF: Array, sparse_BF: Array, stats: DenseStats) -> Array:
    return jax.nn.sigmoid(logits(params, dense_BF, sparse_BF, stats))[0, :, 0]

  return _Programs(jax.jit(init), jax.jit(step, donate_argnums=(0, 1)), jax.jit(score), optimizer)


def penalty(params: Any, rates: Rates) -> Array:
  """L2 of the sparse features' embeddings and of the kernels, half their squares."""
  total = jnp.zeros(())
  for path, value in jax.tree_util.tree_leaves_with_path(params):
    names = [key.key for key in path]
    if names[0] == 'features' and names[-1].startswith('sparse_'):
      total += rates.embedding_l2 / 2 * jnp.sum(jnp.square(value))
    elif names[-1] == 'kernel':
      total += rates.kernel_l2 / 2 * jnp.sum(jnp.square(value))
  return total
