"""The pretraining loss on users who are kept out of the training segments, measured while training goes on."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pinfm_jax.config import MeshConfig, PretrainConfig
from pinfm_jax.data.pipeline import Segments, training_batches
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import hash_rows, key_words
from pinfm_jax.train.exchange import read_vectors
from pinfm_jax.train.sharding import process_rows, put_batch
from pinfm_jax.train.step import Batch, Task, TrainState

Array = jax.Array

_PARTS = 1 << 20  # users fall into so many equal parts by hash
_SEED = 20_250_712  # of that hash and of the batches' order: the same users and batches in every run


def held_out_users(rows: np.ndarray, share: float) -> np.ndarray:
  """Which users are kept out, by a hash of their row: data that is appended moves nobody from one side to the other.

  Args:
    rows: row numbers of users.
    share: of the users, in (0, 1).

  Returns:
    bool, True for a user who is kept out.
  """
  return hash_rows(key_words(rows), 1, _PARTS, _SEED)[..., 0] < round(share * _PARTS)


def split_segments(segments: Segments, config: PretrainConfig) -> tuple[Segments, Segments]:
  """Segments to train on, and those of the users kept out.

  Raises:
    UserError: one of the two has less than a batch.
  """
  out = held_out_users(segments.user_row, config.eval_share)
  parts = [
    replace(segments, user_row=segments.user_row[keep], start=segments.start[keep], stop=segments.stop[keep])
    for keep in (~out, out)
  ]
  if not len(parts[0]) or len(parts[1]) < config.batch_segments:
    raise UserError(
      f'pretrain.eval_share {config.eval_share} leaves {len(parts[0])} segments to train on and {len(parts[1])} of '
      f'held-out users; expected at least a batch of those (pretrain.batch_segments {config.batch_segments}): '
      'change eval_share, or set pretrain.eval_every=0 to train on all users'
    )
  return parts[0], parts[1]


def held_out_loss(
  task: Task, segments: Segments, config: PretrainConfig, mesh: Mesh, layout: MeshConfig = MeshConfig()
) -> Callable[[TrainState], dict[str, float]]:
  """A function that measures a state: the mean of the task's figures over the same batches every time.

  Negatives, offsets and what else the loss draws are those of step 0 every time, so that the figures of two steps
  differ by the model alone.

  Args:
    task: the pretraining task; give it without dropout.
    segments: of the held-out users.
    config: batch size and number of batches (all whole ones there are, at most `eval_batches`).
    mesh: the devices.
    layout: how the tables lie over the mesh.
  """
  size = config.batch_segments
  count = min(config.eval_batches, len(segments) // size)
  measure = jax.jit(partial(_figures, task, layout.table_axes))

  def evaluate(state: TrainState) -> dict[str, float]:
    batches = training_batches(segments, size, _SEED, 0, process_rows(mesh, size), threads=1)
    found = [
      measure(state.params, state.tables, put_batch(batch, mesh), state.constants)
      for batch in itertools.islice(batches, count)
    ]
    return {name: float(np.mean([float(figures[name]) for figures in found])) for name in found[0]}

  return evaluate


def _figures(
  task: Task, axes: tuple[str, ...], params: Any, tables: Any, batch: Batch, constants: Any
) -> dict[str, Array]:
  step = jnp.int32(0)
  vectors = () if tables is None else read_vectors(tables.rows_GE, task.ids(batch, step), task.tables, axes)
  loss, figures = task.loss(params, vectors, batch, step, jax.random.key(0), constants)
  return {'loss': loss, **figures}
