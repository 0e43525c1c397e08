"""Gradient attacks on classifiers: their losses, and projected gradient ascent.

An attack maximises an `Objective`, example by example: whether the example is fooled comes first, then the loss, so no
attack ends worse than it began. What is attacked (a classifier, a defended one) is the objective's affair.
`apgd.py`, `square.py` and `adaptive.py` hold the other attacks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pinfm_jax.errors import UserError
from pinfm_jax.robustness.balls import Ball, expand
from pinfm_jax.robustness.draws import example_seeds, fold

# (x [B, ...], seed_B uint32) -> loss [B], higher = more wrong, and fooled [B], whether the label is lost. Entry b must
# depend on x[b] and seed_B[b] alone. Its gradient may be a substitute (see adaptive.py).
Objective = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
Logits = Callable[[jax.Array], jax.Array]

LOSSES = ('ce', 'margin', 'dlr', 'dlr-targeted')
START, STEP = 10, 11  # purposes of draws


class Attacked(NamedTuple):
  """An attack's best inputs: x [B, ...], their loss [B] and whether they fool [B]."""

  x: jax.Array
  loss_B: jax.Array
  fooled_B: jax.Array


class Ascent(NamedTuple):
  """The best point that an ascent met, and the one where it ended, [B, ...].

  Where the objective is random, the best one is partly the luckiest; the end was not chosen by luck.
  """

  best: Attacked
  end: jax.Array


def classifier_objective(logits: Logits, label_B: jax.Array, loss: str = 'ce', target_B: jax.Array | None = None):
  """The objective of fooling a classifier.

  Args:
    logits: images to [B, classes].
    label_B: the true classes.
    loss: one of LOSSES.
    target_B: the class to be taken for, where the loss is 'dlr-targeted'.

  Raises:
    UserError: an unknown loss, or a target missing or not wanted.
  """
  if loss not in LOSSES:
    raise UserError(f"attack loss '{loss}'; expected one of {', '.join(LOSSES)}")
  if (loss == 'dlr-targeted') != (target_B is not None):
    raise UserError(
      f"attack loss '{loss}' with{'' if target_B is not None else 'out'} targets; dlr-targeted needs them"
    )

  def objective(x: jax.Array, seed_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits_BK = logits(x)
    return loss_of(logits_BK, label_B, loss, target_B), fooled(logits_BK, label_B)

  return objective


def fooled(logits_BK: jax.Array, label_B: jax.Array) -> jax.Array:
  """[B] bool: the label is not the largest logit (a draw counts as fooled, as does a NaN)."""
  return ~(cw_margin(logits_BK, label_B) < 0)


def loss_of(logits_BK: jax.Array, label_B: jax.Array, loss: str, target_B: jax.Array | None = None) -> jax.Array:
  """[B]: one of LOSSES by name."""
  if loss == 'ce':
    return cross_entropy(logits_BK, label_B)
  if loss == 'margin':
    return cw_margin(logits_BK, label_B)
  return dlr(logits_BK, label_B) if loss == 'dlr' else dlr_targeted(logits_BK, label_B, target_B)


def cross_entropy(logits_BK: jax.Array, label_B: jax.Array) -> jax.Array:
  """[B]: minus the log-probability of the label."""
  return jax.nn.logsumexp(logits_BK, axis=-1) - _at(logits_BK, label_B)


def cw_margin(logits_BK: jax.Array, label_B: jax.Array) -> jax.Array:
  """[B]: the largest other logit minus the label's (Carlini & Wagner, 2017); above 0 once fooled."""
  own = jax.nn.one_hot(label_B, logits_BK.shape[-1], dtype=bool)
  return jnp.max(jnp.where(own, -jnp.inf, logits_BK), axis=-1) - _at(logits_BK, label_B)


def dlr(logits_BK: jax.Array, label_B: jax.Array) -> jax.Array:
  """[B]: the margin over the gap of the first to the third logit (Croce & Hein, 2020); no scale of logits hides it."""
  ordered = jnp.sort(logits_BK, axis=-1)
  return cw_margin(logits_BK, label_B) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def dlr_targeted(logits_BK: jax.Array, label_B: jax.Array, target_B: jax.Array) -> jax.Array:
  """[B]: the same towards one class: (target - label) over first minus the mean of third and fourth."""
  ordered = jnp.sort(logits_BK, axis=-1)
  gap = ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4])
  return (_at(logits_BK, target_B) - _at(logits_BK, label_B)) / (gap + 1e-12)


