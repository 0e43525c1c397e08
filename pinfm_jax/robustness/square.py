"""Square Attack (Andriushchenko et al., 2020): random search with squares, which needs no gradient at all.

It judges a defended model from outside: what it finds owes nothing to a substitute gradient.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.robustness.attacks import STEP, Attacked, Objective, better, is_better
from pinfm_jax.robustness.balls import Ball, expand, lengths
from pinfm_jax.robustness.draws import example_seeds, fold, uniforms

START = 13  # purpose of the start's draw
_TINY = 1e-12


class _Window(NamedTuple):
  """A square of each example: its upper left corner and side, as arrays [B]."""

  row_B: jax.Array
  column_B: jax.Array
  side: jax.Array

  def inside(self, height: int, width: int) -> jax.Array:
    """[B, height, width, 1] bool."""
    row, column = jnp.arange(height)[None, :, None, None], jnp.arange(width)[None, None, :, None]
    top, left = (at[:, None, None, None] for at in (self.row_B, self.column_B))
    return (row >= top) & (row < top + self.side) & (column >= left) & (column < left + self.side)


def square(
  objective: Objective,
  x: jax.Array,
  ball: Ball,
  index_B: jax.Array,
  queries: int = 1000,
  share: float = 0.3,
  seed: Any = 0,
) -> Attacked:
  """Random search over squares of the image; a change stays where it fools or raises the loss.

  Args:
    objective: evaluated, never differentiated; the margin is the usual loss.
    x: [B, H, W, C] clean images.
    ball: where to look.
    index_B: the examples' own indices, for the draws.
    queries: evaluations after the first.
    share: of the image that the first squares cover; it falls as the paper's schedule for 10,000 queries, scaled.
    seed: of the draws.
  """
  seed_B = example_seeds(index_B, seed)
  start = _stripes(x, ball, fold(seed_B, START)) if ball.norm == 'linf' else _tiles(x, ball, fold(seed_B, START))
  begin = jnp.stack([x, start])
  measured = jax.lax.map(lambda p: objective(p[0], fold(seed_B, STEP, p[1])), (begin, jnp.arange(2, dtype=jnp.uint32)))
  clean, best = (Attacked(begin[i], measured[0][i], measured[1][i]) for i in range(2))
  sides = side_schedule(queries, share, min(x.shape[1:3]), 1 if ball.norm == 'linf' else 3)

  def body(best: Attacked, now: tuple[jax.Array, jax.Array]) -> tuple[Attacked, None]:
    number, side = now
    draws_B = fold(seed_B, STEP, number + 2)
    propose = _recoloured if ball.norm == 'linf' else _shifted_mass
    moved = propose(best.x, x, side, ball, draws_B)
    found = Attacked(moved, *objective(moved, draws_B))
    wins_B = is_better(found, best)
    return Attacked(*(jnp.where(expand(wins_B, b), b, a) for a, b in zip(best, found, strict=True))), None

  numbers = jnp.arange(queries, dtype=jnp.uint32)
  best, _ = jax.lax.scan(body, best, (numbers, jnp.asarray(sides)))
  return better(clean, best)


def side_schedule(queries: int, share: float, side: int, least: int) -> np.ndarray:
  """[queries] int32: each query's square; the share of the image that it covers is halved ever more rarely."""
  halvings = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
  place = np.arange(queries) / max(queries, 1) * 10_000
  shares = share / 2.0 ** np.searchsorted(halvings, place, side='left')
  sides = np.clip(np.round(np.sqrt(shares * side * side)), least, side - 1)
  # Of a window with a middle (l_2) the side is odd.
  return np.where((least > 1) & (sides % 2 == 0), np.maximum(sides - 1, least), sides).astype(np.int32)


def _stripes(x: jax.Array, ball: Ball, seed_B: jax.Array) -> jax.Array:
  """The l_inf start: vertical stripes one pixel wide, each channel moved by the whole radius one way or the other."""
  B, _, W, C = x.shape
  sign = jnp.where(uniforms(seed_B, (1, W, C)) < 0.5, -1.0, 1.0)
  return ball.clip(x + ball.radius * sign)


def _recoloured(at: jax.Array, x: jax.Array, side: jax.Array, ball: Ball, seed_B: jax.Array) -> jax.Array:
  """The l_inf proposal: in one square, each channel's change becomes plus or minus the radius."""
  window = _window(x, side, fold(seed_B, 0))
  sign = jnp.where(uniforms(fold(seed_B, 1), (1, 1, x.shape[-1])) < 0.5, -1.0, 1.0)
  return jnp.where(window.inside(*x.shape[1:3]), ball.clip(x + ball.radius * sign), at)


