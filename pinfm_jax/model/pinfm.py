"""PinFM: events in, user representations out (H), item targets (z), and the early-fusion candidate pass."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pinfm_jax.config import PinFMConfig
from pinfm_jax.model.dcat import LayerKV
from pinfm_jax.model.transformer import Decoder, dense

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
  """

  item_UL2: Array
  surface_UL: Array
  actions_UL: Array
  mask_UL: Array
  user_UL: Array | None = None
  segment_UL: Array | None = None


def no_events(users: int, length: int) -> EventBatch:
  """A batch of the right types and shapes for `init`."""
  shape = (users, length)
  item_UL2 = jnp.zeros((*shape, 2), jnp.uint32)
  surface_UL, actions_UL = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.uint32)
  return EventBatch(item_UL2, surface_UL, actions_UL, jnp.ones(shape, bool), jnp.zeros(shape, jnp.uint32))


class PointwiseMLP(nn.Module):
  """phi_in, phi_out or psi: two layers with GELU, then L2 normalisation (PinFM section 3.1)."""

  hidden: int
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., any width] -> [..., width] of unit length, in float32."""
    x = jax.nn.gelu(dense(self.hidden, (None, 'mlp'), dtype=self.dtype)(x))
    return l2_normalise(dense(self.width, ('mlp', None), dtype=self.dtype)(x).astype(jnp.float32))


class PinFM(nn.Module):
  """The dense part of PinFM; item vectors come from the hashed tables and are passed in."""

  config: PinFMConfig

  def setup(self) -> None:
    """Declares embeddings, MLPs and the decoder."""
    tower, item_width = self.config.tower, self.config.tables.item_width
    dtype = jnp.dtype(tower.dtype)
    normal = nn.initializers.normal(0.02)
    self.surface_embedding = self.param('surface_embedding', normal, (self.config.num_surfaces, item_width))
    # One row an action, and a last one that marks a candidate: it has no action yet, and no surface.
    self.action_embedding = self.param('action_embedding', normal, (self.config.num_actions + 1, item_width))
    self.position_embedding = self.param('position_embedding', normal, (tower.max_positions, tower.width))
    self.phi_in = PointwiseMLP(tower.width, tower.width, dtype)
    self.phi_out = PointwiseMLP(tower.width, tower.output_width, dtype)
    self.psi = PointwiseMLP(tower.width, tower.output_width, dtype)
    self.decoder = Decoder(tower)

  def __call__(self, vectors_ULV: Array, events: EventBatch) -> tuple[Array, Array]:
    """H and z of every position: touches every parameter, so it is what `init` runs."""
    return self.encode(vectors_ULV, events)[0], self.targets(vectors_ULV)

  def encode(
    self, vectors_ULV: Array, events: EventBatch, train: bool = False, every_output: bool = True
  ) -> tuple[Array, LayerKV]:
    """The context pass: H = phi_out(M(phi_in(E + V + A))) (PinFM Eq. 1).

    Args:
      vectors_ULV: item vectors of the events, V = S * E.
      events: surfaces, actions and mask of the same events.
      train: dropout on.
      every_output: False computes H of each history's last event alone.

    Returns:
      Unit-length H [U, L, O], or [U, 1, O] of the last events; and every layer's keys and values.

    Raises:
      ValueError: histories longer than the learned positions.
    """
    length = events.mask_UL.shape[1]
    if isinstance(length, int) and length > self.config.tower.max_positions:
      raise ValueError(f'histories of {length} events exceed tower.max_positions {self.config.tower.max_positions}')
    action_bits_ULA = unpack_bits(events.actions_UL, self.config.num_actions)
    actions_ULV = action_bits_ULA.astype(jnp.float32) @ self.action_embedding[:-1]  # an event's actions are summed
    surfaces_ULV = self.surface_embedding[events.surface_UL]
    x_ULD = self.phi_in(vectors_ULV + surfaces_ULV + actions_ULV) + self._positions(events)
    x_ULD = x_ULD.astype(self.config.tower.dtype)
    output_ULD, kv = self.decoder.context(x_ULD, events.mask_UL, train, every_output, events.segment_UL)
    return self.phi_out(output_ULD), kv

  def cross(self, vectors_UCV: Array, context: LayerKV, mask_UL: Array, train: bool = False) -> Array:
    """The crossing pass: each candidate as the token that follows its user's history (PinFM section 3.2).

    Args:
      vectors_UCV: item vectors of the candidates.
      context: keys and values kept by `encode`.
      mask_UL: True on the history's real events.
      train: dropout on.

    Returns:
      Unit-length output at each candidate's position, [U, C, O].
    """
    position_U = jnp.sum(mask_UL, axis=1)  # the candidate's place is right behind the last real event
    x_UCD = self.phi_in(vectors_UCV + self.action_embedding[-1]) + self.position_embedding[position_U][:, None, :]
    x_UCD = x_UCD.astype(self.config.tower.dtype)
    return self.phi_out(self.decoder.crossing(x_UCD, context, mask_UL, train))

  def _positions(self, events: EventBatch) -> Array:
    """Position embeddings of the events, counted from the start of each segment: [L, D], or [U, L, D] if packed."""
    if events.segment_UL is None:
      return self.position_embedding[: events.mask_UL.shape[1]]
    return self.position_embedding[segment_places(events.segment_UL)]

  def targets(self, vectors: Array) -> Array:
    """z = psi(emb(id)), unit length: [..., V] -> [..., O]."""
    return self.psi(vectors)


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
