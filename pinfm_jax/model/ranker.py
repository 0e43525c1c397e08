"""The multi-task ranking model, with PinFM as its user-sequence module by early or late fusion (PinFM section 3.2)."""

from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from pinfm_jax.config import ColdStartConfig, PinFMConfig, RankerConfig
from pinfm_jax.model.cold_start import age_dropout
from pinfm_jax.model.dcat import LayerKV
from pinfm_jax.model.features import CandidateBatch, DenseStats, FeatureLayer, FeatureSpec, ranker_fields
from pinfm_jax.model.interaction.build import interaction_block, joins_input
from pinfm_jax.model.interaction.fields import FieldInputs
from pinfm_jax.model.pinfm import EventBatch, PinFM, key_mask, l2_normalise
from pinfm_jax.model.transact import RecentEvents, TransAct, hide_newest
from pinfm_jax.model.transformer import dense, last_event

Array = jax.Array


class RankingBatch(NamedTuple):
  """Request-grouped training batch: histories once a user, candidates behind them, 0/1 labels [U, C, T]."""

  events: EventBatch
  candidates: CandidateBatch
  labels_UCT: Array
  index_U: Array  # int32 place of each request in the global batch: seeds dropout, with run and step
  recent: RecentEvents | None = None  # for a ranker with TransAct


@flax.struct.dataclass
class UserContext:
  """What the crossing pass needs of users.

  Attributes:
    kv: every layer's keys and values [N, U, L, H, K].
    user_UO: the user without a candidate: H of the last event, with mean fusion the mean of H; 0 without events.
    events_U: how many events each history has; a learnable token stands behind the last one.
  """

  kv: LayerKV
  user_UO: Array
  events_U: Array


class RankingOutput(NamedTuple):
  """What the losses read; None where there is no module, or no such option.

  Attributes:
    logits_UCT: of the ranker.
    module_logits_UCT: of the module's own head.
    h_ULO: H over the histories.
    content_cosine_UC: cosine of each candidate's projected content with its item vector (`ranker.candidate_content`).
  """

  logits_UCT: Array
  module_logits_UCT: Array | None = None
  h_ULO: Array | None = None
  content_cosine_UC: Array | None = None


class Ranker(nn.Module):
  """x0 -> interaction block -> [x0, crossed], or crossed alone -> shared MLP -> one logit a label."""

  spec: FeatureSpec
  config: RankerConfig

  @nn.compact
  def __call__(
    self, candidates: CandidateBatch, stats: DenseStats, module_UCM: Array | None, train: bool = False
  ) -> Array:
    """Scores candidates.

    Args:
      candidates: their features.
      stats: normalisation of the dense features.
      module_UCM: outputs of the user-sequence modules, or None without any.
      train: dropout on.

    Returns:
      Logits [U, C, T].
    """
    x0 = FeatureLayer(self.spec, self.config, name='features')(candidates, stats)
    if module_UCM is not None:
      x0 = jnp.concatenate([x0, module_UCM], axis=-1)
    fields = ranker_fields(self.spec, self.config, module_UCM is not None)
    block = self.config.block
    inputs = FieldInputs(fields, block.most_field_width, block.field_norm, block.field_gates, name='inputs')
    x0 = inputs(x0)
    crossed = interaction_block(self.config, inputs.made)(x0)
    x = jnp.concatenate([x0, crossed], axis=-1) if joins_input(self.config) else crossed
    for i, width in enumerate(self.config.mlp):
      x = jax.nn.relu(dense(width, (None, 'mlp'), scale=2.0, name=f'mlp_{i}')(x))
      x = nn.Dropout(self.config.dropout)(x, deterministic=not train)
    return dense(self.spec.num_labels, (None, None), name='heads')(x)


