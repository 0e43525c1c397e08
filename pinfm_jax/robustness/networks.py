"""Networks of the image experiments: a residual classifier and what predicts rotations, views and missing parts.

Group norm with standardised kernels throughout, not batch norm: nothing depends on a batch, there is no training mode
to forget, and the sum of the examples' losses has the examples' own gradients. Standardised kernels make up for what
small groups of channels lose against batch norm (Qiao et al., 2019).

Every network takes images in [0, 1] and normalises them itself, so it cannot be fed otherwise than it was trained.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from pinfm_jax.errors import UserError

MEAN = (0.4914, 0.4822, 0.4465)  # CIFAR-10's training images
STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class ResNetConfig:
  """A pre-activation ResNet for 32 x 32 images.

  Attributes:
    widths: channels of each stage; every stage but the first halves the resolution.
    blocks: residual blocks of each stage.
    patch: 1 = a 3 x 3 convolution comes first; 2 = first, squares of 2 x 2 pixels become one place, which quarters
      the work of all that follows.
    group: channels of one group of the group norm (widths divide by it).
    classes: that are told apart.
    bfloat16: whether the activations are; parameters, features and logits stay float32.
  """

  widths: tuple[int, ...] = (48, 96, 192)
  blocks: tuple[int, ...] = (1, 1, 1)
  patch: int = 2
  group: int = 16
  classes: int = 10
  bfloat16: bool = False

  def __post_init__(self):
    if not self.widths or len(self.widths) != len(self.blocks):
      raise UserError(f'a ResNet of widths {self.widths} and blocks {self.blocks}; expected as many of each')
    if any(width % self.group for width in self.widths):
      raise UserError(f'a ResNet of widths {self.widths} with groups of {self.group}; expected multiples of it')
    if self.patch not in (1, 2):
      raise UserError(f'a ResNet with patch {self.patch}; expected 1 or 2')

  def multiply_adds(self) -> int:
    """Of one image's forward pass, its convolutions alone."""
    side = 32 // self.patch
    total, channels = side * side * 9 * 3 * self.patch**2 * self.widths[0], self.widths[0]
    for stage, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
      for block in range(blocks):
        side = side // 2 if stage and not block else side
        shortcut = channels * width if channels != width else 0
        total += side * side * (9 * channels * width + 9 * width * width + shortcut)
        channels = width
    return total


CLASSIFIERS = {
  'test': ResNetConfig((16, 16), (1, 1), 2, 8),
  'small': ResNetConfig((48, 96, 192), (1, 1, 1), 2, 16),
  'resnet18': ResNetConfig((64, 128, 256, 512), (2, 2, 2, 2), 1, 32),
  'wrn-28-10': ResNetConfig((160, 320, 640), (4, 4, 4), 1, 32),
}


def normalise(x: jax.Array) -> jax.Array:
  """Images in [0, 1] to the scale that networks are trained on."""
  return (x - jnp.asarray(MEAN, x.dtype)) / jnp.asarray(STD, x.dtype)


