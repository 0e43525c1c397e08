"""MaskNet: hidden layers multiplied by masks that the example itself makes; and the block of arXiv:2412.01985."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pinfm_jax.model.interaction.cross import CrossNetwork
from pinfm_jax.model.interaction.fields import FieldNorm, Fields
from pinfm_jax.model.layers import dense

Array = jax.Array


class MaskBlock(nn.Module):
  """relu(LN(W (mask * h))), mask = W2 relu(W1 v + b1) + b2 (arXiv:2102.07619, sections 3.2 and 3.3).

  v is x0 as it is, whatever h the block masks; W1 has `ratio` times the width of h.
  """

  width: int
  ratio: float

  @nn.compact
  def __call__(self, h: Array, v: Array) -> Array:
    """h [..., G] and v [..., F] -> [..., width]."""
    inside = max(1, round(self.ratio * h.shape[-1]))
    mask = jax.nn.relu(dense(inside, (None, 'mlp'), scale=2.0, name='mask_in')(v))
    mask = dense(h.shape[-1], ('mlp', None), name='mask_out')(mask)
    hidden = dense(self.width, (None, 'mlp'), use_bias=False, name='hidden')(mask * h)
    return jax.nn.relu(nn.LayerNorm(name='norm')(hidden))


class MaskNet(nn.Module):
  """MaskNet: serial, where each block masks the output of the one before, or parallel, where all mask the features.

  The first input is the layer norm of each field (arXiv:2102.07619, section 3.4). Serial: [..., width], the last
  block's output; parallel: [..., blocks * width], all of them.
  """

  fields: Fields
  blocks: int
  width: int
  ratio: float
  serial: bool

  @nn.compact
  def __call__(self, x0: Array) -> Array:
    """[..., F] -> [..., width or blocks * width]."""
    normed = FieldNorm(self.fields, name='norm')(x0)
    made = []
    for i in range(self.blocks):
      masked = made[-1] if self.serial and made else normed
      made.append(MaskBlock(self.width, self.ratio, name=f'block_{i}')(masked, x0))
    return made[-1] if self.serial else jnp.concatenate(made, axis=-1)


class FinalBlock(nn.Module):
  """Parallel MaskNet blocks with DCNv2 layers on top of their outputs (arXiv:2412.01985, the model that was launched).

  There: 3 blocks of ratio 2.0 and width 512, 4 layers, and the MLP behind sees their output alone. Whether 512 is of a
  block or of all is not stated; here it is of a block, so that the cross layers see blocks * width.
  """

  fields: Fields
  blocks: int
  width: int
  ratio: float
  layers: int

  @nn.compact
  def __call__(self, x0: Array) -> Array:
    """[..., F] -> [..., blocks * width]."""
    masked = MaskNet(self.fields, self.blocks, self.width, self.ratio, serial=False, name='mask')(x0)
    return CrossNetwork(self.layers, name='cross')(masked)
