"""DCAT, deduplicated cross attention: a history is read once a user, candidates attend to its kept keys and values.

The context pass runs the decoder over U distinct histories and keeps each layer's keys and values (PinFM Eq. 3). The
crossing pass runs it over candidates grouped by user (Eq. 4). `dcat_forms.dense` states what both together must equal.
"""

import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array

_LEAST_BLOCK = 16  # queries
_KEY_BLOCK = 256  # keys that many candidates read at a time; shorter histories are read at once
_MANY = 64  # candidates
MASKED = -1e30  # finite, so that a fully masked part has weight 0 and no NaN gradient
LEAST = 1e-30  # of a softmax sum, which without a key (L = 0) is 0


@flax.struct.dataclass
class LayerKV:
  """Keys and values, [U, L, H, K] of one layer or [N, U, L, H, K] of all."""

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
    bidirectional: in the context pass every event sees all events of its history, not just those before it.
    place_UL: int32 places of the tokens of a pass, for rotary positions; broadcasts to [U, L]. None = without these.
    layout: rows are single candidates, and this makes each row's own keys and values (`dcat_forms`, for comparison).
  """

  mask_UL: Array
  segment_UL: Array | None = None
  user_M: Array | None = None
  place_UL: Array | None = None
  causal: bool = flax.struct.field(pytree_node=False, default=False)
  bidirectional: bool = flax.struct.field(pytree_node=False, default=False)
  layout: 'Layout | None' = flax.struct.field(pytree_node=False, default=None)

  def rows(self, context: LayerKV) -> tuple[LayerKV, Array]:
    """One layer's keys and values, and the mask, of each row of tokens: copied once a row, never once a candidate."""
    if self.user_M is None:
      return context, self.mask_UL
    return jax.tree.map(lambda y: y[self.user_M], context), self.mask_UL[self.user_M]


@flax.struct.dataclass
class RowKeys:
  """Keys and values of each candidate's row, its own among them.

  Attributes:
    kv: [B * H, X, K], heads first.
    visible_BX: True on keys that count.
    distance_BX: int32, how many places before the candidate a key's token stands; 0 for its own.
  """

  kv: LayerKV
  visible_BX: Array
  distance_BX: Array


Layout = Callable[[View, LayerKV, LayerKV], RowKeys]  # of what is seen, the users' keys and the candidates' own


def visible_keys(mask_UL: Array, segment_UL: Array | None) -> Array:
  """Which keys m a query l may see: real ones, not later than itself, of its own segment. bool [U, 1, L, L]."""
  place_L = jnp.arange(mask_UL.shape[1])
  visible_ULM = (place_L[:, None] >= place_L[None, :]) & mask_UL[:, None, :]
  if segment_UL is not None:
    visible_ULM &= segment_UL[:, :, None] == segment_UL[:, None, :]
  return visible_ULM[:, None]


def attend_causal(
  query_ULHK: Array,
  kv: LayerKV,
  mask_UL: Array,
  segment_UL: Array | None = None,
  drop: Callable[[Array], Array] | None = None,
) -> Array:
  """Causal self-attention over histories (PinFM Eq. 3); softmax in float32.

  Args:
    query_ULHK: queries of every position.
    kv: keys and values of the same positions.
    mask_UL: True on real events; padding is never attended to.
    segment_UL: int32, equal inside a segment of a packed row; segments do not attend to each other. None = one a row.
    drop: dropout of the weights; None = none.

  Returns:
    [U, L, H, K]; a padded position's output is finite and meaningless.
  """
  users, length, heads, width = query_ULHK.shape
  visible_U1LM = visible_keys(mask_UL, segment_UL)
  # [U * H, L, K]: batched matmuls whose batch stands in front run up to three times as fast on CPU.
  query, key, value = (heads_first(x) for x in (query_ULHK, kv.key, kv.value))
  outputs = []
  for rows in _query_blocks(length):
    keys = slice(0, rows.stop)
    scores = jnp.einsum('blk,bmk->blm', query[:, rows], key[:, keys], preferred_element_type=jnp.float32)
    scores_UHLM = scores.reshape(users, heads, *scores.shape[1:]) * (1 / math.sqrt(width))
    weights_UHLM = jax.nn.softmax(jnp.where(visible_U1LM[:, :, rows, keys], scores_UHLM, MASKED), axis=-1)
    weights_UHLM = weights_UHLM if drop is None else drop(weights_UHLM)
    weights = weights_UHLM.astype(value.dtype).reshape(scores.shape)
    outputs.append(jnp.einsum('blm,bmk->blk', weights, value[:, keys]))
  return jnp.concatenate(outputs, axis=1).reshape(users, heads, length, width).swapaxes(1, 2)


