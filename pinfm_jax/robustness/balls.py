"""The set of inputs near an example: a ball in l_inf or l_2, cut by the range of valid values."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pinfm_jax.errors import UserError
from pinfm_jax.robustness.draws import fold, normals, uniforms

NORMS = ('linf', 'l2')
PER = ('example', 'vector')
_TINY = 1e-12


@dataclass(frozen=True)
class Ball:
  """Inputs within `radius` of an example and within [low, high].

  Attributes:
    norm: 'linf' (largest change of a value) or 'l2' (Euclidean length of the change), per example.
    radius: in the unit of the input; images are in [0, 1], so 8/255 is the usual l_inf attack.
    low: least valid value; None = unbounded, as for embeddings.
    high: largest valid value; None = unbounded.
    per: whose change is bounded in l_2: the whole 'example', or each 'vector' of the last axis for itself (each event
      of a history, however long that is). For l_inf there is no difference.
  """

  norm: str = 'linf'
  radius: float = 8 / 255
  low: float | None = 0.0
  high: float | None = 1.0
  per: str = 'example'

  def __post_init__(self):
    for name, value, choices in (('norm', self.norm, NORMS), ('per', self.per, PER)):
      if value not in choices:
        raise UserError(f"{name} is '{value}'; expected one of {', '.join(choices)}")
    if not (self.radius >= 0 and math.isfinite(self.radius)):
      raise UserError(f'radius is {self.radius}; expected a number of at least 0')
    if self.low is not None and self.high is not None and not self.low < self.high:
      raise UserError(f'the valid range is [{self.low}, {self.high}]; expected low below high')

  def project(self, moved: jax.Array, x: jax.Array) -> jax.Array:
    """The input near `moved` that lies in the ball around x and in the valid range.

    Cutting to the range moves every value towards x, which lies in the range itself, so the result stays in the ball;
    for l_inf it is the nearest such input.

    Args:
      moved: [B, ...].
      x: [B, ...], the centres, in the valid range.
    """
    change = moved - x
    if self.norm == 'linf':
      change = jnp.clip(change, -self.radius, self.radius)
    else:
      length = self._lengths(change)
      change = change * jnp.where(length > self.radius, self.radius / jnp.maximum(length, _TINY), 1.0)
    return self.clip(x + change)

  def clip(self, x: jax.Array) -> jax.Array:
    """x cut to the valid range."""
    return x if self.low is None and self.high is None else jnp.clip(x, self.low, self.high)

  def direction(self, gradient: jax.Array, sharpness: float = 0.0) -> jax.Array:
    """The steepest ascent of unit size: the gradient's sign, or the gradient over its length.

    Args:
      gradient: [B, ...].
      sharpness: above 0, the backward pass sees tanh(sharpness * gradient / its mean size) instead of the sign, whose
        derivative is 0 everywhere; the value stays the sign.
    """
    if self.norm == 'l2':
      return gradient / jnp.maximum(self._lengths(gradient), _TINY)
    sign = jnp.sign(gradient)
    if not sharpness:
      return sign
    scale = jnp.mean(jnp.abs(gradient), axis=_inner(gradient), keepdims=True)
    soft = jnp.tanh(sharpness * gradient / jnp.maximum(jax.lax.stop_gradient(scale), _TINY))
    return soft + jax.lax.stop_gradient(sign - soft)

  def random(self, x: jax.Array, seed_B: jax.Array) -> jax.Array:
    """A uniformly drawn point of the ball around each x, cut to the valid range."""
    shape = x.shape[1:]
    if self.norm == 'linf':
      return self.clip(x + self.radius * (2 * uniforms(seed_B, shape) - 1))
    direction = normals(fold(seed_B, 0), shape)
    direction = direction / jnp.maximum(self._lengths(direction), _TINY)
    # A ball's volume grows with the radius to the power of its dimensions.
    balls, dimensions = ((*shape[:-1], 1), shape[-1]) if self.per == 'vector' else ((1,) * len(shape), math.prod(shape))
    share = uniforms(fold(seed_B, 1), balls) ** (1 / dimensions)
    return self.clip(x + self.radius * direction * share)

  def _lengths(self, change: jax.Array) -> jax.Array:
    """Of what is bounded: [B, 1, ...], or [B, ..., 1] of each vector."""
    return lengths(change, (change.ndim - 1,) if self.per == 'vector' else None)


def lengths(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
  """Euclidean lengths over some axes (None = of each example), which stay as 1; at 0 the gradient is 0."""
  squares = jnp.sum(jnp.square(x), axis=_inner(x) if axes is None else axes, keepdims=True)
  return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def distance(moved: jax.Array, x: jax.Array, norm: str) -> jax.Array:
  """[B]: how far each example was moved, in `norm`."""
  if norm == 'linf':
    return jnp.max(jnp.abs(moved - x), axis=_inner(x))
  return lengths(moved - x).reshape(x.shape[0])


def expand(value_B: jax.Array, like: jax.Array) -> jax.Array:
  """[B, 1, ...]: a value an example, ready to meet an array of examples."""
  return value_B.reshape(value_B.shape[0], *(1,) * (like.ndim - 1))


def _inner(x: jax.Array) -> tuple[int, ...]:
  return tuple(range(1, x.ndim))
