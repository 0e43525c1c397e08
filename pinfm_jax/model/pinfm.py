"""PinFM: events in, user representations out (H), item targets (z), and the early-fusion candidate pass."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pinfm_jax.config import PinFMConfig, TowerConfig
from pinfm_jax.model.dcat import LayerKV, Layout, View
from pinfm_jax.model.padded_sasrec import places_from_end
from pinfm_jax.model.transformer import Decoder, dense, last_event

Array = jax.Array


class EventBatch(NamedTuple):
  """Histories of U users, oldest event first, padded at the end.

  Attributes:
    item_UL2: uint32 id words.
    surface_UL: int32 surface codes.
    actions_UL: uint32, bit a set if action a was taken.
    mask_UL: True on real events.
    user_UL: uint32, whose event it is: equal for all segments of a user (for same-user exclusion); None in serving.
    segment_UL: int32, equal for events of one segment where a row packs several, which do not see each other;
      None where each row is one segment.
    gap_UL: int32 bucket of the time since the event before (`data.tokens`), for a model with time gaps.
    content_ULW: float16 unit-length content of the items, for a model with content.
    hidden_id_UL: True where the model does not see the id: items that training never saw and, while it trains, some at
      random. None = nowhere.
  """

  item_UL2: Array
  surface_UL: Array
  actions_UL: Array
  mask_UL: Array
  user_UL: Array | None = None
  segment_UL: Array | None = None
  gap_UL: Array | None = None
  content_ULW: Array | None = None
  hidden_id_UL: Array | None = None


def no_events(users: int, length: int, model: PinFMConfig | None = None) -> EventBatch:
  """A batch of the right types and shapes for `init`, with the optional columns that `model` reads."""
  shape = (users, length)
  item_UL2 = jnp.zeros((*shape, 2), jnp.uint32)
  surface_UL, actions_UL = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.uint32)
  events = EventBatch(item_UL2, surface_UL, actions_UL, jnp.ones(shape, bool), jnp.zeros(shape, jnp.uint32))
  if model is not None and model.tower.time_gap_buckets:
    events = events._replace(gap_UL=jnp.zeros(shape, jnp.int32))
  if model is not None and model.content:
    events = events._replace(content_ULW=jnp.zeros((*shape, model.content_width), jnp.float16))
  return events


class PointwiseMLP(nn.Module):
  """phi_in, phi_out or psi: two layers with GELU, then L2 normalisation (PinFM section 3.1)."""

  hidden: int
  width: int
  dtype: jnp.dtype
  unit: bool = True

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., any width] -> [..., width] in float32; of unit length, unless `unit` is False."""
    x = jax.nn.gelu(dense(self.hidden, (None, 'mlp'), dtype=self.dtype)(x))
    x = dense(self.width, ('mlp', None), dtype=self.dtype)(x).astype(jnp.float32)
    return l2_normalise(x) if self.unit else x


