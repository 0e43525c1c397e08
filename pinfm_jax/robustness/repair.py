"""Test-time repair: a bounded change of an input that lowers self-supervised losses (arXiv:2204.03714).

The classifier (or tower) and the task networks are frozen; only the input moves. Nothing here knows what an input is:
images and event embeddings are arrays [B, ...], and what a task demands of them is a `LossTerm`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pinfm_jax.errors import UserError
from pinfm_jax.robustness.balls import Ball, expand, lengths
from pinfm_jax.robustness.draws import example_seeds, fold

START, STEP = 0, 1  # purposes of draws
_TINY = 1e-12


@dataclass(frozen=True)
class LossTerm:
  """One self-supervised task's loss, as the repair sees it.

  Attributes:
    name: of the task.
    loss: (x [B, ...], seed_B uint32) -> [B]; the seeds are for the term's own draws (views, masks). Entry b must
      depend on x[b] and seed_B[b] alone, unless `couples` says otherwise.
    weight: alpha, its factor in the sum.
    passes: what one evaluation with its gradient costs, in forward-backward passes of the classifier.
    couples: the term declares that an example's loss depends on its batch mates.
  """

  name: str
  loss: Callable[[jax.Array, jax.Array], jax.Array]
  weight: float = 1.0
  passes: float = 1.0
  couples: bool = False


@dataclass(frozen=True)
class RepairConfig:
  """How an input is repaired. The defaults are the first report's: 40 sign steps of 2/255 within 16/255.

  Attributes:
    ball: how far an input may move, and the valid range.
    steps: of projected gradient descent.
    step_size: of one step, in the unit of the input.
    random_start: begin at a uniformly drawn point of the ball, else at the input.
    weighting: 'fixed' sums weight * loss; 'gradient' first divides each task's gradient by its own length, an example
      at a time, so that no task drowns the others whatever its scale.
    order: 'summed' makes one step along the sum; 'one_by_one' lets each step visit the tasks in turn, each with the
      gradient at where the last one led and its share (weight over the sum of weights) of the step.
    patience: an example stops once its weighted loss has not fallen below its lowest for so many steps; 0 = never.
    stop_below: an example stops once its weighted loss is at most this; None = never.
    sharpness: for attacks that differentiate the repair, see `Ball.direction`.
  """

  ball: Ball = Ball('linf', 16 / 255)
  steps: int = 40
  step_size: float = 2 / 255
  random_start: bool = True
  weighting: str = 'fixed'
  order: str = 'summed'
  patience: int = 0
  stop_below: float | None = None
  sharpness: float = 0.0

  def __post_init__(self):
    for name, choices in (('weighting', ('fixed', 'gradient')), ('order', ('summed', 'one_by_one'))):
      if getattr(self, name) not in choices:
        raise UserError(f"repair.{name} is '{getattr(self, name)}'; expected one of {', '.join(choices)}")
    for name in ('steps', 'patience', 'step_size', 'sharpness'):
      if not getattr(self, name) >= 0:
        raise UserError(f'repair.{name} is {getattr(self, name)}; expected at least 0')


class Repaired(NamedTuple):
  """What the repair found.

  Attributes:
    x: [B, ...] the repaired inputs.
    loss_before_BK: each task's loss of the input.
    loss_after_BK: of the repaired input, with the same draws.
    steps_B: int32, how many steps each example made.
  """

  x: jax.Array
  loss_before_BK: jax.Array
  loss_after_BK: jax.Array
  steps_B: jax.Array


class _Walk(NamedTuple):
  """The descent: where examples stand, their lowest loss, steps without a lower one, steps made, whether still on."""

  x: jax.Array
  lowest_B: jax.Array
  waited_B: jax.Array
  steps_B: jax.Array
  on_B: jax.Array


def repair(
  loss_terms: Sequence[LossTerm],
  x: jax.Array,
  config: RepairConfig,
  index_B: jax.Array,
  seed: Any = 0,
  report: bool = True,
) -> Repaired:
  """Finds for each example a change within the ball that lowers the weighted sum of its losses.

  A pure function, to be jitted and differentiated by the caller. An example's result depends on its own input, index
  and the seed alone (up to the rounding of matrix products of other sizes), unless a term couples. Early stopping is
  an example's own; a step is left out only once all of the batch have stopped.

  Args:
    loss_terms: tasks; more than one keeps the repair from over-fitting any of them.
    x: [B, ...] inputs in the valid range, attacked or not.
    config: ball, steps, weighting, order, stopping.
    index_B: the examples' own indices: random start and the terms' draws are hashes of seed and index.
    seed: of the draws, a scalar.
    report: whether to measure the losses before and after (two more evaluations of each term); else they are NaN.

  Returns:
    The repaired inputs and what happened to the losses.

  Raises:
    UserError: no terms, or a name twice.
  """
  terms = tuple(loss_terms)
  if not terms or len({term.name for term in terms}) != len(terms):
    names = ', '.join(term.name for term in terms) or 'none'
    raise UserError(f'the loss terms of a repair are {names}; expected at least one, each with a name of its own')
  seed_B = example_seeds(index_B, seed)
  start = config.ball.random(x, fold(seed_B, START)) if config.random_start else x
  walk = _Walk(
    start,
    jnp.full(x.shape[:1], jnp.inf, jnp.float32),
    jnp.zeros(x.shape[:1], jnp.int32),
    jnp.zeros(x.shape[:1], jnp.int32),
    jnp.ones(x.shape[:1], bool),
  )

  def body(walk: _Walk, step: jax.Array) -> tuple[_Walk, None]:
    advance = lambda w: _step(terms, w, x, config, fold(seed_B, STEP, step))  # noqa: E731
    if config.patience or config.stop_below is not None:
      return jax.lax.cond(jnp.any(walk.on_B), advance, lambda w: w, walk), None
    return advance(walk), None

  # What a backward pass through the steps needs is computed again there: one step's activations are kept, not all.
  walk, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), walk, jnp.arange(config.steps, dtype=jnp.uint32))
  undefined_BK = jnp.full((x.shape[0], len(terms)), jnp.nan)
  before_BK, after_BK = (losses(terms, at, seed_B) if report else undefined_BK for at in (x, walk.x))
  return Repaired(walk.x, before_BK, after_BK, walk.steps_B)


def losses(terms: Sequence[LossTerm], x: jax.Array, seed_B: jax.Array) -> jax.Array:
  """[B, K]: each task's loss of each example, with draws that do not depend on a step."""
  return jnp.stack([term.loss(x, fold(seed_B, k)) for k, term in enumerate(terms)], axis=1)