def _tiles(x: jax.Array, ball: Ball, seed_B: jax.Array) -> jax.Array:
  """The l_2 start: a grid of 5 x 5 bumps of random sign a channel, of the radius's length."""
  B, H, W, C = x.shape
  tile = max(3, min(H, W) // 5 | 1)
  rows, columns = -(-H // tile), -(-W // tile)
  shape = jnp.tile(_tile(tile)[:, :, None], (rows, columns, 1))[:H, :W]
  cell_row, cell_column = np.arange(H) // tile, np.arange(W) // tile
  sign = jnp.where(uniforms(seed_B, (rows, columns, C)) < 0.5, -1.0, 1.0)[:, cell_row][:, :, cell_column]
  change = sign * shape
  return ball.clip(x + ball.radius * change / jnp.maximum(lengths(change), _TINY))


def _shifted_mass(at: jax.Array, x: jax.Array, side: jax.Array, ball: Ball, seed_B: jax.Array) -> jax.Array:
  """The l_2 proposal: what one square spends of the radius goes to another, which gets a bump of two halves.

  The bump's halves have opposite signs; it is added to the direction that the square already has. What clipping left
  unspent of the radius is spent too.
  """
  B, H, W, C = x.shape
  change = at - x
  there, here = _window(x, side, fold(seed_B, 0)), _window(x, side, fold(seed_B, 1))
  inside, emptied = there.inside(H, W), here.inside(H, W)
  part = jnp.where(inside, change, 0.0)
  by_channel = jnp.sqrt(jnp.sum(jnp.square(part), axis=(1, 2), keepdims=True))
  sign = jnp.where(uniforms(fold(seed_B, 2), (1, 1, C)) < 0.5, -1.0, 1.0)
  bump = _two_bumps(there, H, W, uniforms(fold(seed_B, 3), (1,))[:, 0] < 0.5)
  bump = bump / jnp.maximum(lengths(bump), _TINY)
  wanted = jnp.where(inside, sign * bump + part / jnp.maximum(by_channel, _TINY), 0.0)
  wanted_length = jnp.sqrt(jnp.sum(jnp.square(wanted), axis=(1, 2), keepdims=True))
  union = jnp.square(lengths(jnp.where(inside | emptied, change, 0.0)))
  unspent = jnp.maximum(ball.radius**2 - jnp.square(lengths(change)), 0.0)
  # Each channel gets an equal share of what the two squares had and of what was unspent.
  budget = jnp.sqrt((union + unspent) / C)
  new = jnp.where(inside, wanted / jnp.maximum(wanted_length, _TINY) * budget, jnp.where(emptied, 0.0, change))
  return ball.project(x + new, x)


def _window(x: jax.Array, side: jax.Array, seed_B: jax.Array) -> _Window:
  u = uniforms(seed_B, (2,))
  row_B, column_B = (jnp.floor(u[:, i] * (x.shape[1 + i] - side + 1)).astype(jnp.int32) for i in range(2))
  return _Window(row_B, column_B, side)


def _two_bumps(window: _Window, height: int, width: int, turned_B: jax.Array) -> jax.Array:
  """[B, height, width, 1]: over each window two bumps of opposite sign, one beside (or above) the other."""
  row = jnp.arange(height)[None, :, None, None] - window.row_B[:, None, None, None]
  column = jnp.arange(width)[None, None, :, None] - window.column_B[:, None, None, None]
  turned = turned_B[:, None, None, None]
  along, across = jnp.where(turned, row, column), jnp.where(turned, column, row)
  half = window.side // 2
  first = _bump(across, along, window.side, half)
  second = _bump(across, along - half, window.side, window.side - half)
  bump = jnp.where(along < half, first, -second)
  return jnp.where(window.inside(height, width), bump, 0.0)


def _bump(row: jax.Array, column: jax.Array, height: jax.Array, width: jax.Array) -> jax.Array:
  """A pyramid of rectangles around the middle of height x width, the k-th from within worth 1 / k^2.

  At distance d from the middle the rectangles d + 1, ..., n + 1 overlap, n = half the longer side.
  """
  n = jnp.maximum(height, width) // 2
  # In the shorter direction rectangles run out sooner: they shrink by the same number of pixels on all sides.
  distance = jnp.maximum(
    jnp.abs(row - height // 2) + (n - height // 2), jnp.abs(column - width // 2) + (n - width // 2)
  )
  sums = jnp.asarray(np.concatenate([[0.0], np.cumsum(1 / np.arange(1, 258) ** 2)]), jnp.float32)
  distance = jnp.clip(distance, 0, n)
  return sums[n + 1] - sums[distance]


def _tile(side: int) -> jax.Array:
  """[side, side]: one bump."""
  place = jnp.arange(side)
  return _bump(place[:, None], place[None, :], jnp.int32(side), jnp.int32(side))