def fold_pixels(x: jax.Array, size: int) -> jax.Array:
  """[B, H, W, C] -> [B, H/size, W/size, size * size * C]: squares of pixels become channels."""
  B, H, W, C = x.shape
  x = x.reshape(B, H // size, size, W // size, size, C)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // size, W // size, size * size * C)


def unfold_pixels(x: jax.Array, size: int) -> jax.Array:
  """The inverse of `fold_pixels`."""
  B, H, W, C = x.shape
  x = x.reshape(B, H, W, size, size, C // size**2)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H * size, W * size, C // size**2)


def pooled(x: jax.Array, size: int) -> jax.Array:
  """[B, H / size, W / size, C]: the mean of each square, as a reshape, whose gradient is cheap everywhere."""
  B, H, W, C = x.shape
  return jnp.mean(x.reshape(B, H // size, size, W // size, size, C), axis=(2, 4))


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """A convolution that keeps the resolution: [B, H, W, I] with an odd [h, w, I, O] kernel -> [B, H, W, O].

  Its gradient with respect to x is written as another convolution of the same kind: inside a loop, XLA on a CPU runs
  the form that automatic differentiation gives (a kernel whose channels are swapped) some 20 times more slowly.
  """
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _convolve_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return convolve(x, kernel), (x, kernel)


def _convolve_backward(saved: tuple[jax.Array, jax.Array], change: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, kernel = saved
  plain = lambda k: jax.lax.conv_general_dilated(x, k, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))  # noqa: E731
  turned = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
  return convolve(change, turned), jax.vjp(plain, kernel)[1](change)[0]


convolve.defvjp(_convolve_forward, _convolve_backward)


class Conv(nn.Module):
  """A convolution without bias whose kernel has mean 0 and a fixed size in every output channel."""

  width: int
  size: int = 3

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H, W, width]."""
    shape = (self.size, self.size, x.shape[-1], self.width)
    kernel = self.param('kernel', nn.initializers.he_normal(), shape)
    gain = self.param('gain', nn.initializers.ones, (self.width,))
    fan = shape[0] * shape[1] * shape[2]
    centred = kernel - jnp.mean(kernel, axis=(0, 1, 2))
    # sqrt(2 / fan), as He's initialisation; the gain is learnt.
    size = jnp.sqrt(jnp.mean(jnp.square(centred), axis=(0, 1, 2)) * fan / 2 + 1e-6)
    return convolve(x, (centred * (gain / size)).astype(x.dtype))


class Block(nn.Module):
  """A pre-activation residual block of two 3 x 3 convolutions.

  Where it halves the resolution it takes means of 2 x 2 places first: a convolution with stride would see the same, and
  its gradient is many times slower on a CPU.
  """

  width: int
  stride: int
  group: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H / stride, W / stride, width]."""
    h = nn.relu(nn.GroupNorm(num_groups=None, group_size=self.group, dtype=x.dtype)(x))
    h = pooled(h, self.stride) if self.stride > 1 else h
    if self.stride > 1 or x.shape[-1] != self.width:
      x = Conv(self.width, 1, name='shortcut')(h)
    h = Conv(self.width, 3, name='first')(h)
    h = nn.relu(nn.GroupNorm(num_groups=None, group_size=self.group, dtype=x.dtype)(h))
    return x + Conv(self.width, 3, name='second')(h)


class ResNet(nn.Module):
  """The classifier; its stages' maps and its pooled features feed the tasks."""

  config: ResNetConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """Classifies images.

    Args:
      x: [B, 32, 32, 3] in [0, 1].

    Returns:
      Logits [B, classes], pooled features [B, widths[-1]], and the map after each stage.
    """
    c = self.config
    h = Conv(c.widths[0], name='stem')(fold_pixels(normalise(x), c.patch).astype('bfloat16' if c.bfloat16 else x.dtype))
    maps = []
    for stage, (width, blocks) in enumerate(zip(c.widths, c.blocks, strict=True)):
      for block in range(blocks):
        stride = 2 if stage and not block else 1
        h = Block(width, stride, c.group, name=f'stage{stage}_{block}')(h)
      maps.append(h.astype(jnp.float32))
    h = nn.relu(nn.GroupNorm(num_groups=None, group_size=c.group, name='norm', dtype=jnp.float32)(h))
    features = jnp.mean(h, axis=(1, 2))
    return nn.Dense(c.classes, kernel_init=nn.initializers.zeros, name='logits')(features), features, tuple(maps)


class Projection(nn.Module):
  """The contrastive head on frozen features: two layers, unit length."""

  hidden: int = 256
  width: int = 16

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """[B, F] -> [B, width]."""
    h = nn.Dense(self.width)(nn.relu(nn.Dense(self.hidden)(features)))
    return h / jnp.sqrt(jnp.sum(jnp.square(h), axis=-1, keepdims=True) + 1e-12)


class RotationHead(nn.Module):
  """Predicts an image's rotation from a frozen map of the classifier: one convolution, its mean, two layers."""

  width: int = 64
  group: int = 16

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    """[B, H, W, C] -> logits [B, 4]."""
    h = nn.relu(nn.GroupNorm(num_groups=None, group_size=min(self.group, h.shape[-1]))(h))
    h = nn.relu(nn.GroupNorm(num_groups=None, group_size=self.group)(Conv(self.width)(h)))
    # Where things are tells up from down: a coarse grid is kept, not the mean alone.
    h = pooled(h, h.shape[1] // 2).reshape(h.shape[0], -1)
    return nn.Dense(4)(nn.relu(nn.Dense(self.width)(h)))


class RotationNet(nn.Module):
  """Predicts an image's rotation with a network of its own: a Network in Network of three blocks."""

  width: int = 192
  group: int = 32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, 32, 32, 3] in [0, 1] -> logits [B, 4]."""
    h = normalise(x)
    for block, sizes in enumerate(((5, 1, 1), (5, 1, 1), (3, 1, 1))):
      for size in sizes:
        h = nn.relu(nn.GroupNorm(num_groups=None, group_size=self.group)(Conv(self.width, size)(h)))
      h = pooled(h, 2) if block < 2 else h
    return nn.Dense(4)(jnp.mean(h, axis=(1, 2)))


class Inpainter(nn.Module):
  """Fills in hidden parts of an image (masked autoencoding): residual blocks at a quarter of the resolution."""

  width: int = 64
  blocks: int = 2
  group: int = 16

  @nn.compact
  def __call__(self, x: jax.Array, shown: jax.Array) -> jax.Array:
    """Guesses all pixels.

    Args:
      x: [B, 32, 32, 3] in [0, 1].
      shown: [B, 32, 32, 1], 1 where a pixel may be seen.

    Returns:
      [B, 32, 32, 3], normalised as `normalise` does.
    """
    h = jnp.concatenate([normalise(x) * shown, jnp.broadcast_to(shown, (*x.shape[:3], 1))], axis=-1)
    h = Conv(self.width, name='stem')(fold_pixels(h, 4))
    for i in range(self.blocks):
      h = Block(self.width, 1, self.group, name=f'block_{i}')(h)
    h = nn.relu(nn.GroupNorm(num_groups=None, group_size=self.group, name='norm')(h))
    return unfold_pixels(nn.Dense(48, name='pixels')(h), 4)