class RankingModel(nn.Module):
  """The ranker with its user-sequence module; `__call__` trains, `context` and then `score` serve."""

  pinfm_config: PinFMConfig
  config: RankerConfig
  spec: FeatureSpec
  cold_start: ColdStartConfig = ColdStartConfig(randomise=0.0, age_dropout=(0.0, 0.0))

  def setup(self) -> None:
    """Declares the module and the ranker."""
    self.ranker = Ranker(self.spec, self.config)
    if self.config.transact.length:
      model = self.pinfm_config
      self.transact = TransAct(self.config.transact, model.num_actions, model.content_width if model.content else 0)
    if self.config.sequence not in ('pinfm', 'none'):
      raise ValueError(f"ranker.sequence is '{self.config.sequence}'; expected 'pinfm' or 'none'")
    if self.config.sequence == 'pinfm':
      self.pinfm = PinFM(self.pinfm_config)
      self.project_output = dense(self.config.module_width, (None, None))
      self.project_item = dense(self.config.module_width, (None, None))
      if self.config.user_output:
        self.project_user = dense(self.config.module_width, (None, None))
      if self.config.similarity_width:
        self.project_similarity = dense(self.config.similarity_width, (None, None))
      self.module_head = dense(self.spec.num_labels, (None, None))
      normal, item_width = nn.initializers.normal(0.02), self.pinfm_config.tables.item_width
      self.token_V = self.param('learnable_token', normal, (item_width,)) if self.config.learnable_token else None
      if self.config.candidate_content:
        if not self.spec.content_width:
          raise ValueError('ranker.candidate_content needs content vectors or an embedding feature')
        self.candidate_content = self.param('candidate_content', normal, (self.spec.content_width, item_width))

  def __call__(
    self,
    vectors_ULV: Array | None,
    vectors_UCV: Array | None,
    batch: RankingBatch,
    stats: DenseStats,
    seed: Array | int = 0,
    train: bool = False,
    need_history_output: bool = False,
  ) -> RankingOutput:
    """The training path.

    Args:
      vectors_ULV: id vectors of the histories (None without a module).
      vectors_UCV: id vectors of the candidates.
      batch: histories, candidates.
      stats: normalisation of the dense features.
      seed: of the run and its step: seeds the age-dependent dropout and what TransAct does not see.
      train: dropouts on.
      need_history_output: also return H over the histories, for the next-token loss.
    """
    hidden_UL = None
    if train and self.config.transact.length:
      hidden_UL = hide_newest(batch.recent, batch.index_U, seed, self.config.transact.mask_hours)
    if self.config.sequence == 'none':
      recent_UCM = self._recent(None, batch.recent, batch.candidates, hidden_UL)
      return RankingOutput(self.ranker(batch.candidates, stats, recent_UCM, train))
    h_ULO, context = self._encode(vectors_ULV, batch.events, train, need_history_output)
    output_UCO, items_UCV = self._cross(vectors_UCV, context, batch.candidates, train)
    z_UCO = self.pinfm.targets(items_UCV)
    module_UCM = self._module(output_UCO, items_UCV, z_UCO, context.user_UO)
    if train:
      candidates = batch.candidates.mask_UC.shape[1]
      place_UC = batch.index_U[:, None] * candidates + jnp.arange(candidates)
      module_UCM = age_dropout(module_UCM, batch.candidates.age_hours_UC, place_UC, seed, self.cold_start)
    modules_UCM = self._recent(module_UCM, batch.recent, batch.candidates, hidden_UL)
    logits_UCT = self.ranker(batch.candidates, stats, modules_UCM, train)
    # With late fusion the output knows no candidate: the head sees how each direction of it agrees with the item.
    own_UCO = output_UCO if self.config.fusion == 'early' else output_UCO * z_UCO
    cosine_UC = None
    if self.config.candidate_content:
      cosine_UC = cosine(self._content(batch.candidates), jax.lax.stop_gradient(items_UCV))
    return RankingOutput(logits_UCT, self.module_head(own_UCO), h_ULO, cosine_UC)

  def context(self, vectors_ULV: Array, events: EventBatch) -> UserContext:
    """The context pass of serving: what is kept of a user."""
    return self._encode(vectors_ULV, events, train=False, every_output=False)[1]

  def embed_events(self, vectors_ULV: Array, events: EventBatch) -> Array:
    """The event embeddings, which the tower's decoder reads: [U, L, D]."""
    items_ULV = self.pinfm.items(vectors_ULV, events.content_ULW, events.hidden_id_UL)
    return self.pinfm.embed_events(items_ULV, events)

  def context_of_embedded(self, x_ULD: Array, events: EventBatch) -> UserContext:
    """The context pass of serving with the event embeddings given: `context` of what `embed_events` gives."""
    return self._encode_embedded(x_ULD, events, train=False, every_output=False)[1]

  def extend(self, vectors_UKV: Array, events: EventBatch, context: UserContext) -> UserContext:
    """The context pass of events that follow kept histories.

    Args:
      vectors_UKV: id vectors of the new events.
      events: the new events, real ones first; at least one in each row. Row u follows user u.
      context: what is kept of users.

    Returns:
      Keys and values of the new positions, the users now, and the number of new events.

    Raises:
      ValueError: a bidirectional model, whose earlier events see the new ones.
    """
    if self.config.bidirectional:
      raise ValueError('the events of a bidirectional model see later ones: run the context pass over all of them')
    mask_UL = key_mask(context.events_U, context.kv.key.shape[2])
    items_UKV = self.pinfm.items(vectors_UKV, events.content_ULW, events.hidden_id_UL)
    mean = self.config.fusion == 'mean'
    h_UKO, kv = self.pinfm.extend(items_UKV, events, context.kv, mask_UL, self.token_V, every_output=mean)
    new_U = jnp.sum(events.mask_UL, axis=1, dtype=jnp.int32)
    if not mean:
      return UserContext(kv, h_UKO[:, 0], new_U)
    sum_UO = context.user_UO * context.events_U[:, None] + jnp.sum(h_UKO * events.mask_UL[..., None], axis=1)
    return UserContext(kv, sum_UO / (context.events_U + new_U)[:, None], new_U)

  def score(
    self,
    vectors_MCV: Array,
    context: UserContext,
    candidates: CandidateBatch,
    stats: DenseStats,
    recent: RecentEvents | None = None,
  ) -> Array:
    """The crossing pass and the ranker.

    Args:
      vectors_MCV: id vectors of the candidates.
      context: what is kept of each row's user.
      candidates: rows (tiles) of candidates of one user each.
      stats: normalisation of the dense features.
      recent: the newest events of each row's user, for a ranker with TransAct.

    Returns:
      Probabilities [M, C, T].
    """
    output_MCO, items_MCV = self._cross(vectors_MCV, context, candidates)
    module_MCM = self._module(output_MCO, items_MCV, self.pinfm.targets(items_MCV), context.user_UO)
    return jax.nn.sigmoid(self.ranker(candidates, stats, self._recent(module_MCM, recent, candidates)))

  def pairs(self, vectors_MCV: Array, context: UserContext, candidates: CandidateBatch) -> Array:
    """The crossing pass alone: the output at each candidate's position [M, C, O]; arguments of `score`.

    It has unit length with early fusion. With late fusion it is the user's representation, whatever the candidate.
    """
    return self._cross(vectors_MCV, context, candidates)[0]

  def item_vectors(self, vectors: Array, content: Array | None, hidden: Array | None) -> tuple[Array, Array]:
    """z, which H is compared with, and E, which both towers read, of items: [..., O] and [..., V]."""
    items = self.pinfm.items(vectors, content, hidden)
    return self.pinfm.targets(items), items

  def targets(self, vectors_ULV: Array, events: EventBatch) -> Array:
    """z of the events' items, for the next-token loss."""
    return self.item_vectors(vectors_ULV, events.content_ULW, events.hidden_id_UL)[0]

  def _cross(
    self, vectors_MCV: Array, context: UserContext, candidates: CandidateBatch, train: bool = False
  ) -> tuple[Array, Array]:
    """Output at the candidates' positions (late fusion: the users' representations), and E of the candidates."""
    items_MCV = self.pinfm.items(vectors_MCV, candidates.content_UCW, candidates.hidden_id_UC)
    if self.config.fusion != 'early':
      user_MO = context.user_UO
      return jnp.broadcast_to(user_MO[:, None], (*items_MCV.shape[:2], user_MO.shape[-1])), items_MCV
    token_MCV = items_MCV
    if self.config.candidate_content:  # PinFM-GraphSAGE: just the candidate's token gets it
      token_MCV = items_MCV + self._content(candidates)
    mask_UL = key_mask(context.events_U, context.kv.key.shape[2], int(self.config.learnable_token))
    return self.pinfm.cross(token_MCV, context.kv, mask_UL, train, candidates.gap_UC), items_MCV

  def _encode(
    self, vectors_ULV: Array, events: EventBatch, train: bool, every_output: bool
  ) -> tuple[Array, UserContext]:
    """H (of every event, or of the last ones) and what is kept of the users."""
    return self._encode_embedded(self.embed_events(vectors_ULV, events), events, train, every_output)

  def _encode_embedded(
    self, x_ULD: Array, events: EventBatch, train: bool, every_output: bool
  ) -> tuple[Array, UserContext]:
    every_output |= (mean := self.config.fusion == 'mean')
    h_ULO, kv = self.pinfm.encode_embedded(
      x_ULD, events, train, every_output, token_V=self.token_V, bidirectional=self.config.bidirectional
    )
    events_U = jnp.sum(events.mask_UL, axis=1, dtype=jnp.int32)
    if mean:
      user_UO = jnp.sum(h_ULO * events.mask_UL[..., None], axis=1) / jnp.maximum(events_U, 1)[:, None]
    else:
      last_U11 = last_event(events.mask_UL)[:, None, None]
      user_UO = (jnp.take_along_axis(h_ULO, last_U11, axis=1) if every_output else h_ULO)[:, 0]
    return h_ULO, UserContext(kv, jnp.where(events_U[:, None] > 0, user_UO, 0), events_U)

  def _recent(
    self, module_UCM: Array | None, recent: RecentEvents, candidates: CandidateBatch, hidden_UL: Array | None = None
  ) -> Array | None:
    """PinFM's outputs (None without it) with TransAct's behind them, if the ranker has that."""
    if not self.config.transact.length:
      return module_UCM
    output_UCM = self.transact(recent, candidates.recent_item_UC, candidates.content_UCW, hidden_UL)
    return output_UCM if module_UCM is None else jnp.concatenate([module_UCM, output_UCM], axis=-1)

  def _content(self, candidates: CandidateBatch) -> Array:
    """The candidates' content, projected to the width of item vectors: [M, C, V]."""
    return l2_normalise(candidates.embedding_UCF[..., -self.spec.content_width :]) @ self.candidate_content

  def _module(self, output_MCO: Array, items_MCV: Array, z_MCO: Array, user_MO: Array) -> Array:
    """What the ranker sees of PinFM: the candidate-position output and the candidate's item vector, as in the paper,
    and <H of the last event, z of the candidate>, which pretraining maximises: it ranks from step 0. Of the terms of
    that sum, one a direction, the ranker learns which of them matter for which label."""
    parts = [self.project_output(output_MCO), l2_normalise(self.project_item(items_MCV))]
    if self.config.user_output:
      user_MCO = jnp.broadcast_to(user_MO[:, None], output_MCO.shape)
      parts.append(self.project_user(user_MCO))
    if self.config.similarity:
      parts.append(jnp.einsum('uo,uco->uc', user_MO, z_MCO)[..., None])
    if self.config.similarity_width:
      parts.append(self.project_similarity(user_MO[:, None] * z_MCO))
    return jnp.concatenate(parts, axis=-1)


def cosine(x: Array, y: Array) -> Array:
  """Cosine of the angle between the vectors [..., D]; 0 where one of them is 0."""
  return jnp.sum(l2_normalise(x) * l2_normalise(y), axis=-1)
