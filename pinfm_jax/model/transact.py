"""TransAct, the baseline ranker's own user-sequence module (KDD 2023, arXiv:2306.00248), trained from scratch.

The newest events, newest first; every position is [item ; actions ; candidate], so that the encoder sees each event
together with the candidate. What is kept of its output: the first positions, and the maximum over all positions through
one linear layer. No position embeddings: as in TransAct, order enters by which outputs are the first alone.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pinfm_jax.config import PinFMConfig, TransActConfig
from pinfm_jax.model.hashing import fold_seed, hash_uniform
from pinfm_jax.model.layers import dense
from pinfm_jax.model.pinfm import l2_normalise, unpack_bits

Array = jax.Array

_WINDOW = 11  # purpose of the draw, beside those of `cold_start` and `masking`
_MASKED = -1e9  # finite: a user without events must not become NaN


class RecentEvents(NamedTuple):
  """The newest events of U users, newest first, padded at the end.

  Attributes:
    item_UL: int32 rows of the module's own item table (`featurize.recent_items`), 0 = padding.
    actions_UL: uint32, bit a set if action a was taken.
    hours_UL: float32 hours from the event to the request, NaN = unknown; read in training alone.
    content_ULW: float16 unit-length content of the items, for a model with content.
  """

  item_UL: Array
  actions_UL: Array
  hours_UL: Array | None = None
  content_ULW: Array | None = None


def no_recent_events(users: int, length: int, model: PinFMConfig) -> RecentEvents:
  """A batch of the right types and shapes for `init`."""
  shape = (users, length)
  content_ULW = jnp.zeros((*shape, model.content_width), jnp.float16) if model.content else None
  return RecentEvents(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.uint32), jnp.zeros(shape), content_ULW)


def hide_newest(events: RecentEvents, place_U: Array, seed: Array, most_hours: float) -> Array:
  """Draws a window before each request, whose events the module does not see in training (TransAct: up to an hour).

  Without it a feed that learns from the last minutes shows more of the same, and users tire.

  Args:
    events: the events, with their hours before the request; an event of unknown time is never hidden.
    place_U: each request's place in the global batch.
    seed: of the run and its step (`hashing.fold_seed`).
    most_hours: the window is uniform in [0, most_hours).

  Returns:
    True on hidden events, bool [U, L].
  """
  uniform_U = (hash_uniform(place_U, fold_seed(seed, _WINDOW)) >> 8).astype(jnp.float32) / 2**24
  return events.hours_UL < (most_hours * uniform_U)[:, None]  # false for NaN


@jax.custom_vjp
def max_over_events(x_UCLD: Array) -> Array:
  """The maximum over the events, [U, C, D]; its gradient goes to the first event that has it.

  `jnp.max` compares the values with their maximum in the backward pass, and divides by how many are equal: NaN where
  XLA computes the values twice, a bit differently.
  """
  return jnp.max(x_UCLD, axis=2)


def _max_forward(x_UCLD: Array) -> tuple[Array, tuple[Array, Array]]:
  return max_over_events(x_UCLD), (jnp.argmax(x_UCLD, axis=2), jnp.arange(x_UCLD.shape[2]))


def _max_backward(kept: tuple[Array, Array], gradient_UCD: Array) -> tuple[Array]:
  largest_UCD, place_L = kept
  return (jnp.where(place_L[:, None] == largest_UCD[:, :, None], gradient_UCD[:, :, None], 0),)


max_over_events.defvjp(_max_forward, _max_backward)


class TransAct(nn.Module):
  """The encoder of a user's newest events with one candidate at a time."""

  config: TransActConfig
  num_actions: int
  content_width: int = 0

  def setup(self) -> None:
    """Declares embeddings, the layers, and the pooled output's linear layer."""
    config, width = self.config, self.config.width
    if 3 * width % config.heads:
      raise ValueError(f'3 x ranker.transact.width {width} is not a multiple of ranker.transact.heads {config.heads}')
    if not 0 <= config.outputs <= config.length or config.layers < 1:
      raise ValueError(
        f'ranker.transact has length {config.length}, outputs {config.outputs}, layers {config.layers}; '
        'expected 0 <= outputs <= length and at least one layer'
      )
    normal = nn.initializers.normal(0.05)
    self.item_embedding = self.param('item_embedding', normal, (config.item_buckets + 1, width))
    # One row an action, and a last one for events without any.
    self.action_embedding = self.param('action_embedding', normal, (self.num_actions + 1, width))
    if self.content_width:
      self.content_projection = self.param('content_projection', normal, (self.content_width, width))
    self.encoder = [
      EncoderLayer(3 * width, config.heads, config.feedforward, first=i == 0) for i in range(config.layers)
    ]
    self.pool_out = dense(3 * width, (None, None))

  def __call__(
    self, events: RecentEvents, item_UC: Array, content_UCW: Array | None = None, hidden_UL: Array | None = None
  ) -> Array:
    """Runs the module.

    Args:
      events: of U users.
      item_UC: the candidates' rows of the item table.
      content_UCW: their content, for a model with content.
      hidden_UL: True on events to leave out (`hide_newest`); None = none.

    Returns:
      [U, C, (outputs + 1) * 3 * width]: the pooled output, then those of the newest events, zeros where there are
      fewer; all zeros for a user without events.

    Raises:
      ValueError: sizes that do not fit the configuration, or a batch without the content that the model reads.
    """
    if events.item_UL.shape[1] != self.config.length:
      raise ValueError(f'got {events.item_UL.shape[1]} recent events, expected {self.config.length}, padded')
    mask_UL = events.item_UL > 0
    if hidden_UL is not None:
      mask_UL &= ~hidden_UL
    event_ULV = jnp.concatenate([self._items(events.item_UL, events.content_ULW), self._actions(events)], axis=-1)
    x_UCLD = (event_ULV, self._items(item_UC, content_UCW))
    for layer in self.encoder:
      x_UCLD = layer(x_UCLD, mask_UL)
    seen_U1L1 = mask_UL[:, None, :, None]
    pooled_UCD = self.pool_out(max_over_events(jnp.where(seen_U1L1, x_UCLD, _MASKED)))
    pooled_UCD = jnp.where(jnp.any(mask_UL, axis=1)[:, None, None], pooled_UCD, 0)
    newest_UCKD = jnp.where(seen_U1L1, x_UCLD, 0)[:, :, : self.config.outputs]
    return jnp.concatenate([pooled_UCD, newest_UCKD.reshape(*item_UC.shape, -1)], axis=-1)

  def _items(self, item: Array, content: Array | None) -> Array:
    """Unit-length vectors of items, as TransAct's pretrained ones are: own row, plus the projected content."""
    vectors = self.item_embedding[item]
    if self.content_width:
      if content is None:
        raise ValueError('the model reads content vectors, but the batch has none')
      vectors += content.astype(jnp.float32) @ self.content_projection
    return l2_normalise(vectors)

  def _actions(self, events: RecentEvents) -> Array:
    taken_ULA = unpack_bits(events.actions_UL, self.num_actions).astype(jnp.float32)
    none_UL1 = (events.actions_UL == 0)[..., None]
    return jnp.where(none_UL1, self.action_embedding[-1], taken_ULA @ self.action_embedding[:-1])


