"""Blocks made of blocks: layers of several kinds (DHEN), and blocks side by side."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from pinfm_jax.model.interaction.fields import Fields, make_fields
from pinfm_jax.model.interaction.streams import MLP
from pinfm_jax.model.layers import dense

Array = jax.Array


class DHEN(nn.Module):
  """Layers of heterogeneous blocks (DHEN, arXiv:2203.11014, section 3).

  x_{n+1} = LN(sum_i P_i block_i(x_n) + shortcut(x_n)). P_i are linear (their sum is a linear layer on all outputs side
  by side, the paper's concatenation); the shortcut is linear where the widths differ. From the second layer on the
  fields are slices of `token_width`.

  Attributes:
    fields: of x0.
    layers: how many.
    width: of each layer's output.
    token_width: of the fields from the second layer on; it divides `width` if blocks read fields.
    make: (kind of block, fields, name) -> the block.
    ensemble: kinds of blocks of each layer.
  """

  fields: Fields
  layers: int
  width: int
  token_width: int
  make: Callable[[str, Fields, str], nn.Module]
  ensemble: tuple[str, ...]

  @nn.compact
  def __call__(self, x0: Array) -> Array:
    """[..., F] -> [..., width]."""
    x, fields = x0, self.fields
    for i in range(self.layers):
      made = x if x.shape[-1] == self.width else self._linear(f'shortcut_{i}')(x)
      for kind in self.ensemble:
        made += self._linear(f'{kind}_{i}_out')(self.make(kind, fields, f'{kind}_{i}')(x))
      x = nn.LayerNorm(name=f'norm_{i}')(made)
      fields = make_fields([('token', self.token_width)] * (self.width // self.token_width))
    return x

  def _linear(self, name: str) -> nn.Dense:
    return dense(self.width, (None, 'mlp'), use_bias=False, name=name)


class Beside(nn.Module):
  """Blocks side by side on the same x0, each with its own weights, and maybe an MLP beside them; all concatenated.

  With one block and an MLP it is the parallel structure of DCNv2 (arXiv:2008.13535, Figure 1b); several blocks learn
  several patterns of one order (arXiv:2412.01985).
  """

  make: Callable[[str], nn.Module]
  copies: int
  deep: tuple[int, ...] = ()

  @nn.compact
  def __call__(self, x0: Array) -> Array:
    """[..., F] -> [..., copies * the block's width + the MLP's last width]."""
    parts = [self.make(f'copy_{i}')(x0) for i in range(self.copies)]
    if self.deep:
      parts.append(MLP(self.deep, name='deep')(x0))
    return jnp.concatenate(parts, axis=-1)
