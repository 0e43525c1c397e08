"""Runs a trained ranker over evaluation requests."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.config import MeshConfig
from pinfm_jax.data.featurize import item_age_hours
from pinfm_jax.data.pipeline import Requests, evaluation_batches
from pinfm_jax.evaluate.ranking import RankingPredictions
from pinfm_jax.progress import Progress
from pinfm_jax.train.exchange import read_vectors
from pinfm_jax.train.finetune import FinetuneTask, ranking_batch, without_randomness
from pinfm_jax.train.sharding import on_every_device, put_examples
from pinfm_jax.train.step import Batch

Array = jax.Array


def predict(
  task: FinetuneTask,
  params: Any,
  rows_GE: Array | None,
  stats: Any,
  requests: Requests,
  label: str,
  layout: MeshConfig = MeshConfig(),
  seen: np.ndarray | None = None,
) -> RankingPredictions:
  """The ranker's probabilities for every candidate of the requests, in their order.

  On the mesh that is set (`jax.set_mesh`); of several processes, all take part and all get the result.

  Args:
    task: the fine-tuning task whose model was trained.
    params: its parameters.
    rows_GE: the item tables, or None for a ranker without PinFM.
    stats: normalisation of the dense features.
    requests: what to score.
    label: of the progress line.
    layout: how the tables lie over the mesh of the context.
    seen: uint64 keys of the items that pretraining has seen, ascending; None = not told apart.
  """
  scores = scoring_program(task, layout)
  progress, scored, done = Progress(label, len(requests), 'requests'), [], 0
  for batch, count in evaluation_batches(requests, task.config.batch_requests):
    result = scores(params, rows_GE, stats, put_examples(batch))
    scored.extend(np.asarray(result)[u][batch['candidate_mask'][u]] for u in range(count))
    done += count
    progress.update(done)
  progress.close()
  return predictions_of(requests, np.concatenate(scored), seen)


def scoring_program(
  task: FinetuneTask, layout: MeshConfig = MeshConfig()
) -> Callable[[Any, Array | None, Any, Batch], Array]:
  """The jitted function (params, rows_GE, stats, batch) -> probabilities [U, C, T]; arguments as in `predict`."""
  task = replace(task, config=without_randomness(task.config))

  @partial(jax.jit, out_shardings=on_every_device())
  def scores(params: Any, rows_GE: Array | None, stats: Any, batch: Batch) -> Array:
    weights = {'params': {name: value for name, value in params.items() if name != 'log_temperature'}}
    vectors = (None, None)
    if rows_GE is not None:
      vectors = read_vectors(rows_GE, task.ids(batch, jnp.int32(0)), task.tables, layout.table_axes)
    inputs = ranking_batch(batch)
    return jax.nn.sigmoid(task.module.apply(weights, *vectors, inputs, stats).logits_UCT)

  return scores


def predictions_of(requests: Requests, scores_MT: np.ndarray, seen: np.ndarray | None = None) -> RankingPredictions:
  """Puts scores (in the order of the requests' candidates) beside what happened; `seen` as in `predict`."""
  parts: list[tuple[np.ndarray, ...]] = []
  for row, first in zip(requests.request_row, requests.first, strict=True):
    request = requests.dataset.request(int(row))
    rows = slice(int(first), int(first) + requests.config.candidates)
    item = request.item[rows]
    age = item_age_hours(request.timestamp, request.created_at)
    reference = np.zeros((len(item), 0)) if request.reference is None else request.reference[rows]
    user = np.full(len(item), request.user_row)
    parts.append((np.full(len(item), row), user, item, age[rows], request.labels[rows], reference))
  request_M, user_M, item_M, age_M, labels_MT, reference_MT = (np.concatenate(p) for p in zip(*parts, strict=True))
  return RankingPredictions(
    request_M=request_M.astype(np.int64),
    user_M=user_M.astype(np.int64),
    item_key_M=item_M,
    age_hours_M=age_M,
    labels_MT=labels_MT.astype(np.uint8),
    scores_MT=scores_MT.astype(np.float32),
    reference_MT=reference_MT.astype(np.float32) if reference_MT.shape[1] else None,
    label_names=requests.schema.labels,
    unseen_M=None if seen is None else ~np.isin(item_M, seen),
  )
