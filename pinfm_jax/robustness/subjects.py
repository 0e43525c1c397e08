"""What the repair of sequences is judged on: a fine-tuned ranker's requests, and a pretrained tower's next items.

A subject turns histories into event embeddings, and embeddings into what is measured. Between the two stand attack and
repair, which change the embeddings and nothing else: the forward pass is the model's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.config import PinFMConfig, PretrainConfig
from pinfm_jax.data.featurize import event_inputs
from pinfm_jax.data.pipeline import Requests
from pinfm_jax.data.records import History, HistoryChange
from pinfm_jax.data.splits import usable_events
from pinfm_jax.data.tokens import TokenInputs, gap_bucket
from pinfm_jax.evaluate.catalogue_ranks import catalogue_ranks
from pinfm_jax.evaluate.retrieval import RetrievalTask, item_targets
from pinfm_jax.model.hashing import key_words
from pinfm_jax.model.pinfm import EventBatch, PinFM
from pinfm_jax.robustness.repair import LossTerm
from pinfm_jax.robustness.sequence_terms import Bank, Histories, histories_of, sequence_terms
from pinfm_jax.train.exchange import read_vectors
from pinfm_jax.train.finetune import FinetuneTask, ranking_batch

Array = jax.Array
Batch = dict[str, np.ndarray]
Weights = Mapping[str, Any]  # 'pinfm', 'rows', 'log_temperature', 'bank', and what else a subject reads


@dataclass(frozen=True)
class Bound:
  """One batch of U histories as attacks and repairs see it; everything may be traced.

  Attributes:
    x_ULD: the event embeddings.
    hidden: embeddings -> H of every event [U, L, O].
    histories: what the sequence losses read besides.
    bank: their negatives.
    log_temperature: theirs.
    loss: embeddings -> [U], what an attack raises.
    outcome: embeddings -> [U, ...], what is measured.
  """

  x_ULD: Array
  hidden: Callable[[Array], Array]
  histories: Histories
  bank: Bank
  log_temperature: Array
  loss: Callable[[Array], Array]
  outcome: Callable[[Array], Array]

  def terms(self, config: PretrainConfig, weight_K: Array) -> tuple[LossTerm, ...]:
    """The losses as terms of a repair of this batch, see `sequence_terms`."""
    return sequence_terms(self.hidden, self.histories, self.bank, self.log_temperature, config, weight_K)


class Subject(Protocol):
  """What is judged.

  Attributes:
    name: of its cells.
    pretrain: of the tower: what the sequence losses of a repair were trained as.
    rows: [N] each example's own row, ascending: seeds its draws.
    lengths: [N] how many events its history has.
    window: events that the model reads at most, and by how many the window moves.
  """

  name: str
  pretrain: PretrainConfig
  rows: np.ndarray
  lengths: np.ndarray
  window: tuple[int, int]

  def examples(self, change: HistoryChange | None = None) -> Batch:
    """All examples' inputs [N, ...], of histories as `change` leaves them."""
    ...

  def bind(self, weights: Weights, batch: Mapping[str, Array]) -> Bound:
    """A batch of examples under weights, in jit."""
    ...

  def pool_tokens(self, weights: Weights, pool: History) -> Array:
    """phi_in of events that may be injected: [P, D]."""
    ...


@dataclass(frozen=True)
class RankingSubject:
  """Requests under a fine-tuned ranker with PinFM: outcome [U, C, T] probabilities; attacks raise the main label's
  cross-entropy over a request's candidates.

  Attributes:
    task: the fine-tuning task, without randomness.
    requests: each request as one example.
    pretrain: of the tower, for the losses.
    label: column of the main label.
  """

  task: FinetuneTask
  requests: Requests
  pretrain: PretrainConfig
  label: int
  name = 'ranking'

  @property
  def rows(self) -> np.ndarray:
    """Rows of the requests."""
    return self.requests.request_row

  @cached_property
  def lengths(self) -> np.ndarray:
    """Events before each request."""
    return np.array([self.requests.dataset.request(int(row)).history_end for row in self.rows])

  @property
  def window(self) -> tuple[int, int]:
    """Of fine-tuning."""
    return self.task.config.history_length, self.task.config.history_block

  def examples(self, change: HistoryChange | None = None) -> Batch:
    """See `Subject`."""
    examples = [self.requests.changed(i, change) for i in range(len(self.requests))]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

  def bind(self, weights: Weights, batch: Mapping[str, Array]) -> Bound:
    """See `Subject`. The forward pass is serving's: context pass, crossing pass, ranker."""
    inputs, model = ranking_batch(batch), self.task.model
    history_ULV, candidate_UCV = read_vectors(weights['rows'], self.task.ids(batch, jnp.int32(0)), model.tables)
    apply = partial(self.task.module.apply, {'params': weights['ranker']})

    def outcome(x_ULD: Array) -> Array:
      context = apply(x_ULD, inputs.events, method='context_of_embedded')
      return apply(
        candidate_UCV, context, inputs.candidates, weights['stats'], recent=inputs.recent, method='score'
      )  # fmt: skip

    def loss(x_ULD: Array) -> Array:
      p_UC = jnp.clip(outcome(x_ULD)[..., self.label], 1e-6, 1 - 1e-6)
      label_UC, mask_UC = inputs.labels_UCT[..., self.label], inputs.candidates.mask_UC
      entropy_UC = -jnp.where(label_UC > 0, jnp.log(p_UC), jnp.log1p(-p_UC))
      return jnp.sum(entropy_UC * mask_UC, axis=1) / jnp.maximum(jnp.sum(mask_UC, axis=1), 1)

    x_ULD = apply(history_ULV, inputs.events, method='embed_events')
    z_ULO = apply(history_ULV, inputs.events, method='targets')
    return _bound(model, weights, inputs.events, x_ULD, z_ULO, self.task.action_bits, loss, outcome)

  def pool_tokens(self, weights: Weights, pool: History) -> Array:
    """See `Subject`."""
    return _pool_tokens(self.task.model, weights, pool, self.requests.tokens)


