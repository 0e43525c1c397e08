"""APGD (Croce & Hein, 2020): gradient ascent with momentum that halves its step where progress stalls."""

from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.robustness.attacks import (
  STEP,
  Attacked,
  Logits,
  Objective,
  better,
  classifier_objective,
  evaluated,
  runners_up,
)
from pinfm_jax.robustness.balls import Ball, expand
from pinfm_jax.robustness.draws import example_seeds, fold

START = 12  # purpose of the start's draw
_MOMENTUM, _PROGRESS = 0.75, 0.75  # alpha and rho of the paper


class _Climb(NamedTuple):
  """State of the ascent.

  `peak` is the point of highest loss, from which a halved step starts anew, and `peak_gradient` its gradient; `best`
  puts being fooled first. `rises_B` counts increases since the last checkpoint, whose peak and step are remembered.
  """

  x: jax.Array
  before: jax.Array
  gradient: jax.Array
  loss_B: jax.Array
  peak: jax.Array
  peak_gradient: jax.Array
  peak_loss_B: jax.Array
  best: Attacked
  step_B: jax.Array
  rises_B: jax.Array
  checked_loss_B: jax.Array
  checked_step_B: jax.Array


def checkpoints(steps: int) -> np.ndarray:
  """The iterations at which a step may be halved: 22 % of all first, then ever more often, 6 % apart at least."""
  shares = [0.0, 0.22]
  while shares[-1] < 1:
    shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
  return np.unique([int(np.ceil(round(share * steps, 6))) for share in shares[1:] if share <= 1])


def apgd(
  objective: Objective, x: jax.Array, ball: Ball, index_B: jax.Array, steps: int = 50, seed: Any = 0
) -> Attacked:
  """Maximises an objective within the ball.

  Args:
    objective: what to maximise; the usual ones are the cross entropy and the DLR loss.
    x: [B, ...], clean inputs in the valid range.
    ball: where to look; the first step is twice its radius.
    index_B: the examples' own indices, for the draws.
    steps: of ascent.
    seed: of the draws.

  Returns:
    The best point met, x itself among them.
  """
  seed_B = example_seeds(index_B, seed)
  draws = lambda step: fold(seed_B, STEP, step)  # noqa: E731
  begin = jnp.stack([x, ball.random(x, fold(seed_B, START))])
  measured = jax.lax.map(lambda p: evaluated(objective, p[0], draws(p[1])), (begin, jnp.arange(2, dtype=jnp.uint32)))
  clean, at = (jax.tree.map(itemgetter(i), measured[0]) for i in range(2))
  gradient = measured[1][1]
  step_B = jnp.full(x.shape[:1], 2.0 * ball.radius, x.dtype)
  climb = _Climb(
    at.x, at.x, gradient, at.loss_B, at.x, gradient, at.loss_B, better(clean, at),
    step_B, jnp.zeros(x.shape[:1], jnp.int32), at.loss_B, step_B,
  )  # fmt: skip
  check_at = checkpoints(steps)
  lengths = np.diff(np.concatenate([[0], check_at]))
  length_S = np.zeros(steps, np.int32)  # of the window that ends with an iteration, 0 = none ends
  length_S[check_at - 1] = lengths

  def body(climb: _Climb, now: tuple[jax.Array, jax.Array]) -> tuple[_Climb, None]:
    number, length = now
    moved = _moved(climb, x, ball, jnp.where(number == 1, 1.0, _MOMENTUM))
    found, gradient = evaluated(objective, moved, draws(number + 1))
    up_B = found.loss_B > climb.peak_loss_B
    climb = climb._replace(
      x=moved,
      before=climb.x,
      gradient=gradient,
      rises_B=climb.rises_B + (found.loss_B > climb.loss_B),
      loss_B=found.loss_B,
      peak=jnp.where(expand(up_B, x), moved, climb.peak),
      peak_gradient=jnp.where(expand(up_B, x), gradient, climb.peak_gradient),
      peak_loss_B=jnp.where(up_B, found.loss_B, climb.peak_loss_B),
      best=better(climb.best, found),
    )
    return _checked(climb, length), None

  numbers = jnp.arange(1, steps + 1, dtype=jnp.uint32)
  return jax.lax.scan(body, climb, (numbers, jnp.asarray(length_S)))[0].best


def apgd_targeted(
  logits: Logits,
  x: jax.Array,
  label_B: jax.Array,
  ball: Ball,
  index_B: jax.Array,
  steps: int = 50,
  targets: int = 9,
  seed: Any = 0,
) -> Attacked:
  """APGD with the targeted DLR loss towards each of the wrong classes of the highest logits; the best of them.

  Args:
    logits: images to [B, classes].
    x: clean images.
    label_B: their classes.
    ball: where to look.
    index_B: the examples' own indices.
    steps: for each target.
    targets: how many classes are tried.
    seed: of the draws.
  """
  target_TB = runners_up(logits(x), label_B, targets)

  def one(best: Attacked, now: tuple[jax.Array, jax.Array]) -> tuple[Attacked, None]:
    turn, target_B = now
    objective = classifier_objective(logits, label_B, 'dlr-targeted', target_B)
    return better(best, apgd(objective, x, ball, index_B, steps, seed + turn)), None

  clean = classifier_objective(logits, label_B, 'margin')(x, index_B)
  start = Attacked(x, jnp.full_like(clean[0], -jnp.inf), clean[1])
  return jax.lax.scan(one, start, (jnp.arange(targets, dtype=jnp.uint32), target_TB))[0]


def _moved(climb: _Climb, x: jax.Array, ball: Ball, momentum: jax.Array) -> jax.Array:
  """The next point: a projected step, mixed with the way that the last one went, projected again."""
  stepped = ball.project(climb.x + expand(climb.step_B, x) * ball.direction(climb.gradient), x)
  mixed = climb.x + momentum * (stepped - climb.x) + (1 - momentum) * (climb.x - climb.before)
  return ball.project(mixed, x)


def _checked(climb: _Climb, length: jax.Array) -> _Climb:
  """At the end of a window (length > 0) halves the step of examples that made no progress in it."""
  few_B = climb.rises_B < _PROGRESS * length
  stuck_B = (climb.checked_step_B == climb.step_B) & (climb.checked_loss_B == climb.peak_loss_B)
  ends = length > 0
  halve_B = ends & (few_B | stuck_B)
  back = expand(halve_B, climb.x)
  return climb._replace(
    # A halved step starts at the peak; nothing was gone before it, so its momentum is 0 there.
    x=jnp.where(back, climb.peak, climb.x),
    before=jnp.where(back, climb.peak, climb.before),
    gradient=jnp.where(back, climb.peak_gradient, climb.gradient),
    loss_B=jnp.where(halve_B, climb.peak_loss_B, climb.loss_B),
    step_B=jnp.where(halve_B, climb.step_B / 2, climb.step_B),
    rises_B=jnp.where(ends, 0, climb.rises_B),
    checked_loss_B=jnp.where(ends, climb.peak_loss_B, climb.checked_loss_B),
    checked_step_B=jnp.where(ends, climb.step_B, climb.checked_step_B),
  )
