"""HSTU blocks (Zhai et al. 2024, arXiv:2402.17152): the other decoder that PinFM tried as M (section 2).

A block projects to U, V, Q and K through SiLU, mixes V by SiLU(Q K^T + bias) / n, normalises, gates by U, projects
back and adds the residual. There is no softmax and no MLP; the bias is a learned number a head and relative position.

n is the constant `max_positions`. The published code divides by the padded length of the batch, so a representation
would change with padding, between pretraining and serving lengths, and when segments are packed. Dividing by the number
of visible keys would be consistent too, but it takes out what HSTU keeps and softmax does not: how many past events
match. With a constant, each key's contribution is independent of all others, so the crossing pass is a plain sum of the
history's part and the candidate's own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pinfm_jax.config import TowerConfig
from pinfm_jax.model.dcat import LayerKV, RowKeys, View, heads_first, own_score, visible_keys
from pinfm_jax.model.layers import dense

Array = jax.Array


class HSTUBlock(nn.Module):
  """One HSTU layer; takes and returns what `transformer.Block` does."""

  config: TowerConfig

  def setup(self) -> None:
    """Declares the layers and the relative position bias."""
    width, dtype = self.config.width, jnp.dtype(self.config.dtype)
    self.norm = nn.LayerNorm(dtype=dtype)
    self.gate_value_query_key = dense(4 * width, ('embed', 'heads'), dtype=dtype)
    # Without scale and bias, as published: `out` could absorb the scale.
    self.norm_attention = nn.LayerNorm(dtype=dtype, use_scale=False, use_bias=False)
    self.out = dense(width, ('heads', 'embed'), 1 / self.config.layers, dtype=dtype)
    self.position_bias_PH = self.param(
      'position_bias', nn.initializers.normal(0.02), (self.config.max_positions, self.config.heads)
    )
    self.dropout = nn.Dropout(self.config.dropout)

  def __call__(self, x: Array, context: LayerKV | None, view: View, train: bool) -> tuple[Array, LayerKV | None]:
    """Runs the block.

    Args:
      x: [U, L, D] histories (context pass), [M, C, D] candidates (crossing pass) or events that follow a history.
      context: None for the context pass; else the histories' keys and values.
      view: what x may look at.
      train: dropout on.

    Returns:
      The block's output, like x, and the keys and values to keep (None in the crossing pass).
    """
    gate, query, own = self._project(x)
    if context is None:
      bias_HLM = relative_bias(self.position_bias_PH, x.shape[1])
      mixed, kept = mix_causal(query, own, view.mask_UL, view.segment_UL, bias_HLM, self.config.max_positions), own
    elif view.layout is not None:
      rows, kept = view.layout(view, context, own), None
      mixed = mix_rows(query, rows, self.position_bias_PH, self.config.max_positions)
    else:
      bias_PH, normaliser = self.position_bias_PH, self.config.max_positions
      mixed = mix_context(query, *view.rows(context), own, bias_PH, normaliser, view.causal)
      kept = own if view.causal else None
    gated = gate * self.norm_attention(mixed.reshape(x.shape))
    return x + self.dropout(self.out(gated), deterministic=not train), kept

  def keys_values(self, x: Array, view: View) -> LayerKV:
    """Just the keys and values: all that the crossing pass needs of the context's last layer."""
    return self._project(x)[2]

  def _project(self, x: Array) -> tuple[Array, Array, LayerKV]:
    heads = (self.config.heads, self.config.width // self.config.heads)
    projected = jax.nn.silu(self.gate_value_query_key(self.norm(x)))
    gate, value, query, key = jnp.split(projected, 4, axis=-1)
    value, query, key = (y.reshape(*x.shape[:-1], *heads) for y in (value, query, key))
    return gate, query, LayerKV(key, value)


def relative_bias(bias_PH: Array, length: int) -> Array:
  """The bias of query l and key m by their distance l - m: [P, H] -> [H, L, L]; 0 for later keys, which are masked.

  A line of 2 L numbers, repeated and read again in lines of 2 L + 1, shifts by one place from line to line. So the
  gradient is a sum over lines; that of a gather by distance would be a scatter of L^2 rows, which took a quarter of
  the attention's time on CPU.
  """
  by_distance_HL = bias_PH[:length].T
  line_HX = jnp.pad(by_distance_HL, ((0, 0), (length - 1, 1)))
  flat_HX = jnp.pad(jnp.tile(line_HX, (1, length)), ((0, 0), (0, length)))
  return flat_HX.reshape(-1, length, 2 * length + 1)[:, :, :length][:, :, ::-1]


def mix_causal(
  query_ULHK: Array, kv: LayerKV, mask_UL: Array, segment_UL: Array | None, bias_HLM: Array, normaliser: int
) -> Array:
  """Pointwise attention of every position over the events up to itself; weights in float32.

  Args:
    query_ULHK: queries.
    kv: keys and values of the same positions.
    mask_UL: True on real events; padding adds nothing.
    segment_UL: segments of packed rows, or None; distances inside a segment are those of the row.
    bias_HLM: see `relative_bias`.
    normaliser: n.

  Returns:
    float32 [U, L, H, K]: the norm that follows takes out a mean much larger than the differences.
  """
  return mix_part(query_ULHK, kv, visible_keys(mask_UL, segment_UL), bias_HLM, normaliser)


def mix_context(
  query_UCHK: Array,
  context: LayerKV,
  mask_UL: Array,
  own: LayerKV,
  bias_PH: Array,
  normaliser: int,
  causal: bool = False,
) -> Array:
  """Pointwise attention of each candidate over its user's history and itself; candidates never see each other.

  A candidate stands right behind the last real event, so its distance to event l is (number of events) - l; the j-th
  of several events that follow stands j places further.

  Args:
    query_UCHK: candidate queries.
    context: keys and values of the history, [U, L, H, K].
    mask_UL: True on real events.
    own: the candidates' own keys and values, [U, C, H, K].
    bias_PH: bias by distance and head.
    normaliser: n.
    causal: the tokens are events that follow the history, and see those before them too.

  Returns:
    float32 [U, C, H, K]; a user without events attends to itself alone.
  """
  place_X = jnp.arange(query_UCHK.shape[1] if causal else 1)
  first_U = jnp.sum(mask_UL, axis=1)
  distance_UXL = (first_U[:, None] + place_X)[..., None] - jnp.arange(mask_UL.shape[1])
  bias_UHXL = bias_PH[jnp.maximum(distance_UXL, 0)].transpose(0, 3, 1, 2)
  mixed_UCHK = mix_part(query_UCHK, context, mask_UL[:, None, None], bias_UHXL, normaliser)
  if causal:
    real_UC = jnp.ones(query_UCHK.shape[:2], bool)
    own_bias_HCC = relative_bias(bias_PH, query_UCHK.shape[1])
    return mixed_UCHK + mix_causal(query_UCHK, own, real_UC, None, own_bias_HCC, normaliser)
  weight_UCH1 = jax.nn.silu(own_score(query_UCHK, own.key) + bias_PH[0][:, None]) * (1 / normaliser)
  return mixed_UCHK + weight_UCH1 * own.value


def mix_part(query_UCHK: Array, kv: LayerKV, visible: Array, bias: Array, normaliser: int) -> Array:
  """Pointwise attention over the keys [U, L, H, K] that are visible; this and the bias broadcast to [U, H, C, L].

  Returns:
    float32 [U, C, H, K].
  """
  users, candidates, heads, width = query_UCHK.shape
  query, key, value = (heads_first(x) for x in (query_UCHK, kv.key, kv.value))
  mixed = mix_heads(query, key, value, visible, bias, normaliser, heads)
  return mixed.reshape(users, heads, candidates, width).swapaxes(1, 2)


def mix_heads(
  query: Array, key: Array, value: Array, visible: Array, bias: Array, normaliser: int, heads: int
) -> Array:
  """`mix_part` for arrays [U * H, C or L, K] (see `dcat.attend_heads`): float32 [U * H, C, K]."""
  scores = jnp.einsum('bck,blk->bcl', query, key, preferred_element_type=jnp.float32)
  scores_UHCL = scores.reshape(query.shape[0] // heads, heads, *scores.shape[1:])
  weights_UHCL = jnp.where(visible, jax.nn.silu(scores_UHCL + bias) * (1 / normaliser), 0.0)
  weights = weights_UHCL.astype(value.dtype).reshape(scores.shape)
  return jnp.einsum('bcl,blk->bck', weights, value, preferred_element_type=jnp.float32)


def mix_rows(query_B1HK: Array, rows: RowKeys, bias_PH: Array, normaliser: int) -> Array:
  """Pointwise attention of single candidates over the keys of their rows, float32 [B, 1, H, K]."""
  bias_BH1X = bias_PH[jnp.maximum(rows.distance_BX, 0)].swapaxes(1, 2)[:, :, None]
  visible_B11X = rows.visible_BX[:, None, None]
  query, key, value = heads_first(query_B1HK), rows.kv.key, rows.kv.value
  mixed = mix_heads(query, key, value, visible_B11X, bias_BH1X, normaliser, query_B1HK.shape[2])
  return mixed.reshape(query_B1HK.shape)
