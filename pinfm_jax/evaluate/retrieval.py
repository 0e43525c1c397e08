"""Whole-catalogue next-item evaluation of the pretrained tower: HR@k, NDCG@k, MRR, beside a popularity row."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.config import MeshConfig, PinFMConfig
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.featurize import event_inputs, window_start
from pinfm_jax.data.splits import usable_events
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.metrics import hr_at_k, mrr, ndcg_at_k
from pinfm_jax.model.hashing import key_words
from pinfm_jax.model.pinfm import EventBatch, PinFM
from pinfm_jax.train.exchange import read_vectors

Array = jax.Array


@dataclass(frozen=True)
class RetrievalTask:
  """Users with a history before the split and a positive event after it.

  Attributes:
    catalogue_V: uint64 keys of the items seen before the time, ascending: all of them are ranked.
    popularity_V: their positive events before the time.
    histories: padded model inputs, each [Q, L, ...], of the last events before the time.
    target_Q: place in the catalogue of each user's first positive event after the time.
    unseen: share of users left out because their target was first seen after the time.
  """

  catalogue_V: np.ndarray
  popularity_V: np.ndarray
  histories: dict[str, np.ndarray]
  target_Q: np.ndarray
  unseen: float


def retrieval_task(
  dataset: PreparedDataset, until_ms: int | None, length: int, block: int, action_bits: int, users: int, seed: int = 0
) -> RetrievalTask:
  """Collects the task over at most `users` users, drawn by seed.

  Raises:
    UserError: no user has events on both sides of the time.
  """
  seen, positives, rows = [], [], []
  for row, history in enumerate(dataset.histories()):
    end = usable_events(history, until_ms)
    positive = _positive(history.actions, action_bits)
    seen.append(history.item[:end])
    positives.append(history.item[:end][positive[:end]])
    if end and positive[end:].any():
      rows.append((row, end, end + int(np.argmax(positive[end:]))))
  if not rows:
    raise UserError('no user has events both before and after the pretraining split; change data.finetune_days')
  catalogue_V = np.unique(np.concatenate(seen))
  popularity_V = np.bincount(np.searchsorted(catalogue_V, np.concatenate(positives)), minlength=len(catalogue_V))
  chosen = np.random.default_rng(seed).permutation(len(rows))[:users]
  examples, targets, unseen = [], [], 0
  for row, end, target in (rows[i] for i in np.sort(chosen)):
    history = dataset.history(row)
    place = int(np.searchsorted(catalogue_V, history.item[target]))
    if place == len(catalogue_V) or catalogue_V[place] != history.item[target]:
      unseen += 1
      continue
    examples.append(event_inputs(history, slice(window_start(end, length, block), end), length))
    targets.append(place)
  if not targets:
    raise UserError('every next item was first seen after the pretraining split: nothing to rank in the catalogue')
  histories = {name: np.stack([e[name] for e in examples]) for name in examples[0]}
  return RetrievalTask(catalogue_V, popularity_V, histories, np.array(targets), unseen / len(chosen))


def evaluate_retrieval(
  task: RetrievalTask,
  model: PinFMConfig,
  params: Any,
  rows_GE: Array,
  ks: tuple[int, ...],
  chunk: int = 256,
  layout: MeshConfig = MeshConfig(),
) -> dict[str, float]:
  """HR@k, NDCG@k and MRR of the tower and of popularity, every item of the catalogue ranked, nothing filtered.

  Ties are counted against the model: the target ranks behind every item with the same score. Runs under the mesh that
  the tables lie on (`jax.set_mesh`), as `layout` says.
  """
  encode, represent = _programs(model, layout)
  z_VO = jnp.concatenate(
    [represent(params, rows_GE, jnp.asarray(words)) for words in _chunks(key_words(task.catalogue_V), 4096)]
  )
  ranks = []
  for start in range(0, len(task.target_Q), chunk):
    part = {name: value[start : start + chunk] for name, value in task.histories.items()}
    h_QO = encode(params, rows_GE, {name: jnp.asarray(value) for name, value in part.items()})
    ranks.append(np.asarray(_ranks(h_QO @ z_VO.T, jnp.asarray(task.target_Q[start : start + chunk]))))
  figures = _figures('tower', np.concatenate(ranks), ks)
  popularity_V = jnp.asarray(task.popularity_V, jnp.float32)
  popularity_ranks = [
    np.asarray(_ranks(jnp.broadcast_to(popularity_V, (len(t), len(popularity_V))), jnp.asarray(t)))
    for t in _chunks(task.target_Q, chunk)
  ]
  figures |= _figures('popularity', np.concatenate(popularity_ranks), ks)
  return figures | {
    'users': float(len(task.target_Q)),
    'catalogue': float(len(task.catalogue_V)),
    'unseen_share': task.unseen,
  }


def _programs(model: PinFMConfig, layout: MeshConfig) -> tuple[Any, Any]:
  def vectors(rows_GE: Array, words: Array) -> Array:
    return read_vectors(rows_GE, (words,), model.tables, layout.table_axes)[0]

  @jax.jit
  def encode(params: Any, rows_GE: Array, inputs: dict[str, Array]) -> Array:
    events = EventBatch(inputs['item'], inputs['surface'], inputs['actions'], inputs['mask'])
    h_QLO, _ = PinFM(model).apply({'params': params}, vectors(rows_GE, events.item_UL2), events, method='encode')
    last_Q = jnp.sum(events.mask_UL, axis=1) - 1
    return h_QLO[jnp.arange(len(last_Q)), last_Q]

  @jax.jit
  def represent(params: Any, rows_GE: Array, words: Array) -> Array:
    return PinFM(model).apply({'params': params}, vectors(rows_GE, words[:, None])[:, 0], method='targets')

  return encode, represent


@jax.jit
def _ranks(scores_QV: Array, target_Q: Array) -> Array:
  target_score_Q1 = jnp.take_along_axis(scores_QV, target_Q[:, None], axis=1)
  return jnp.sum(scores_QV >= target_score_Q1, axis=1)


def _figures(name: str, ranks_Q: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
  figures = {f'{name}/mrr': mrr(ranks_Q)}
  for k in ks:
    figures[f'{name}/hr@{k}'] = hr_at_k(ranks_Q, k)
    figures[f'{name}/ndcg@{k}'] = ndcg_at_k(ranks_Q, k)
  return figures


def _positive(actions: np.ndarray, action_bits: int) -> np.ndarray:
  return np.ones(len(actions), bool) if action_bits == 0 else (actions & np.uint32(action_bits)) > 0


def _chunks(array: np.ndarray, size: int) -> list[np.ndarray]:
  return [array[start : start + size] for start in range(0, len(array), size)]
