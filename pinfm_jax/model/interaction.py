"""Feature-interaction blocks of the ranking model: the concatenated features x0 in, a crossed vector out."""

import flax.linen as nn
import jax

from pinfm_jax.config import RankerConfig
from pinfm_jax.model.transformer import dense

Array = jax.Array


def interaction_block(config: RankerConfig) -> nn.Module:
  """The configured block, named 'cross' in the parameter tree.

  Raises:
    ValueError: an unknown name.
  """
  if config.interaction != 'dcnv2':
    raise ValueError(f"ranker.interaction is '{config.interaction}'; expected 'dcnv2'")
  return CrossNetwork(config.cross_layers, name='cross')


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
