"""Whole-catalogue next-item evaluation of the pretrained tower: HR@k, NDCG@k, MRR, beside a popularity row."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.config import MeshConfig, PinFMConfig
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.featurize import event_inputs, window_start
from pinfm_jax.data.records import History, HistoryChange
from pinfm_jax.data.splits import usable_events, usable_histories
from pinfm_jax.data.tokens import PLAIN, TokenInputs
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.catalogue_ranks import catalogue_ranks
from pinfm_jax.evaluate.metrics import hr_at_k, mrr, ndcg_at_k
from pinfm_jax.model.hashing import key_words
from pinfm_jax.model.pinfm import EventBatch, PinFM
from pinfm_jax.train.exchange import read_vectors
from pinfm_jax.train.sharding import on_every_device, put_examples

Array = jax.Array

_ITEMS = 4096  # of the catalogue represented at once
_CROP = 16  # histories are cropped to so many events, or twice, four times .. as many


@dataclass(frozen=True)
class RetrievalProtocol:
  """Which event of whom is predicted, and among which items.

  Attributes:
    held_out: of a log without impressions, events at each history's end that did not train (`Split.held_out`).
    events_back: of such a log, the event that is predicted, counted from the history's end (`Split.events_back`); all
      events before it are the history that is read.
    filter_seen: items of the user's whole history before the target are not ranked, but for the target itself.
    whole_catalogue: items that training never saw are candidates and targets too.
  """

  held_out: int = 1
  events_back: int = 1
  filter_seen: bool = False
  whole_catalogue: bool = False


@dataclass(frozen=True)
class RetrievalTask:
  """Users with a history before the split and a positive event after it.

  Attributes:
    catalogue_V: uint64 keys of the items that are ranked, ascending: those of the training events, or all.
    popularity_V: their positive training events.
    histories: padded model inputs, each [Q, L, ...], of the last events before the target.
    target_Q: place in the catalogue of each user's first positive event after the time.
    unseen: share of users whose target training never saw.
    content_VW: content of the catalogue, for a model with content.
    seen: places in the catalogue of each user's earlier items, if these are not ranked.
    trained_V: which of the catalogue's items training has seen; None = all, and users with an unseen target are
      left out.
    user_Q: row of each user.
    end_Q: how many of each user's events come before the predicted ones.
  """

  catalogue_V: np.ndarray
  popularity_V: np.ndarray
  histories: dict[str, np.ndarray]
  target_Q: np.ndarray
  unseen: float
  content_VW: np.ndarray | None = None
  seen: list[np.ndarray] | None = None
  trained_V: np.ndarray | None = None
  user_Q: np.ndarray | None = None
  end_Q: np.ndarray | None = None


def retrieval_task(
  dataset: PreparedDataset,
  until_ms: int | None,
  length: int,
  block: int,
  action_bits: int,
  users: int,
  seed: int = 0,
  tokens: TokenInputs = PLAIN,
  protocol: RetrievalProtocol = RetrievalProtocol(),
  change: HistoryChange | None = None,
  until_U: np.ndarray | None = None,
) -> RetrievalTask:
  """Collects the task over at most `users` users, drawn by seed; the model reads what `change` makes of their events.

  With `until_U` training has read each user's events before a time of the user's own alone (`Split.until_by_user`).

  Raises:
    UserError: no user has events on both sides of the time, or none whose next item training has seen.
  """
  seen, positives, later, rows = _parts(dataset, until_ms, action_bits, protocol, until_U)
  trained_keys = np.unique(np.concatenate(seen))
  catalogue_V = np.unique(np.concatenate([trained_keys, *later])) if protocol.whole_catalogue else trained_keys
  popularity_V = np.bincount(np.searchsorted(catalogue_V, np.concatenate(positives)), minlength=len(catalogue_V))
  chosen = np.random.default_rng(seed).permutation(len(rows))[:users]
  examples, targets, earlier, found, ends, unseen = [], [], [], [], [], 0
  for row, end, target in (rows[i] for i in np.sort(chosen)):
    history = dataset.history(row)
    new = not _contains(trained_keys, history.item[target])
    unseen += new
    if new and not protocol.whole_catalogue:
      continue
    events = history.before(end) if change is None else change(row, history.before(end))
    window = slice(window_start(len(events), length, block), len(events))
    examples.append(event_inputs(events, window, length, tokens))
    found.append(row)
    ends.append(end)
    targets.append(int(np.searchsorted(catalogue_V, history.item[target])))
    if protocol.filter_seen:
      keys = np.unique(history.item[:target])
      keys = keys if protocol.whole_catalogue else keys[np.isin(keys, trained_keys)]
      earlier.append(np.searchsorted(catalogue_V, keys).astype(np.int32))
  if unseen == len(chosen):
    raise UserError('every next item was first seen after the pretraining split: nothing to rank in the catalogue')
  return RetrievalTask(
    catalogue_V,
    popularity_V,
    {name: np.stack([e[name] for e in examples]) for name in examples[0]},
    np.array(targets),
    unseen / len(chosen),
    tokens.items.inputs(catalogue_V)['content'] if tokens.items else None,
    earlier if protocol.filter_seen else None,
    np.isin(catalogue_V, trained_keys) if protocol.whole_catalogue else None,
    np.array(found),
    np.array(ends),
  )


def _parts(
  dataset: PreparedDataset,
  until_ms: int | None,
  action_bits: int,
  protocol: RetrievalProtocol,
  until_U: np.ndarray | None,
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], list[tuple[int, int, int]]]:
  """Of each user the items that training has seen, the positive ones of them, and later ones; and of each user with
  something to predict (row, where the predicted events begin, the predicted one).

  Raises:
    UserError: there is no such user.
  """
  seen, positives, later, rows = [], [], [], []
  for row, (history, trained) in enumerate(usable_histories(dataset, until_ms, until_U, protocol.held_out)):
    positive = _positive(history.actions, action_bits)
    seen.append(history.item[:trained])
    positives.append(history.item[:trained][positive[:trained]])
    later.append(history.item[trained:])
    end, last = _predicted(history, until_ms, protocol)
    if end and positive[end:last].any():
      rows.append((row, end, end + int(np.argmax(positive[end:last]))))
  if not rows:
    mend = 'change data.finetune_days' if until_ms is not None else 'expected histories of several events'
    raise UserError(f'no user has events both before and after the pretraining split; {mend}')
  return seen, positives, later, rows


def _predicted(history: History, until_ms: int | None, protocol: RetrievalProtocol) -> tuple[int, int]:
  """The first of the events among which the predicted one is sought, and the one behind the last of them."""
  if until_ms is not None:
    return usable_events(history, until_ms), len(history)
  place = len(history) - protocol.events_back
  return max(place, 0), place + 1


class Retrieval:
  """Measures towers on one task: what does not depend on the weights is made once.

  Attributes:
    task: what is measured.
  """

  def __init__(
    self,
    task: RetrievalTask,
    model: PinFMConfig,
    ks: tuple[int, ...],
    chunk: int = 256,
    layout: MeshConfig = MeshConfig(),
  ):
    """Prepares the measurement.

    Args:
      task: what is measured.
      model: the tower's configuration.
      ks: of HR@k and NDCG@k.
      chunk: most users at once.
      layout: how the tables lie over the mesh.
    """
    self.task, self._ks, self._chunk = task, ks, min(chunk, len(task.target_Q))
    self._encode, self._represent = _programs(model, layout)
    # Users of similar lengths together, so that short histories are not read as long ones.
    lengths_Q = task.histories['mask'].sum(axis=1)
    self._parts = np.split(np.argsort(lengths_Q, kind='stable'), range(self._chunk, len(lengths_Q), self._chunk))
    self._crops = [_crop(int(lengths_Q[part].max()), task.histories['mask'].shape[1]) for part in self._parts]
    if task.seen is not None:
      most = max(map(len, task.seen))
      self._most_seen = [_crop(max(len(task.seen[query]) for query in part), most) for part in self._parts]

  def __call__(self, params: Any, rows_GE: Array) -> dict[str, float]:
    """HR@k, NDCG@k and MRR of the tower and of popularity, every item of the catalogue ranked.

    Ties are counted against the model: the target ranks behind every item with the same score. Runs on the mesh that
    is set (`jax.set_mesh`), over which the tables lie as `layout` says; of several processes, all take part and all
    get the result.

    With the whole catalogue, 'tower/...' and 'popularity/...' are of the users whose target training has seen, ranked
    among the items that it has seen; 'all/tower/...' and 'all/popularity/...' of all users and items.
    """
    return self._measured(self._users(params, rows_GE), self._items(params, rows_GE))

  def of_vectors(self, user_QO: np.ndarray, item_VO: np.ndarray) -> dict[str, float]:
    """The same figures of representations that were made elsewhere, by a bundle for instance.

    Args:
      user_QO: H of the task's users.
      item_VO: z of its catalogue.
    """
    return self._measured((jnp.asarray(user_QO[self._filled(part)]) for part in self._parts), jnp.asarray(item_VO))

  def _measured(self, users: Any, z_VO: Array) -> dict[str, float]:
    task = self.task
    figures = self._figures('tower', self._ranks(users, z_VO)) | self._popularity
    users = len(task.target_Q) if task.trained_V is None else int(task.trained_V[task.target_Q].sum())
    catalogue = len(task.catalogue_V) if task.trained_V is None else int(task.trained_V.sum())
    figures |= {'users': float(users), 'catalogue': float(catalogue), 'unseen_share': task.unseen}
    if task.trained_V is not None:
      figures |= {'all/users': float(len(task.target_Q)), 'all/catalogue': float(len(task.catalogue_V))}
    return figures

  @cached_property
  def _popularity(self) -> dict[str, float]:
    z_V1 = jnp.asarray(self.task.popularity_V, jnp.float32)[:, None]
    ones = (jnp.ones((self._chunk, 1), jnp.float32) for _ in self._parts)
    return self._figures('popularity', self._ranks(ones, z_V1))

  def _items(self, params: Any, rows_GE: Array) -> Array:
    """z of the catalogue, [V, O]."""
    parts = _item_parts(self.task.catalogue_V, self.task.content_VW)
    return jnp.concatenate([self._represent(params, rows_GE, part) for part in parts])

  def _users(self, params: Any, rows_GE: Array) -> Any:
    """H of the users, [chunk, O] a part."""
    for part, crop in zip(self._parts, self._crops, strict=True):
      inputs = {name: value[self._filled(part), :crop] for name, value in self.task.histories.items()}
      yield self._encode(params, rows_GE, put_examples(inputs))

  def _ranks(self, users: Any, z_VO: Array) -> tuple[np.ndarray, np.ndarray]:
    """Each user's rank among all items, and among those that training has seen, in the order of the parts."""
    task, found = self.task, []
    for part, h_QO, seen_QM in zip(self._parts, users, self._seen(), strict=True):
      ranks = catalogue_ranks(h_QO, z_VO, task.target_Q[self._filled(part)], seen_QM, task.trained_V)
      found.append([np.asarray(rank_Q)[: len(part)] for rank_Q in ranks])
    return tuple(np.concatenate(ranks) for ranks in zip(*found, strict=True))

  def _seen(self) -> Iterator[np.ndarray | None]:
    """The places of the items that are not ranked, [chunk, M] a part; None where all are."""
    task = self.task
    if task.seen is None:
      yield from (None for _ in self._parts)
      return
    for part, most in zip(self._parts, self._most_seen, strict=True):
      filled = self._filled(part)
      seen_QM = np.full((len(filled), most), len(task.catalogue_V), np.int32)
      for line, query in zip(seen_QM, filled, strict=True):
        line[: len(task.seen[query])] = task.seen[query]
      yield seen_QM

  def _filled(self, part: np.ndarray) -> np.ndarray:
    """The users of a part; the last one is repeated to fill it, so that one program serves all parts."""
    return np.pad(part, (0, self._chunk - len(part)), mode='edge')

  def _figures(self, name: str, ranks: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    task = self.task
    if task.trained_V is None:
      return _metrics(name, ranks[0], self._ks)
    kept = task.trained_V[task.target_Q[np.concatenate(self._parts)]]
    return _metrics(name, ranks[1][kept], self._ks) | _metrics(f'all/{name}', ranks[0], self._ks)


def item_targets(
  keys_V: np.ndarray,
  content_VW: np.ndarray | None,
  model: PinFMConfig,
  params: Any,
  rows_GE: Array,
) -> Array:
  """z of items [V, O].

  Args:
    keys_V: uint64 item keys.
    content_VW: their content, for a model with content.
    model: the tower's configuration.
    params: its parameters.
    rows_GE: the table rows, on one device.
  """
  represent = _programs(model, MeshConfig())[1]
  return jnp.concatenate([represent(params, rows_GE, part) for part in _item_parts(keys_V, content_VW)])


def _item_parts(keys_V: np.ndarray, content_VW: np.ndarray | None) -> Iterator[dict[str, Array]]:
  """Inputs of so many items that they are represented at once."""
  items = {'item': key_words(keys_V)} | ({} if content_VW is None else {'content': content_VW})
  for start in range(0, len(keys_V), _ITEMS):
    yield put_examples({name: value[start : start + _ITEMS] for name, value in items.items()})


def _programs(model: PinFMConfig, layout: MeshConfig) -> tuple[Any, Any]:
  def items(params: Any, rows_GE: Array, words: Array, content: Array | None) -> Array:
    (vectors,) = read_vectors(rows_GE, (words,), model.tables, layout.table_axes)
    return PinFM(model).apply({'params': params}, vectors, content, method='items')

  @partial(jax.jit, out_shardings=on_every_device())
  def encode(params: Any, rows_GE: Array, inputs: dict[str, Array]) -> Array:
    columns = [inputs[name] for name in ('item', 'surface', 'actions', 'mask')]
    events = EventBatch(*columns, gap_UL=inputs.get('gap'), content_ULW=inputs.get('content'))
    items_ULV = items(params, rows_GE, events.item_UL2, events.content_ULW)
    h_Q1O, _ = PinFM(model).apply({'params': params}, items_ULV, events, every_output=False, method='encode')
    return h_Q1O[:, 0]

  @partial(jax.jit, out_shardings=on_every_device())
  def represent(params: Any, rows_GE: Array, inputs: dict[str, Array]) -> Array:
    words, content = inputs['item'][:, None], inputs.get('content')
    items_V1V = items(params, rows_GE, words, None if content is None else content[:, None])
    return PinFM(model).apply({'params': params}, items_V1V[:, 0], method='targets')

  return encode, represent


def _crop(events: int, length: int) -> int:
  """How many of `length` places to read for histories of so many events: one of few sizes, so few programs."""
  crop = _CROP
  while crop < events:
    crop *= 2
  return min(length, crop)


def _contains(sorted_keys: np.ndarray, key: np.uint64) -> bool:
  place = int(np.searchsorted(sorted_keys, key))
  return place < len(sorted_keys) and sorted_keys[place] == key


def _metrics(name: str, ranks_Q: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
  figures = {f'{name}/mrr': mrr(ranks_Q)}
  for k in ks:
    figures[f'{name}/hr@{k}'] = hr_at_k(ranks_Q, k)
    figures[f'{name}/ndcg@{k}'] = ndcg_at_k(ranks_Q, k)
  return figures


def _positive(actions: np.ndarray, action_bits: int) -> np.ndarray:
  return np.ones(len(actions), bool) if action_bits == 0 else (actions & np.uint32(action_bits)) > 0
