"""DCAT, deduplicated cross attention: a history is read once a user, candidates attend to its kept keys and values.

The context pass runs the decoder over U distinct histories and keeps each layer's keys and values (PinFM Eq. 3). The
crossing pass runs it over candidates grouped by user (Eq. 4). `dense_oracle` states what both together must equal.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array

_LEAST_BLOCK = 16  # queries
MASKED = -1e30  # finite, so that a fully masked part has weight 0 and no NaN gradient


@flax.struct.dataclass
class LayerKV:
  """Keys and values [U, L, H, K] of one layer (or [N, U, L, H, K] of all), mask_UL True on real events."""

  key: Array
  value: Array


@flax.struct.dataclass
class View:
  """What the tokens of a pass look at besides themselves.

  Attributes:
    mask_UL: True on the keys of the histories that count.
    segment_UL: int32 segments of packed rows in the context pass, which do not see each other; None = one a row.
    user_M: int32, the history that each row of tokens belongs to: several rows (tiles of candidates, pieces of one
      user) then share a history. None = row u belongs to history u.
    causal: a token also sees the tokens before it in its row (appended events); False: just itself (candidates).
  """

  mask_UL: Array
  segment_UL: Array | None = None
  user_M: Array | None = None
  causal: bool = flax.struct.field(pytree_node=False, default=False)

  def rows(self, context: LayerKV) -> tuple[LayerKV, Array]:
    """One layer's keys and values, and the mask, of each row of tokens: copied once a row, never once a candidate."""
    if self.user_M is None:
      return context, self.mask_UL
    return jax.tree.map(lambda y: y[self.user_M], context), self.mask_UL[self.user_M]


def visible_keys(mask_UL: Array, segment_UL: Array | None) -> Array:
  """Which keys m a query l may see: real ones, not later than itself, of its own segment. bool [U, 1, L, L]."""
  place_L = jnp.arange(mask_UL.shape[1])
  visible_ULM = (place_L[:, None] >= place_L[None, :]) & mask_UL[:, None, :]
  if segment_UL is not None:
    visible_ULM &= segment_UL[:, :, None] == segment_UL[:, None, :]
  return visible_ULM[:, None]


def attend_causal(query_ULHK: Array, kv: LayerKV, mask_UL: Array, segment_UL: Array | None = None) -> Array:
  """Causal self-attention over histories (PinFM Eq. 3); softmax in float32.

  Args:
    query_ULHK: queries of every position.
    kv: keys and values of the same positions.
    mask_UL: True on real events; padding is never attended to.
    segment_UL: int32, equal inside a segment of a packed row; segments do not attend to each other. None = one a row.

  Returns:
    [U, L, H, K]; a padded position's output is finite and meaningless.
  """
  users, length, heads, width = query_ULHK.shape
  visible_U1LM = visible_keys(mask_UL, segment_UL)
  # [U * H, L, K]: batched matmuls whose batch stands in front run up to three times as fast on CPU.
  query, key, value = (x.swapaxes(1, 2).reshape(users * heads, length, width) for x in (query_ULHK, kv.key, kv.value))
  outputs = []
  for rows in _query_blocks(length):
    keys = slice(0, rows.stop)
    scores = jnp.einsum('blk,bmk->blm', query[:, rows], key[:, keys], preferred_element_type=jnp.float32)
    scores_UHLM = scores.reshape(users, heads, *scores.shape[1:]) * (1 / math.sqrt(width))
    weights_UHLM = jax.nn.softmax(jnp.where(visible_U1LM[:, :, rows, keys], scores_UHLM, MASKED), axis=-1)
    weights = weights_UHLM.astype(value.dtype).reshape(scores.shape)
    outputs.append(jnp.einsum('blm,bmk->blk', weights, value[:, keys]))
  return jnp.concatenate(outputs, axis=1).reshape(users, heads, length, width).swapaxes(1, 2)