def passes(terms: Sequence[LossTerm], config: RepairConfig) -> float:
  """Forward-backward passes of the classifier that the repair of one example costs, all its steps made."""
  return config.steps * sum(term.passes for term in terms)


def _step(terms: tuple[LossTerm, ...], walk: _Walk, x: jax.Array, config: RepairConfig, seed_B: jax.Array) -> _Walk:
  """One step of the examples that still move."""
  if config.order == 'one_by_one':
    moved, value_B = walk.x, jnp.zeros_like(walk.lowest_B)
    total = sum(abs(term.weight) for term in terms)
    for k, term in enumerate(terms):
      loss_B, gradient = _value_and_gradient((term,), moved, (fold(seed_B, k),))
      share = abs(term.weight) / max(total, _TINY)
      moved = config.ball.project(
        moved - share * config.step_size * config.ball.direction(gradient, config.sharpness), x
      )
      value_B = value_B + loss_B
  else:
    seeds = tuple(fold(seed_B, k) for k in range(len(terms)))
    value_B, gradient = _gradient(terms, walk.x, seeds, config.weighting)
    moved = config.ball.project(walk.x - config.step_size * config.ball.direction(gradient, config.sharpness), x)
  # value_B belongs to where the step began: an example that stops here keeps that point.
  better_B = value_B < walk.lowest_B
  waited_B = jnp.where(better_B, 0, walk.waited_B + 1)
  on_B = walk.on_B
  if config.patience:
    on_B = on_B & (waited_B < config.patience)
  if config.stop_below is not None:
    on_B = on_B & (value_B > config.stop_below)
  return _Walk(
    jnp.where(expand(on_B, x), moved, walk.x),
    jnp.where(walk.on_B, jnp.minimum(walk.lowest_B, value_B), walk.lowest_B),
    waited_B,
    walk.steps_B + on_B,
    on_B,
  )


def _gradient(
  terms: tuple[LossTerm, ...], x: jax.Array, seeds: tuple[jax.Array, ...], weighting: str
) -> tuple[jax.Array, jax.Array]:
  """The weighted loss [B], and the direction that raises it."""
  if weighting == 'fixed':
    return _value_and_gradient(terms, x, seeds)
  value_B, total = 0.0, 0.0
  for term, seed_B in zip(terms, seeds, strict=True):
    loss_B, gradient = _value_and_gradient((term,), x, (seed_B,))
    value_B = value_B + loss_B
    # The term's weight is in its gradient already: divide by the length without it.
    total = total + abs(term.weight) * gradient / jnp.maximum(lengths(gradient), _TINY)
  return value_B, total


def _value_and_gradient(
  terms: tuple[LossTerm, ...], x: jax.Array, seeds: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
  """The weighted sum [B] and its gradient; the sum over the batch parts again, as no example's loss sees another."""

  def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    value_B = sum(term.weight * term.loss(x, seed_B) for term, seed_B in zip(terms, seeds, strict=True))
    return jnp.sum(value_B), value_B

  gradient, value_B = jax.grad(total, has_aux=True)(x)
  return value_B, gradient