class PinFM(nn.Module):
  """The dense part of PinFM; item vectors come from the hashed tables and are passed in."""

  config: PinFMConfig

  def setup(self) -> None:
    """Declares embeddings, MLPs and the decoder."""
    tower, item_width = self.config.tower, self.config.tables.item_width
    dtype = jnp.dtype(tower.dtype)
    normal = nn.initializers.normal(0.02)
    self.surface_embedding = self.param('surface_embedding', normal, (self.config.num_surfaces, item_width))
    # One row an action, and a last one for actions that are not known: those of a candidate (it has no surface either),
    # and those that pretraining hides to be predicted. So pretraining with hidden actions trains the candidate's mark.
    self.action_embedding = self.param('action_embedding', normal, (self.config.num_actions + 1, item_width))
    if not tower.rotary:
      self.position_embedding = self.param(
        'position_embedding', _positions_init(tower), (tower.max_positions, tower.width)
      )
    if tower.time_gap_buckets:
      self.gap_embedding = self.param('gap_embedding', normal, (tower.time_gap_buckets, item_width))
    if self.config.content:  # no bias: an item without content is its id alone
      # Of the size of a fresh id vector, since the content has unit length.
      self.content_projection = self.param('content_projection', normal, (self.config.content_width, item_width))
    if self.config.id_mask:
      self.masked_id = self.param('masked_id', normal, (item_width,))
    unit = not tower.dot_product
    bare = l2_normalise if unit else lambda x: x
    self.phi_in = (lambda x: x) if tower.bare_tokens else PointwiseMLP(tower.width, tower.width, dtype)
    if tower.bare_targets:
      self.phi_out = self.psi = lambda x: bare(x.astype(jnp.float32))
    else:
      self.phi_out = PointwiseMLP(tower.width, tower.output_width, dtype, unit)
      self.psi = PointwiseMLP(tower.width, tower.output_width, dtype, unit)
    self.decoder = Decoder(tower)
    self.embedding_dropout = nn.Dropout(tower.embedding_dropout)
    self.token_dropout = nn.Dropout(tower.token_dropout, broadcast_dims=(-1,))

  def __call__(self, vectors_ULV: Array, events: EventBatch) -> tuple[Array, Array]:
    """H and z of every position: touches every parameter, so it is what `init` runs."""
    vectors_ULV = self.items(vectors_ULV, events.content_ULW, events.hidden_id_UL)
    return self.encode(vectors_ULV, events)[0], self.targets(vectors_ULV)

  def items(self, vectors: Array, content: Array | None, hidden: Array | None = None) -> Array:
    """E of items, from which both tokens and targets are made: the id vector plus the projected content.

    Args:
      vectors: id vectors [..., V] from the tables, V = S * E.
      content: unit-length content [..., W]; unused by a model without content.
      hidden: True where a learned vector stands for the id vector, which then gets no gradient; None = nowhere.

    Returns:
      [..., V]; the id vectors themselves for a model without these options.

    Raises:
      ValueError: the model has content and none is given.
    """
    if self.config.id_mask and hidden is not None:
      vectors = jnp.where(hidden[..., None], self.masked_id, vectors)
    if not self.config.content:
      return vectors
    if content is None:
      raise ValueError('the model adds content vectors to the item vectors, but the batch has none')
    return vectors + content.astype(jnp.float32) @ self.content_projection

  def encode(
    self,
    vectors_ULV: Array,
    events: EventBatch,
    train: bool = False,
    every_output: bool = True,
    hidden_actions_UL: Array | None = None,
    token_V: Array | None = None,
    bidirectional: bool = False,
  ) -> tuple[Array, LayerKV]:
    """The context pass: H = phi_out(M(phi_in(E + V + A))) (PinFM Eq. 1).

    Args:
      vectors_ULV: E of the events (see `items`).
      events: surfaces, actions and mask of the same events; maybe their time gaps, whose embedding is one more term.
      train: dropout on.
      every_output: False computes H of each history's last event alone.
      hidden_actions_UL: True where the model must not see the actions; None = nowhere.
      token_V: one more token behind each history's last event, in place of an event; candidates attend to it. None =
        none.
      bidirectional: events see later events of their history too, unlike in pretraining.

    Returns:
      H [U, L, O], of unit length but with `dot_product`, or [U, 1, O] of the last events; and every layer's keys and
      values [N, U, L, H, K] (L + 1 of them with `token_V`).

    Raises:
      ValueError: histories longer than the learned positions.
    """
    x_ULD = self.embed_events(vectors_ULV, events, hidden_actions_UL)
    return self.encode_embedded(x_ULD, events, train, every_output, token_V, bidirectional)

  def encode_embedded(
    self,
    x_ULD: Array,
    events: EventBatch,
    train: bool = False,
    every_output: bool = True,
    token_V: Array | None = None,
    bidirectional: bool = False,
  ) -> tuple[Array, LayerKV]:
    """The context pass from the event embeddings on, see `encode`: x_ULD is what `embed_events` gives, or near it.

    Of `events` it reads mask and segments.
    """
    length = events.mask_UL.shape[1]
    x_ULD, mask_UL = self._with_token(x_ULD, events, token_V)
    output_at_U = None if every_output else last_event(events.mask_UL)
    if train:
      x_ULD = self.token_dropout(self.embedding_dropout(x_ULD, deterministic=False), deterministic=False)
    x_ULD = x_ULD.astype(self.config.tower.dtype)
    output_ULD, kv = self.decoder.context(x_ULD, mask_UL, train, output_at_U, events.segment_UL, bidirectional)
    return self.phi_out(output_ULD[:, :length] if every_output else output_ULD), kv

  def embed_history(
    self, vectors_ULV: Array, events: EventBatch, hidden_actions_UL: Array | None = None, token_V: Array | None = None
  ) -> tuple[Array, Array]:
    """phi_in and positions of the events and the token behind them: [U, L, D] (L + 1), and which places count."""
    return self._with_token(self.embed_events(vectors_ULV, events, hidden_actions_UL), events, token_V)

  def embed_events(self, vectors_ULV: Array, events: EventBatch, hidden_actions_UL: Array | None = None) -> Array:
    """The event embeddings, which are the decoder's input: phi_in and positions, [U, L, D]. See `encode`."""
    length = events.mask_UL.shape[1]
    if isinstance(length, int) and length > self.config.tower.max_positions:
      raise ValueError(f'histories of {length} events exceed tower.max_positions {self.config.tower.max_positions}')
    x_ULD = self.embed_tokens(vectors_ULV, events, hidden_actions_UL)
    return x_ULD if self.config.tower.rotary else x_ULD + self._positions(events)

  def embed_tokens(self, vectors_ULV: Array, events: EventBatch, hidden_actions_UL: Array | None = None) -> Array:
    """phi_in of events, wherever they stand: [U, L, D]."""
    return self.phi_in(vectors_ULV + self._event_terms(events, hidden_actions_UL))

  def _with_token(self, x_ULD: Array, events: EventBatch, token_V: Array | None) -> tuple[Array, Array]:
    """Puts the token, if there is one, behind each history's last event; and which places count."""
    if token_V is None:
      return x_ULD, events.mask_UL
    count_U = jnp.sum(events.mask_UL, axis=1)
    token_UD = self.phi_in(token_V) + self._place(count_U)
    return insert(x_ULD, token_UD, count_U), key_mask(count_U, x_ULD.shape[1] + 1, 1)

  def embed_candidates(self, vectors_MCV: Array, position_M: Array, gap_MC: Array | None = None) -> Array:
    """phi_in and position of the candidates, which all stand at their user's position: [M, C, D]."""
    token_MCV = vectors_MCV + self.action_embedding[-1]
    if self.config.tower.time_gap_buckets:
      token_MCV += self._gaps(gap_MC)
    return self.phi_in(token_MCV) + self._place(position_M[:, None])

  def extend(
    self,
    vectors_UKV: Array,
    events: EventBatch,
    context: LayerKV,
    mask_UL: Array,
    token_V: Array | None = None,
    every_output: bool = False,
  ) -> tuple[Array, LayerKV]:
    """The context pass of K events that follow histories whose keys and values are kept: equal to `encode` of both.

    Args:
      vectors_UKV: E of the new events (see `items`).
      events: the new events, row u behind history u; their real ones stand first. Time gaps count from the history's
        last event.
      context: keys and values kept by `encode` or from earlier extensions.
      mask_UL: True on the history's real events.
      token_V: see `encode`.
      every_output: H of every new event, [U, K, O]; False = of the last ones alone.

    Returns:
      H of each row's last new event [U, 1, O], and the keys and values of the new positions [N, U, K, H, K]
      (K + 1 with `token_V`).
    """
    view, first_U = View(mask_UL), jnp.sum(mask_UL, axis=1)
    position_UK = first_U[:, None] + jnp.arange(events.mask_UL.shape[1])
    x_UKD = self.phi_in(vectors_UKV + self._event_terms(events, None)) + self._place(position_UK)
    if token_V is not None:
      count_U = jnp.sum(events.mask_UL, axis=1)
      token_UD = self.phi_in(token_V) + self._place(first_U + count_U)
      x_UKD = insert(x_UKD, token_UD, count_U)
    output_UKD, kv = self.decoder.extend(x_UKD.astype(self.config.tower.dtype), context, view)
    if every_output:
      return self.phi_out(output_UKD[:, : events.mask_UL.shape[1]]), kv
    last_U11 = last_event(events.mask_UL)[:, None, None]
    return self.phi_out(jnp.take_along_axis(output_UKD, last_U11, axis=1)), kv

  def cross(
    self,
    vectors_MCV: Array,
    context: LayerKV,
    mask_UL: Array,
    train: bool = False,
    gap_MC: Array | None = None,
    user_M: Array | None = None,
    layout: Layout | None = None,
  ) -> Array:
    """The crossing pass: each candidate as the token that follows its user's history (PinFM section 3.2).

    Args:
      vectors_MCV: E of the candidates (see `items`).
      context: keys and values kept by `encode`.
      mask_UL: True on the history's real events, and on the token behind them if there is one.
      train: dropout on.
      gap_MC: bucket of the time from the last event to the request, for a model with time gaps.
      user_M: the history that each row (tile) of candidates belongs to; None = row u belongs to history u.
      layout: one of `dcat_forms`, for rows of one candidate; None = tiles.

    Returns:
      Output at each candidate's position, [M, C, O], of unit length but with `dot_product`.
    """
    position_U = jnp.sum(mask_UL, axis=1)  # the candidate's place is right behind the last real event
    position_M = position_U if user_M is None else position_U[user_M]
    x_MCD = self.embed_candidates(vectors_MCV, position_M, gap_MC).astype(self.config.tower.dtype)
    view = View(mask_UL, user_M=user_M, layout=layout)
    return self.phi_out(self.decoder.crossing(x_MCD, context, view, train))

  def _place(self, place: Array) -> Array | float:
    """Embeddings of places [...]: [..., D]; nothing where queries and keys turn instead."""
    return 0.0 if self.config.tower.rotary else self.position_embedding[place]

  def _positions(self, events: EventBatch) -> Array:
    """Position embeddings of the events, counted from the start of each segment: [L, D], or [U, L, D] if packed.

    In the backbone of padded windows from the window's end: [U, L, D].
    """
    mask_UL, segment_UL = events.mask_UL, events.segment_UL
    if self.config.tower.padded:
      place = jnp.arange(mask_UL.shape[1]) if segment_UL is None else segment_places(segment_UL)
      return self.position_embedding[places_from_end(mask_UL, segment_UL, place)]
    if segment_UL is None:
      return self.position_embedding[: mask_UL.shape[1]]
    return self.position_embedding[segment_places(segment_UL)]

  def targets(self, vectors: Array) -> Array:
    """z = psi(E) of items (see `items`), of unit length but with `dot_product`: [..., V] -> [..., O]."""
    return self.psi(vectors)

  def _event_terms(self, events: EventBatch, hidden_actions_UL: Array | None) -> Array:
    """What a token adds to its item: surface, the sum of the actions, and the time gap if the model reads it."""
    action_bits_ULA = unpack_bits(events.actions_UL, self.config.num_actions)
    actions_ULV = action_bits_ULA.astype(jnp.float32) @ self.action_embedding[:-1]
    if hidden_actions_UL is not None:
      actions_ULV = jnp.where(hidden_actions_UL[..., None], self.action_embedding[-1], actions_ULV)
    terms_ULV = self.surface_embedding[events.surface_UL] + actions_ULV
    return terms_ULV + self._gaps(events.gap_UL) if self.config.tower.time_gap_buckets else terms_ULV

  def _gaps(self, gap: Array | None) -> Array:
    if gap is None:
      raise ValueError('the model reads time gaps, but the batch has none')
    return self.gap_embedding[gap]


