"""Whole-catalogue next-item evaluation of the pretrained tower: HR@k, NDCG@k, MRR, beside a popularity row."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.config import MeshConfig, PinFMConfig
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.featurize import event_inputs, window_start
from pinfm_jax.data.records import HistoryChange
from pinfm_jax.data.splits import usable_events
from pinfm_jax.data.tokens import PLAIN, TokenInputs
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.metrics import hr_at_k, mrr, ndcg_at_k
from pinfm_jax.model.hashing import key_words
from pinfm_jax.model.pinfm import EventBatch, PinFM
from pinfm_jax.train.exchange import read_vectors
from pinfm_jax.train.sharding import on_every_device, put_examples

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
    content_VW: content of the catalogue, for a model with content.
    user_Q: row of each user.
  """

  catalogue_V: np.ndarray
  popularity_V: np.ndarray
  histories: dict[str, np.ndarray]
  target_Q: np.ndarray
  unseen: float
  content_VW: np.ndarray | None = None
  user_Q: np.ndarray | None = None


def retrieval_task(
  dataset: PreparedDataset,
  until_ms: int | None,
  length: int,
  block: int,
  action_bits: int,
  users: int,
  seed: int = 0,
  tokens: TokenInputs = PLAIN,
  change: HistoryChange | None = None,
) -> RetrievalTask:
  """Collects the task over at most `users` users, drawn by seed; the model reads what `change` makes of their events.

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
  examples, targets, found, unseen = [], [], [], 0
  for row, end, target in (rows[i] for i in np.sort(chosen)):
    history = dataset.history(row)
    place = int(np.searchsorted(catalogue_V, history.item[target]))
    if place == len(catalogue_V) or catalogue_V[place] != history.item[target]:
      unseen += 1
      continue
    events = history.before(end) if change is None else change(row, history.before(end))
    window = slice(window_start(len(events), length, block), len(events))
    examples.append(event_inputs(events, window, length, tokens))
    targets.append(place)
    found.append(row)
  if not targets:
    raise UserError('every next item was first seen after the pretraining split: nothing to rank in the catalogue')
  histories = {name: np.stack([e[name] for e in examples]) for name in examples[0]}
  content_VW = tokens.items.inputs(catalogue_V)['content'] if tokens.items else None
  unseen_share, user_Q = unseen / len(chosen), np.array(found)
  return RetrievalTask(catalogue_V, popularity_V, histories, np.array(targets), unseen_share, content_VW, user_Q)


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

  Ties are counted against the model: the target ranks behind every item with the same score. Runs on the mesh that is
  set (`jax.set_mesh`), over which the tables lie as `layout` says; of several processes, all take part and all get the
  result.
  """
  encode = _programs(model, layout)[0]
  z_VO = catalogue_targets(task.catalogue_V, task.content_VW, model, params, rows_GE, layout)
  ranks = []
  for start in range(0, len(task.target_Q), chunk):
    part = {name: value[start : start + chunk] for name, value in task.histories.items()}
    h_QO = encode(params, rows_GE, put_examples(part))
    ranks.append(np.asarray(pessimistic_ranks(h_QO @ z_VO.T, task.target_Q[start : start + chunk])))
  figures = _figures('tower', np.concatenate(ranks), ks)
  popularity_V = jnp.asarray(task.popularity_V, jnp.float32)
  popularity_ranks = [
    np.asarray(pessimistic_ranks(jnp.broadcast_to(popularity_V, (len(t), len(popularity_V))), jnp.asarray(t)))
    for t in _chunks(task.target_Q, chunk)
  ]
  figures |= _figures('popularity', np.concatenate(popularity_ranks), ks)
  return figures | {
    'users': float(len(task.target_Q)),
    'catalogue': float(len(task.catalogue_V)),
    'unseen_share': task.unseen,
  }


def catalogue_targets(
  keys_V: np.ndarray,
  content_VW: np.ndarray | None,
  model: PinFMConfig,
  params: Any,
  rows_GE: Array,
  layout: MeshConfig = MeshConfig(),
) -> Array:
  """z of items [V, O], 4096 at a time.

  Args:
    keys_V: uint64 item keys.
    content_VW: their content, for a model with content.
    model: its configuration; the other arguments are those of `evaluate_retrieval`.
    params: see there.
    rows_GE: see there.
    layout: see there.
  """
  represent = _programs(model, layout)[1]
  catalogue = {'item': key_words(keys_V)} | ({} if content_VW is None else {'content': content_VW})
  parts = [{name: value[start : start + 4096] for name, value in catalogue.items()}
           for start in range(0, len(keys_V), 4096)]  # fmt: skip
  return jnp.concatenate([represent(params, rows_GE, put_examples(part)) for part in parts])


def _programs(model: PinFMConfig, layout: MeshConfig) -> tuple[Any, Any]:
  def items(params: Any, rows_GE: Array, words: Array, content: Array | None) -> Array:
    (vectors,) = read_vectors(rows_GE, (words,), model.tables, layout.table_axes)
    return PinFM(model).apply({'params': params}, vectors, content, method='items')

  @partial(jax.jit, out_shardings=on_every_device())
  def encode(params: Any, rows_GE: Array, inputs: dict[str, Array]) -> Array:
    columns = [inputs[name] for name in ('item', 'surface', 'actions', 'mask')]
    events = EventBatch(*columns, gap_UL=inputs.get('gap'), content_ULW=inputs.get('content'))
    items_ULV = items(params, rows_GE, events.item_UL2, events.content_ULW)
    h_QLO, _ = PinFM(model).apply({'params': params}, items_ULV, events, method='encode')
    last_Q = jnp.sum(events.mask_UL, axis=1) - 1
    return h_QLO[jnp.arange(len(last_Q)), last_Q]

  @partial(jax.jit, out_shardings=on_every_device())
  def represent(params: Any, rows_GE: Array, inputs: dict[str, Array]) -> Array:
    words, content = inputs['item'][:, None], inputs.get('content')
    items_V1V = items(params, rows_GE, words, None if content is None else content[:, None])
    return PinFM(model).apply({'params': params}, items_V1V[:, 0], method='targets')

  return encode, represent


@jax.jit
def pessimistic_ranks(scores_QV: Array, target_Q: Array) -> Array:
  """[Q], from 1: the target's rank by score, behind every item with the same one."""
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
