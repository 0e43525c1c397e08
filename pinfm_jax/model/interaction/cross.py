"""Cross layers: every layer multiplies x0 with a projection of what came before."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from pinfm_jax.model.layers import dense

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {'none': lambda x: x, 'tanh': jnp.tanh, 'relu': jax.nn.relu}


class CrossNetwork(nn.Module):
  """Stacked full-rank DCNv2 layers, x_{l+1} = x0 * (W x_l + b) + x_l (arXiv:2008.13535, Eq. 1)."""

  layers: int

  @nn.compact
  def __call__(self, x0: Array) -> Array:
    """[..., F] -> [..., F]."""
    x = x0
    for _ in range(self.layers):
      x = x0 * dense(x0.shape[-1], (None, 'mlp'))(x) + x
    return x


class LowRankCross(nn.Module):
  """Stacked low-rank DCNv2 layers (arXiv:2008.13535, Eq. 2): x_{l+1} = x0 * (U V^T x_l + b) + x_l.

  With an activation g it is one expert of Eq. 4: x_{l+1} = x0 * (U g(C g(V^T x_l)) + b) + x_l.
  """

  layers: int
  rank: int
  activation: str = 'none'

  @nn.compact
  def __call__(self, x0: Array) -> Array:
    """[..., F] -> [..., F]."""
    x, g = x0, ACTIVATIONS[self.activation]
    for i in range(self.layers):
      low = g(dense(self.rank, (None, None), use_bias=False, name=f'v_{i}')(x))
      if self.activation != 'none':
        low = g(dense(self.rank, (None, None), use_bias=False, name=f'c_{i}')(low))
      x = x0 * dense(x0.shape[-1], (None, 'mlp'), name=f'u_{i}')(low) + x
    return x


class MixtureCross(nn.Module):
  """Stacked mixtures of low-rank experts (DCN-Mix, arXiv:2008.13535, Eq. 3 and 4).

  x_{l+1} = sum_i G_i(x_l) E_i(x_l) + x_l, E_i(x) = x0 * (U_i g(C_i g(V_i^T x)) + b); without an activation g there is
  no C_i. The experts of a layer share b. G is linear with a softmax over the experts, or a sigmoid.
  """

  layers: int
  rank: int
  experts: int
  activation: str = 'none'
  gate: str = 'softmax'

  @nn.compact
  def __call__(self, x0: Array) -> Array:
    """[..., F] -> [..., F]; the weighted experts' U are one product."""
    x, width = x0, x0.shape[-1]
    for i in range(self.layers):
      gate_E = self._gate(dense(self.experts, (None, None), name=f'gate_{i}')(x))
      inside = self.experts * self.rank
      low_ER = dense(inside, (None, None), use_bias=False, name=f'v_{i}')(x)
      low_ER = self._expert(low_ER.reshape(*x.shape[:-1], self.experts, self.rank), i)
      low = (gate_E[..., None] * low_ER).reshape(*x.shape[:-1], inside)
      # The fan-in of an expert's U is its own rank.
      projected = dense(width, (None, 'mlp'), scale=self.experts, use_bias=False, name=f'u_{i}')(low)
      bias = self.param(f'bias_{i}', nn.initializers.zeros_init(), (width,))
      x = x0 * (projected + jnp.sum(gate_E, axis=-1, keepdims=True) * bias) + x
    return x

  def _gate(self, logits_E: Array) -> Array:
    return jax.nn.softmax(logits_E, axis=-1) if self.gate == 'softmax' else jax.nn.sigmoid(logits_E)

  def _expert(self, low_ER: Array, layer: int) -> Array:
    """g(C g(..)) of every expert."""
    if self.activation == 'none':
      return low_ER
    g = ACTIVATIONS[self.activation]
    init = nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal', batch_axis=0)
    kernel_ERS = self.param(f'c_{layer}', init, (self.experts, self.rank, self.rank))
    return g(jnp.einsum('...er,ers->...es', g(low_ER), kernel_ERS))


class GatedCross(nn.Module):
  """Stacked gated cross layers (GCN in GDCN, arXiv:2311.04635).

  x_{l+1} = x0 * (W x_l + b) * sigmoid(Wg x_l) + x_l: the gate weighs the crosses of the layer's order.
  """

  layers: int

  @nn.compact
  def __call__(self, x0: Array) -> Array:
    """[..., F] -> [..., F]."""
    x, width = x0, x0.shape[-1]
    for i in range(self.layers):
      gate = jax.nn.sigmoid(dense(width, (None, 'mlp'), use_bias=False, name=f'gate_{i}')(x))
      x = x0 * dense(width, (None, 'mlp'), name=f'cross_{i}')(x) * gate + x
    return x
