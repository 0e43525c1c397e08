"""The fields of x0, and layers that work on each of them: tokens, norm, gates, projection of wide ones."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.model.layers import dense

Array = jax.Array


@dataclass(frozen=True)
class Field:
  """A slice of x0 that belongs together.

  Attributes:
    name: kind and number among those of its kind, like 'sparse_0'.
    kind: 'dense' (all dense features), 'sparse', 'embedding', 'module' (an output of a sequence module), or 'token' (a
      part of a layer's output).
    start: its place.
    width: how many elements it has.
  """

  name: str
  kind: str
  start: int
  width: int


Fields = tuple[Field, ...]


def make_fields(parts: Iterable[tuple[str, int]]) -> Fields:
  """Fields that stand one after another, from their kinds and widths."""
  fields, counts, start = [], {}, 0
  for kind, width in parts:
    number = counts[kind] = counts.get(kind, -1) + 1
    fields.append(Field(f'{kind}_{number}', kind, start, width))
    start += width
  return tuple(fields)


def total_width(fields: Fields) -> int:
  """Width F of x0."""
  return sum(field.width for field in fields)


class FieldTokens(nn.Module):
  """One vector of the same width a field, each by its own linear layer: [..., F] -> [..., n, width]."""

  fields: Fields
  width: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Neighbours of the same width go through one product: most sparse features have few widths."""
    tokens = []
    for i, (width, run) in enumerate(itertools.groupby(self.fields, lambda field: field.width)):
      run = tuple(run)
      part = x[..., run[0].start : run[-1].start + width].reshape(*x.shape[:-1], len(run), width)
      init = nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal', batch_axis=0)
      kernel = self.param(f'kernel_{i}', init, (len(run), width, self.width))
      bias = self.param(f'bias_{i}', nn.initializers.normal(0.02), (len(run), self.width))
      tokens.append(jnp.einsum('...nw,nwd->...nd', part, kernel) + bias)
    return jnp.concatenate(tokens, axis=-2)


class FieldNorm(nn.Module):
  """Layer norm of each field by itself (LN_EMB of MaskNet, arXiv:2102.07619, section 3.3): [..., F] -> [..., F].

  A field of one element has no spread to divide by: it is only scaled and shifted.
  """

  fields: Fields
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Means are products with a 0/1 matrix: a norm of its own for each of many small fields takes many more steps."""
    shape = (total_width(self.fields),)
    scale = self.param('scale', nn.initializers.ones_init(), shape)
    bias = self.param('bias', nn.initializers.zeros_init(), shape)
    member = np.zeros((shape[0], len(self.fields)), np.float32)
    for i, field in enumerate(self.fields):
      member[field.start : field.start + field.width, i] = field.width > 1
    share = member / np.maximum(member.sum(axis=0), 1)

    def mean(values: Array) -> Array:
      each = jnp.matmul(values, share.astype(values.dtype), precision='highest')
      return jnp.matmul(each, member.T.astype(values.dtype), precision='highest')

    centred = x - mean(x)
    variance = jnp.where(member.any(axis=1), mean(jnp.square(centred)), 1 - self.epsilon)
    return centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias


class FieldInputs(nn.Module):
  """What may happen to x0 before it is crossed: wide fields projected, each field normalised, each field scaled.

  The gate of a field is 2 sigmoid(w x0 + b), 1 at the start, so that learning alone turns fields up or down.

  Attributes:
    fields: of x0.
    most_width: wider fields are projected to this width; 0 = none is.
    norm: layer norm of each field.
    gates: scale each field.
  """

  fields: Fields
  most_width: int = 0
  norm: bool = False
  gates: bool = False

  @property
  def made(self) -> Fields:
    """The fields of the output."""
    return make_fields((f.kind, f.width if self._fits(f) else self.most_width) for f in self.fields)

  def _fits(self, field: Field) -> bool:
    return not self.most_width or field.width <= self.most_width

  @nn.compact
  def __call__(self, x0: Array) -> Array:
    """[..., F] -> [..., width of `made`].

    Raises:
      ValueError: x0 is not as wide as its fields.
    """
    if x0.shape[-1] != total_width(self.fields):
      raise ValueError(f'x0 has width {x0.shape[-1]}; its fields have {total_width(self.fields)}')
    if not all(map(self._fits, self.fields)):
      x0 = jnp.concatenate([self._narrow(field, x0) for field in self.fields], axis=-1)
    if self.norm:
      x0 = FieldNorm(self.made, name='norm')(x0)
    if self.gates:
      zeros = nn.initializers.zeros_init()
      gates = 2 * jax.nn.sigmoid(nn.Dense(len(self.made), kernel_init=zeros, name='gates')(x0))
      widths = np.array([field.width for field in self.made])
      x0 = x0 * jnp.repeat(gates, widths, axis=-1, total_repeat_length=int(widths.sum()))
    return x0

  def _narrow(self, field: Field, x0: Array) -> Array:
    part = x0[..., field.start : field.start + field.width]
    return part if self._fits(field) else dense(self.most_width, (None, None), name=f'narrow_{field.name}')(part)
