"""Blocks that cross fields, not elements: each field is one token of a common width (`fields.FieldTokens`)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pinfm_jax.model.interaction.fields import Fields, FieldTokens
from pinfm_jax.model.layers import dense

Array = jax.Array


class FactorizationMachine(nn.Module):
  """The sum over all pairs of fields of e_i * e_j, a vector (NFM, arXiv:1708.05027, Eq. 3 and 4).

  It is ((sum_i e_i)^2 - sum_i e_i^2) / 2. The sum of its elements is the second-order term of FM (Rendle, ICDM 2010),
  sum_{i<j} <e_i, e_j>; a vector leaves it to the heads what each label takes of it.
  """

  fields: Fields
  width: int

  @nn.compact
  def __call__(self, x0: Array) -> Array:
    """[..., F] -> [..., width]."""
    tokens_ND = FieldTokens(self.fields, self.width, name='tokens')(x0)
    return 0.5 * (jnp.square(jnp.sum(tokens_ND, axis=-2)) - jnp.sum(jnp.square(tokens_ND), axis=-2))


class CompressedInteraction(nn.Module):
  """xDeepFM's CIN (arXiv:1803.05170, Eq. 6 and 7).

  Map h of layer k is sum_{i,j} W^{k,h}_{ij} X^{k-1}_i * X^0_j, without an activation, X^0 being the fields' tokens; the
  output is every map's sum over its elements.
  """

  fields: Fields
  width: int
  layers: int
  maps: int

  @nn.compact
  def __call__(self, x0: Array) -> Array:
    """[..., F] -> [..., layers * maps]."""
    first_DN = jnp.swapaxes(FieldTokens(self.fields, self.width, name='tokens')(x0), -1, -2)
    x_DH, pooled = first_DN, []
    for i in range(self.layers):
      pairs = x_DH[..., :, None] * first_DN[..., None, :]
      pairs = pairs.reshape(*x_DH.shape[:-1], x_DH.shape[-1] * first_DN.shape[-1])
      x_DH = dense(self.maps, (None, None), use_bias=False, name=f'layer_{i}')(pairs)
      pooled.append(jnp.sum(x_DH, axis=-2))
    return jnp.concatenate(pooled, axis=-1)


class AutoInt(nn.Module):
  """Self-attention over fields (AutoInt, arXiv:1810.11921, Eq. 5 to 8).

  Each layer is relu(concat_h(sum_k a^h_mk W_V^h e_k) + W_res e_m), a^h_m = softmax_k <W_Q^h e_m, W_K^h e_k>: the paper
  scales no scores. The heads share the tokens' width.
  """

  fields: Fields
  width: int
  layers: int
  heads: int

  @nn.compact
  def __call__(self, x0: Array) -> Array:
    """[..., F] -> [..., fields * width]."""
    x_ND = FieldTokens(self.fields, self.width, name='tokens')(x0)
    for i in range(self.layers):
      attended_ND = FieldAttention(self.width, self.heads, 1.0, name=f'attention_{i}')(x_ND)
      residual = dense(self.width, (None, None), use_bias=False, name=f'residual_{i}')
      x_ND = jax.nn.relu(attended_ND + residual(x_ND))
    return x_ND.reshape(*x0.shape[:-1], -1)


class FieldTransformer(nn.Module):
  """Pre-LN transformer layers over the fields' tokens (arXiv:2002.04745, Figure 1b), with a GELU MLP.

  The tokens' biases tell the fields apart, as position embeddings would.
  """

  fields: Fields
  width: int
  layers: int
  heads: int
  ratio: float

  @nn.compact
  def __call__(self, x0: Array) -> Array:
    """[..., F] -> [..., fields * width]."""
    x_ND = FieldTokens(self.fields, self.width, name='tokens')(x0)
    inside = max(1, round(self.ratio * self.width))
    for i in range(self.layers):
      scale = (self.width // self.heads) ** -0.5
      attended_ND = FieldAttention(self.width, self.heads, scale, name=f'attention_{i}')(
        nn.LayerNorm(name=f'norm_attention_{i}')(x_ND)
      )
      x_ND += dense(self.width, (None, None), name=f'attention_out_{i}')(attended_ND)
      hidden = dense(inside, (None, 'mlp'), name=f'mlp_in_{i}')(nn.LayerNorm(name=f'norm_mlp_{i}')(x_ND))
      x_ND += dense(self.width, ('mlp', None), name=f'mlp_out_{i}')(jax.nn.gelu(hidden))
    return nn.LayerNorm(name='norm')(x_ND).reshape(*x0.shape[:-1], -1)


class FieldAttention(nn.Module):
  """Multi-head attention of every field to all fields, the heads' outputs side by side."""

  width: int
  heads: int
  scale: float

  @nn.compact
  def __call__(self, x_ND: Array) -> Array:
    """[..., N, D] -> [..., N, width]."""
    projected = dense(3 * self.width, (None, None), use_bias=False, name='query_key_value')(x_ND)
    parts = projected.reshape(*x_ND.shape[:-1], 3, self.heads, self.width // self.heads)
    # Heads before fields: products of whole matrices take half the time on a CPU.
    query_HNK, key_HNK, value_HNK = (jnp.moveaxis(parts[..., i, :, :], -2, -3) for i in range(3))
    weights_HNM = jax.nn.softmax((self.scale * query_HNK) @ jnp.swapaxes(key_HNK, -1, -2), axis=-1)
    return jnp.moveaxis(weights_HNM @ value_HNK, -3, -2).reshape(*x_ND.shape[:-1], self.width)