def _query_blocks(length: int) -> list[slice]:
  """Rows of the scores that are computed together: each block leaves out the keys behind it, 3/8 of all with four.

  A symbolic length is one block.
  """
  if not isinstance(length, int) or length < 2 * _LEAST_BLOCK:
    return [slice(0, length)]
  count = min(4, length // _LEAST_BLOCK)
  edges = [length * i // count for i in range(count + 1)]
  return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def attend_context(query_UCHK: Array, context: LayerKV, mask_UL: Array, own: LayerKV, causal: bool = False) -> Array:
  """Attention of each candidate over its user's history and itself (PinFM Eq. 4); candidates never see each other.

  The history's K/V are shared by a user's candidates, so the scores are one batched matmul and no K/V is copied; a
  candidate's own key is one more softmax column, folded in by the running-maximum form of the softmax.

  Args:
    query_UCHK: candidate queries.
    context: keys and values of the history, [U, L, H, K].
    mask_UL: True on real events.
    own: the candidates' own keys and values, [U, C, H, K].
    causal: the tokens are events that follow the history, and see those before them too.

  Returns:
    [U, C, H, K]; a user without events attends to itself alone.
  """
  scale = 1 / math.sqrt(query_UCHK.shape[-1])
  scores_UHCL = scale * jnp.einsum('uchk,ulhk->uhcl', query_UCHK, context.key, preferred_element_type=jnp.float32)
  scores_UHCL = jnp.where(mask_UL[:, None, None, :], scores_UHCL, MASKED)
  own_UHCX = scale * own_scores(query_UCHK, own.key, causal, MASKED)
  top_UHC1 = jnp.maximum(jnp.max(scores_UHCL, -1, keepdims=True, initial=MASKED), jnp.max(own_UHCX, -1, keepdims=True))
  top_UHC1 = jax.lax.stop_gradient(top_UHC1)
  weights_UHCL, own_UHCX = jnp.exp(scores_UHCL - top_UHC1), jnp.exp(own_UHCX - top_UHC1)
  total_UCH = (jnp.sum(weights_UHCL, axis=-1) + jnp.sum(own_UHCX, axis=-1)).swapaxes(1, 2)
  weights_UHCL = weights_UHCL.astype(context.value.dtype)
  mixed_UCHK = jnp.einsum('uhcl,ulhk->uchk', weights_UHCL, context.value, preferred_element_type=jnp.float32)
  mixed_UCHK += mix_own(own_UHCX, own.value, causal)
  return (mixed_UCHK / total_UCH[..., None]).astype(own.value.dtype)


def own_scores(query_UCHK: Array, key_UCHK: Array, causal: bool, later: float) -> Array:
  """Products of tokens with their own keys.

  Args:
    query_UCHK: queries.
    key_UCHK: keys of the same tokens.
    causal: with the keys of the tokens before them too.
    later: what stands for a later token's key.

  Returns:
    float32 [U, H, C, 1], or [U, H, C, C] if causal.
  """
  if not causal:
    products_UCH = jnp.einsum('uchk,uchk->uch', query_UCHK, key_UCHK, preferred_element_type=jnp.float32)
    return products_UCH.swapaxes(1, 2)[..., None]
  products_UHCX = jnp.einsum('uchk,uxhk->uhcx', query_UCHK, key_UCHK, preferred_element_type=jnp.float32)
  place_C = jnp.arange(query_UCHK.shape[1])
  return jnp.where(place_C[:, None] >= place_C[None, :], products_UHCX, later)


def mix_own(weights_UHCX: Array, value_UCHK: Array, causal: bool) -> Array:
  """Sum of the tokens' own values by the weights that `own_scores` led to: float32 [U, C, H, K]."""
  if not causal:
    return weights_UHCX.swapaxes(1, 2) * value_UCHK
  weights_UHCX = weights_UHCX.astype(value_UCHK.dtype)
  return jnp.einsum('uhcx,uxhk->uchk', weights_UHCX, value_UCHK, preferred_element_type=jnp.float32)