def attend_bidirectional(query_ULHK: Array, kv: LayerKV, mask_UL: Array) -> Array:
  """Self-attention over histories in which every event sees all real ones; shapes of `attend_causal`."""
  return attend_part(query_ULHK, kv, mask_UL[:, None, None]).output_UCHK.astype(kv.value.dtype)


def _query_blocks(length: int) -> list[slice]:
  """Rows of the scores that are computed together: each block leaves out the keys behind it, 3/8 of all with four.

  A symbolic length is one block.
  """
  if not isinstance(length, int) or length < 2 * _LEAST_BLOCK:
    return [slice(0, length)]
  count = min(4, length // _LEAST_BLOCK)
  edges = [length * i // count for i in range(count + 1)]
  return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


@flax.struct.dataclass
class Part:
  """Attention over some of the keys, which merges with that over others (`merge`).

  Attributes:
    output_UCHK: float32, the values mixed by the softmax over these keys alone.
    lse_UCH1: float32, the logarithm of the sum of the exponentiated scores: how much these keys weigh.
  """

  output_UCHK: Array
  lse_UCH1: Array


def attend_context(query_UCHK: Array, context: LayerKV, mask_UL: Array, own: LayerKV, causal: bool = False) -> Array:
  """Attention of each candidate over its user's history and itself (PinFM Eq. 4); candidates never see each other.

  The history's K/V are shared by a user's candidates, so the scores are one batched matmul and no K/V is copied. What
  is read of the history and the candidate's own key are two parts that are merged by the logarithms of their softmax
  sums, so the first can run on any attention that returns them.

  Args:
    query_UCHK: candidate queries.
    context: keys and values of the history, [U, L, H, K].
    mask_UL: True on real events.
    own: the candidates' own keys and values, [U, C, H, K].
    causal: the tokens are events that follow the history, and see those before them too.

  Returns:
    [U, C, H, K]; a user without events attends to itself alone.
  """
  part = own_part(query_UCHK, own, causal)
  if _in_blocks(mask_UL.shape[1], query_UCHK.shape[1], causal):
    attended_UCHK = attend_blocks(query_UCHK, context, mask_UL, part, _KEY_BLOCK).output_UCHK
  else:
    attended_UCHK = merge(attend_part(query_UCHK, context, mask_UL[:, None, None]), part).output_UCHK
  return attended_UCHK.astype(own.value.dtype)


def _in_blocks(length: int, candidates: int, causal: bool) -> bool:
  """Whether the scores of all keys at once would leave the cache.

  On CPU, 1,000 candidates x 2,048 keys take a third of the time in blocks and 1/7 of the memory; 256 keys gain nothing.
  A symbolic number of candidates may be large; a symbolic length cannot be cut.
  """
  many = not isinstance(candidates, int) or candidates >= _MANY
  return isinstance(length, int) and length >= 2 * _KEY_BLOCK and many and not causal


def attend_blocks(query_UCHK: Array, kv: LayerKV, mask_UL: Array, part: Part, block: int) -> Part:
  """Attention over a history's keys, a block after another, and the keys of `part`: exact, with bounded memory.

  Args:
    query_UCHK: candidate queries.
    kv: keys and values of the history, [U, L, H, K].
    mask_UL: True on real events.
    part: what is merged with the first block.
    block: keys at a time; the last block is padded.
  """
  users, length = mask_UL.shape
  count = -(-length // block)

  def cut(x_UL: Array) -> Array:
    padded_UL = jnp.pad(x_UL, ((0, 0), (0, count * block - length), *[(0, 0)] * (x_UL.ndim - 2)))
    return padded_UL.reshape(users, count, block, *x_UL.shape[2:]).swapaxes(0, 1)

  def step(part: Part, inputs: tuple[LayerKV, Array]) -> tuple[Part, None]:
    kv, mask_UL = inputs
    return merge(part, attend_part(query_UCHK, kv, mask_UL[:, None, None])), None

  return jax.lax.scan(step, part, (jax.tree.map(cut, kv), cut(mask_UL)))[0]


def attend_part(query_UCHK: Array, kv: LayerKV, visible: Array) -> Part:
  """Attention over the keys [U, L, H, K] that are visible (bool, broadcasts to [U, H, C, L]); softmax in float32.

  Where no key is visible, the output is finite and weighs nothing in a merge.
  """
  users, candidates, heads, width = query_UCHK.shape
  query, key, value = (heads_first(x) for x in (query_UCHK, kv.key, kv.value))
  output, lse = attend_heads(query, key, value, visible, heads)
  output, lse = (x.reshape(users, heads, candidates, x.shape[-1]).swapaxes(1, 2) for x in (output, lse))
  return Part(output, lse)


def attend_heads(query: Array, key: Array, value: Array, visible: Array, heads: int) -> tuple[Array, Array]:
  """`attend_part` for arrays [U * H, C or L, K]: batched matmuls whose batch stands in front are the fastest on CPU.

  Returns:
    Output [U * H, C, K] and logarithms of the softmax sums [U * H, C, 1], float32.
  """
  scale = 1 / math.sqrt(query.shape[-1])
  scores = jnp.einsum('bck,blk->bcl', query, key, preferred_element_type=jnp.float32)
  scores_UHCL = scores.reshape(query.shape[0] // heads, heads, *scores.shape[1:])
  scores = jnp.where(visible, scores_UHCL, MASKED).reshape(scores.shape)
  top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=MASKED))
  weights = jnp.exp((scores - top) * scale)  # scaled here, where it is free, and in float32
  total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), LEAST)
  mixed = jnp.einsum('bcl,blk->bck', weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
  return mixed / total, scale * top + jnp.log(total)


def attend_rows(query_B1HK: Array, rows: RowKeys) -> Array:
  """Attention of single candidates over the keys of their rows, float32 [B, 1, H, K]."""
  batch, _, heads, width = query_B1HK.shape
  visible_B11X = rows.visible_BX[:, None, None]
  mixed, _ = attend_heads(heads_first(query_B1HK), rows.kv.key, rows.kv.value, visible_B11X, heads)
  return mixed.reshape(batch, 1, heads, width)


def own_part(query_UCHK: Array, own: LayerKV, causal: bool) -> Part:
  """The tokens' attention to themselves: one key each, or with `causal` those of the tokens before them too."""
  if causal:
    place_C = jnp.arange(query_UCHK.shape[1])
    return attend_part(query_UCHK, own, place_C[:, None] >= place_C[None, :])
  score_UCH1 = own_score(query_UCHK, own.key) * (1 / math.sqrt(query_UCHK.shape[-1]))
  return Part(own.value.astype(jnp.float32), score_UCH1)


def own_score(query_UCHK: Array, key_UCHK: Array) -> Array:
  """Products of tokens' queries with their own keys: float32 [U, C, H, 1]."""
  return jnp.einsum('uchk,uchk->uch', query_UCHK, key_UCHK, preferred_element_type=jnp.float32)[..., None]


def merge(first: Part, second: Part) -> Part:
  """Attention over the keys of two parts together: each output weighs by its softmax sum.

  The logistic function of the difference of the logarithms cannot overflow.
  """
  share_UCH1 = jax.nn.sigmoid(first.lse_UCH1 - second.lse_UCH1)
  output_UCHK = share_UCH1 * first.output_UCHK + (1 - share_UCH1) * second.output_UCHK
  return Part(output_UCHK, jnp.logaddexp(first.lse_UCH1, second.lse_UCH1))


def heads_first(x_UCHK: Array) -> Array:
  """[U, C, H, K] -> [U * H, C, K]."""
  users, places, heads, width = x_UCHK.shape
  return x_UCHK.swapaxes(1, 2).reshape(users * heads, places, width)