def pgd(objective: Objective, x: jax.Array, ball: Ball, index_B: jax.Array, steps: int = 20, seed: Any = 0) -> Attacked:
  """Projected gradient ascent (Madry et al., 2018) from a drawn point that keeps the best it meets; see `ascend`."""
  return ascend(objective, x, ball, index_B, steps, seed).best


def ascend(
  objective: Objective,
  x: jax.Array,
  ball: Ball,
  index_B: jax.Array,
  steps: int = 20,
  seed: Any = 0,
  start: jax.Array | None = None,
) -> Ascent:
  """Projected gradient ascent: the best point that it meets, x itself among them, and its end.

  Args:
    objective: what to maximise.
    x: [B, ...], clean inputs in the valid range.
    ball: where to look.
    index_B: the examples' own indices, for the draws.
    steps: of ascent, each of 2.5 * radius / steps, which lets it cross the ball; the objective and its gradient are
      evaluated twice more, for x and for where the ascent ends.
    seed: of the draws.
    start: where to begin, in the ball around x; None = at a drawn point of it.
  """
  step_size = 2.5 * ball.radius / max(steps, 1)
  seed_B = example_seeds(index_B, seed)
  start = ball.random(x, fold(seed_B, START)) if start is None else start
  nothing = Attacked(x, jnp.full(x.shape[:1], -jnp.inf), jnp.zeros(x.shape[:1], bool))

  # The clean point, the ascent and its end are turns of one loop: a defended objective is compiled once.
  def body(carry: tuple[jax.Array, Ascent], turn: jax.Array) -> tuple[tuple[jax.Array, Ascent], None]:
    at, (best, _) = carry
    found, gradient = evaluated(objective, at, fold(seed_B, STEP, turn))
    moved = jnp.where(turn == 0, start, ball.project(at + step_size * ball.direction(gradient), x))
    return (moved, Ascent(better(best, found), at)), None

  return jax.lax.scan(body, (x, Ascent(nothing, x)), jnp.arange(steps + 2, dtype=jnp.uint32))[0][1]


def evaluated(objective: Objective, x: jax.Array, seed_B: jax.Array) -> tuple[Attacked, jax.Array]:
  """A point's loss and whether it fools, and each example's gradient of its own loss."""

  def total(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    loss_B, fooled_B = objective(x, seed_B)
    return jnp.sum(loss_B), (loss_B, fooled_B)

  gradient, (loss_B, fooled_B) = jax.grad(total, has_aux=True)(x)
  return Attacked(x, loss_B, fooled_B), gradient


def better(first: Attacked, second: Attacked) -> Attacked:
  """Of two points of each example the one that fools, then the one of higher loss; the first where they are equal."""
  wins_B = is_better(second, first)
  return Attacked(*(jnp.where(expand(wins_B, b), b, a) for a, b in zip(first, second, strict=True)))


def is_better(candidate: Attacked, than: Attacked) -> jax.Array:
  """[B] bool: see `better`."""
  higher_B = (candidate.loss_B > than.loss_B) | (jnp.isnan(than.loss_B) & ~jnp.isnan(candidate.loss_B))
  return (candidate.fooled_B & ~than.fooled_B) | ((candidate.fooled_B == than.fooled_B) & higher_B)


def runners_up(logits_BK: jax.Array, label_B: jax.Array, count: int) -> jax.Array:
  """[count, B]: the wrong classes of the highest logits, the targets of targeted attacks."""
  own = jax.nn.one_hot(label_B, logits_BK.shape[-1], dtype=bool)
  return jax.lax.top_k(jnp.where(own, -jnp.inf, logits_BK), count)[1].T


def _at(logits_BK: jax.Array, class_B: jax.Array) -> jax.Array:
  return jnp.take_along_axis(logits_BK, class_B[:, None], axis=-1)[:, 0]
