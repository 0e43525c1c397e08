"""SASRec's blocks as RecTools trains them, on histories that padding fills up to a window (backbone).

There a history stands at the end of a window of `max_positions` places. The places before it are zero vectors that
attention is not kept from reading: to every event they are one more key and value, the projections' biases, as often as
there are such places, so that an event may look at nothing. And positions count from the window's end. Both make an
event's output depend on how many events follow it, so this backbone is for towers that are asked for a history's last
event (next-item recommenders, a baseline), not for candidates or new events behind kept keys and values.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from pinfm_jax.config import TowerConfig
from pinfm_jax.model.dcat import MASKED, LayerKV, View, visible_keys
from pinfm_jax.model.layers import dense

Array = jax.Array


class PaddedSASRecBlock(nn.Module):
  """One block of SASRec (arXiv:1808.09781), in the context pass alone; takes and returns what `transformer.Block` does.

  Queries are normalised, keys and values are not, and both residuals start from the normalised input. The MLP has ReLU
  and dropout inside; what attention adds has none, its weights do.
  """

  config: TowerConfig

  def setup(self) -> None:
    """Declares the layers."""
    width, dtype = self.config.width, jnp.dtype(self.config.dtype)
    self.norm_attention, self.norm_mlp = nn.LayerNorm(dtype=dtype), nn.LayerNorm(dtype=dtype)
    self.query = dense(width, ('embed', 'heads'), dtype=dtype)
    self.key_value = dense(2 * width, ('embed', 'heads'), dtype=dtype)
    self.attention_out = dense(width, ('heads', 'embed'), dtype=dtype)
    self.mlp_in = dense(self.config.mlp_ratio * width, ('embed', 'mlp'), dtype=dtype)
    self.mlp_out = dense(width, ('mlp', 'embed'), dtype=dtype)
    self.dropout = nn.Dropout(self.config.dropout)
    self.attention_dropout = nn.Dropout(self.config.attention_dropout)

  def __call__(self, x: Array, context: LayerKV | None, view: View, train: bool) -> tuple[Array, LayerKV]:
    """Runs the block on histories [U, L, D]; raises ValueError for tokens that follow kept keys and values."""
    if context is not None or view.bidirectional:
      raise ValueError("model.tower.backbone 'padded_sasrec' runs over whole histories, causally, and in no other way")
    normed = self.norm_attention(x)
    kv, padding = self._keys_values(x), self._keys_values(jnp.zeros_like(x[:1, :1]))
    query_ULHK = self.query(normed).reshape(kv.key.shape)
    drop = partial(self.attention_dropout, deterministic=not train)
    attended = attend_padded(query_ULHK, kv, padding, view.mask_UL, view.segment_UL, self.config.max_positions, drop)
    normed = self.norm_mlp(normed + self.attention_out(attended.reshape(x.shape)))
    hidden = self.dropout(jax.nn.relu(self.mlp_in(normed)), deterministic=not train)
    return normed + self.dropout(self.mlp_out(hidden), deterministic=not train), kv

  def _keys_values(self, x: Array) -> LayerKV:
    heads = (self.config.heads, self.config.width // self.config.heads)
    return LayerKV(*(y.reshape(*x.shape[:-1], *heads) for y in jnp.split(self.key_value(x), 2, axis=-1)))


def attend_padded(
  query_ULHK: Array,
  kv: LayerKV,
  padding: LayerKV,
  mask_UL: Array,
  segment_UL: Array | None,
  window: int,
  drop: Callable[[Array], Array],
) -> Array:
  """Causal self-attention of histories that padding precedes in a window; softmax in float32.

  Args:
    query_ULHK: queries of every position.
    kv: keys and values of the same positions.
    padding: the key and value [1, 1, H, K] of a padded place, which counts as often as there are such places.
    mask_UL: True on real events.
    segment_UL: int32, equal inside a segment of a packed row, each of which has a window; None = one a row.
    window: places of a window.
    drop: dropout of the weights of events; that of the padding, a sum over many places, is left alone.

  Returns:
    [U, L, H, K]; a place without an event has a finite and meaningless output.
  """
  scale = 1 / math.sqrt(query_ULHK.shape[-1])
  inputs_UL = inputs(mask_UL, segment_UL)
  scores_UHLM = jnp.einsum('ulhk,umhk->uhlm', query_ULHK, kv.key, preferred_element_type=jnp.float32) * scale
  nothing_UHL = jnp.einsum('ulhk,hk->uhl', query_ULHK, padding.key[0, 0], preferred_element_type=jnp.float32) * scale
  places_UL = jnp.maximum(window - inputs_UL, 0).astype(jnp.float32)
  nothing_UHL = jnp.where(places_UL[:, None] > 0, nothing_UHL + jnp.log(places_UL)[:, None], MASKED)
  scores_UHLM = jnp.where(visible_keys(mask_UL, segment_UL), scores_UHLM, MASKED)
  weights = jax.nn.softmax(jnp.concatenate([scores_UHLM, nothing_UHL[..., None]], axis=-1), axis=-1)
  weights = weights.astype(kv.value.dtype)
  attended = jnp.einsum('uhlm,umhk->ulhk', drop(weights[..., :-1]), kv.value)
  return attended + weights[..., -1].swapaxes(1, 2)[..., None] * padding.value


def inputs(mask_UL: Array, segment_UL: Array | None) -> Array:
  """How many events of each position's history are read: int32 [U, L].

  All of them; but in a packed row, which pretraining alone has, a segment's last event is a target and no input.
  """
  if segment_UL is None:
    return jnp.broadcast_to(jnp.sum(mask_UL, axis=1, keepdims=True), mask_UL.shape)
  own_ULM = (segment_UL[:, :, None] == segment_UL[:, None, :]) & mask_UL[:, None, :]
  return jnp.maximum(jnp.sum(own_ULM, axis=2) - 1, 1)


def places_from_end(mask_UL: Array, segment_UL: Array | None, place_UL: Array) -> Array:
  """How many inputs of its history follow each position, from its place in the history: int32 [U, L], at least 0."""
  return jnp.maximum(inputs(mask_UL, segment_UL) - 1 - place_UL, 0)