@dataclass(frozen=True)
class NextItemSubject:
  """The pretrained tower's next item: outcome [U], its rank in the catalogue; attacks raise its cross-entropy there.

  Attributes:
    model: the tower's configuration.
    pretrain: its pretraining.
    collect: `retrieval_task` of histories as its `change` leaves them.
    until_ms: the time of the split.
    dataset: whose histories they are.
    tokens: what the model reads.
    window: see `Subject`.
    action_bits: A_pos.
  """

  model: PinFMConfig
  pretrain: PretrainConfig
  collect: Callable[..., RetrievalTask]
  until_ms: int | None
  dataset: Any
  tokens: TokenInputs
  window: tuple[int, int]
  action_bits: int
  name = 'next'

  @cached_property
  def clean(self) -> RetrievalTask:
    """The task of histories as they are."""
    return self.collect(change=None)

  @property
  def rows(self) -> np.ndarray:
    """Rows of the users."""
    return self.clean.user_Q

  @cached_property
  def lengths(self) -> np.ndarray:
    """Events before the split."""
    return np.array([usable_events(self.dataset.history(int(row)), self.until_ms) for row in self.rows])

  def examples(self, change: HistoryChange | None = None) -> Batch:
    """See `Subject`."""
    task = self.clean if change is None else self.collect(change=change)
    return {**task.histories, 'target': task.target_Q}

  def bind(self, weights: Weights, batch: Mapping[str, Array]) -> Bound:
    """See `Subject`."""
    columns = [batch[name] for name in ('item', 'surface', 'actions', 'mask')]
    events = EventBatch(*columns, gap_UL=batch.get('gap'), content_ULW=batch.get('content'))
    apply = partial(PinFM(self.model).apply, {'params': weights['pinfm']})
    (vectors_ULV,) = read_vectors(weights['rows'], (events.item_UL2,), self.model.tables)
    items_ULV = apply(vectors_ULV, events.content_ULW, method='items')
    last_U = jnp.sum(events.mask_UL, axis=1) - 1

    def user(x_ULD: Array) -> Array:
      h_U1O, _ = apply(x_ULD, events, every_output=False, method='encode_embedded')
      return jnp.where(last_U[:, None] >= 0, h_U1O[:, 0], 0)

    def loss(x_ULD: Array) -> Array:
      logits_UV = jnp.exp(-weights['log_temperature']) * (user(x_ULD) @ weights['z_VO'].T)
      own_U = jnp.take_along_axis(logits_UV, batch['target'][:, None], axis=1)[:, 0]
      return jax.nn.logsumexp(logits_UV, axis=1) - own_U

    def outcome(x_ULD: Array) -> Array:
      return catalogue_ranks(user(x_ULD), weights['z_VO'], batch['target'], None, None)[0]

    x_ULD, z_ULO = apply(items_ULV, events, method='embed_events'), apply(items_ULV, method='targets')
    return _bound(self.model, weights, events, x_ULD, z_ULO, self.action_bits, loss, outcome)

  def pool_tokens(self, weights: Weights, pool: History) -> Array:
    """See `Subject`."""
    return _pool_tokens(self.model, weights, pool, self.tokens)


def bank_of(
  keys_V: np.ndarray, size: int, model: PinFMConfig, params: Any, rows_GE: Array, tokens: TokenInputs
) -> Bank:
  """Negatives: at most `size` items of a catalogue, drawn, and their targets under a tower."""
  keys_K = np.sort(np.random.default_rng(0).permutation(keys_V)[:size])
  content_KW = tokens.items.inputs(keys_K)['content'] if tokens.items else None
  z_KO = item_targets(keys_K, content_KW, model, params, rows_GE)
  return Bank(jnp.asarray(key_words(keys_K)), z_KO)


def _bound(
  model: PinFMConfig,
  weights: Weights,
  events: EventBatch,
  x_ULD: Array,
  z_ULO: Array,
  action_bits: int,
  loss: Callable[[Array], Array],
  outcome: Callable[[Array], Array],
) -> Bound:
  def hidden(x_ULD: Array) -> Array:
    return PinFM(model).apply({'params': weights['pinfm']}, x_ULD, events, method='encode_embedded')[0]

  bank = weights['bank']
  histories = histories_of(events, z_ULO, bank, action_bits)
  return Bound(x_ULD, hidden, histories, bank, weights['log_temperature'], loss, outcome)


def _pool_tokens(model: PinFMConfig, weights: Weights, pool: History, tokens: TokenInputs) -> Array:
  """An injected event happens at the time of the one before it: with time gaps, its gap is none."""
  columns = event_inputs(pool, slice(0, len(pool)), len(pool), tokens)
  if 'gap' in columns:
    columns['gap'] = np.broadcast_to(gap_bucket(np.zeros(1), tokens.gap_buckets), columns['gap'].shape)
  columns = {name: jnp.asarray(value)[None] for name, value in columns.items()}
  events = EventBatch(
    *(columns[name] for name in ('item', 'surface', 'actions', 'mask')),
    gap_UL=columns.get('gap'),
    content_ULW=columns.get('content'),
    hidden_id_UL=columns.get('new'),
  )
  apply = partial(PinFM(model).apply, {'params': weights['pinfm']})
  (vectors_1PV,) = read_vectors(weights['rows'], (events.item_UL2,), model.tables)
  items_1PV = apply(vectors_1PV, events.content_ULW, events.hidden_id_UL, method='items')
  return apply(items_1PV, events, method='embed_tokens')[0]