def _positions_init(tower: TowerConfig) -> nn.initializers.Initializer:
  """Of the position embeddings: small; in the backbone of padded windows Xavier, as in RecTools."""
  return nn.initializers.normal((2 / (tower.max_positions + tower.width)) ** 0.5 if tower.padded else 0.02)


def insert(x_UXD: Array, token_UD: Array, place_U: Array) -> Array:
  """Puts a token at a place of each row, which grows by one, over what stands there: [U, X + 1, D]."""
  here_UX1 = (jnp.arange(x_UXD.shape[1] + 1) == place_U[:, None])[..., None]
  return jnp.where(here_UX1, token_UD[:, None], jnp.pad(x_UXD, ((0, 0), (0, 1), (0, 0))))


def key_mask(events_U: Array, keys: int, more: int = 0) -> Array:
  """Which of a history's kept keys count: those of its events and of `more` tokens behind them. bool [U, keys]."""
  return jnp.arange(keys) < events_U[:, None] + more


def segment_places(segment_UL: Array) -> Array:
  """Each event's place in its segment, from 0; the events of a segment stand together. int32 [U, L]."""
  place_L = jnp.arange(segment_UL.shape[1], dtype=jnp.int32)
  starts_UL = jnp.concatenate([jnp.ones_like(segment_UL[:, :1], bool), segment_UL[:, 1:] != segment_UL[:, :-1]], axis=1)
  return place_L - jax.lax.cummax(jnp.where(starts_UL, place_L, 0), axis=1)


def l2_normalise(x: Array) -> Array:
  """Scales the last axis to unit length; a zero vector stays zero, with a zero gradient."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))


def unpack_bits(bits: Array, count: int) -> Array:
  """uint32 [...] -> bool [..., count], bit a at place a."""
  return (bits[..., None] >> jnp.arange(count, dtype=jnp.uint32)) & jnp.uint32(1) > 0