class EncoderLayer(nn.Module):
  """A post-LN transformer layer with ReLU, as TransAct's is (PyTorch's default encoder layer), without dropout.

  Post-LN also means that the first layer projects its input as it is: the projection of [event ; candidate] is a sum of
  one over U x L events and one over U x C candidates. And the candidate's part of a key would add the same to all
  scores of a query, which softmax drops, so that keys are shared by a user's candidates; the candidate's part of the
  value passes through the softmax unchanged. Equal to the plain form, in a fifth less time in training.
  """

  width: int
  heads: int
  feedforward: int
  first: bool

  @nn.compact
  def __call__(self, x_UCLD: Array | tuple[Array, Array], mask_UL: Array) -> Array:
    """[U, C, L, D] -> [U, C, L, D]; the first layer takes the events [U, L, V] and the candidates [U, C, D - V]."""
    if self.first:
      attended_UCLD, x_UCLD = self._attend_parts(*x_UCLD, mask_UL)
    else:
      query, key, value = self._split(dense(3 * self.width, (None, None), name='query_key_value')(x_UCLD), 3)
      scores_UCHLM = jnp.einsum('uclhk,ucmhk->uchlm', query, key)
      attended = jnp.einsum('uchlm,ucmhk->uclhk', self._weights(scores_UCHLM, mask_UL), value)
      attended_UCLD = attended.reshape(x_UCLD.shape)
    x_UCLD = nn.LayerNorm(name='norm_attention')(
      x_UCLD + dense(self.width, (None, None), name='attention_out')(attended_UCLD)
    )
    hidden = jax.nn.relu(dense(self.feedforward, (None, None), name='mlp_in')(x_UCLD))
    return nn.LayerNorm(name='norm_mlp')(x_UCLD + dense(self.width, (None, None), name='mlp_out')(hidden))

  def _attend_parts(self, event_ULV: Array, candidate_UCW: Array, mask_UL: Array) -> tuple[Array, Array]:
    """Attention of the first layer, and its input [event ; candidate] at every position."""
    query_ULHK, key_ULHK, value_ULHK = self._split(
      dense(3 * self.width, (None, None), name='query_key_value')(event_ULV), 3
    )
    of_candidate = dense(2 * self.width, (None, None), use_bias=False, name='candidate_query_value')(candidate_UCW)
    query_UCHK, value_UCHK = self._split(of_candidate, 2)
    scores_UHLM = jnp.einsum('ulhk,umhk->uhlm', query_ULHK, key_ULHK)
    scores_UCHM = jnp.einsum('uchk,umhk->uchm', query_UCHK, key_ULHK)
    weights_UCHLM = self._weights(scores_UHLM[:, None] + scores_UCHM[..., None, :], mask_UL)
    attended = jnp.einsum('uchlm,umhk->uclhk', weights_UCHLM, value_ULHK) + value_UCHK[:, :, None]
    shape = (*candidate_UCW.shape[:2], event_ULV.shape[1])
    parts = (event_ULV[:, None], candidate_UCW[:, :, None])
    x_UCLD = jnp.concatenate([jnp.broadcast_to(part, (*shape, part.shape[-1])) for part in parts], axis=-1)
    return attended.reshape(*shape, self.width), x_UCLD

  def _split(self, projected: Array, parts: int) -> tuple[Array, ...]:
    heads = (self.heads, self.width // self.heads)
    return tuple(x.reshape(*x.shape[:-1], *heads) for x in jnp.split(projected, parts, axis=-1))

  def _weights(self, scores_UCHLM: Array, mask_UL: Array) -> Array:
    scale = (self.width // self.heads) ** -0.5
    return jax.nn.softmax(jnp.where(mask_UL[:, None, None, None], scores_UCHLM * scale, _MASKED), axis=-1)
