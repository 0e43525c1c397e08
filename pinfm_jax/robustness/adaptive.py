"""Attacks that know of the repair (after Croce et al., ICML 2022): objectives for `pgd`, `apgd` and `square`.

A repair can be attacked in four ways: by making its tasks content with the attacked input (task-aware), by taking its
gradient for the identity (BPDA), the same averaged over its draws (BPDA + EOT), and by differentiating its steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pinfm_jax.robustness.attacks import Logits, Objective, classifier_objective
from pinfm_jax.robustness.draws import fold
from pinfm_jax.robustness.repair import LossTerm, RepairConfig, repair

# (x [B, ...], seed_B uint32) -> the defended input [B, ...]; entry b depends on x[b] and seed_B[b] alone.
Defence = Callable[[jax.Array, jax.Array], jax.Array]

_TERM, _DRAW = 20, 21  # purposes of draws
_DEFENDED = 'defended'


def repair_defence(terms: Sequence[LossTerm], config: RepairConfig) -> Defence:
  """The repair as a defence: an example's seed stands for both the run's seed and its index."""

  def defend(x: jax.Array, seed_B: jax.Array) -> jax.Array:
    return repair(terms, x, config, seed_B, 0, report=False).x

  return defend


def static_defence(x: jax.Array, seed_B: jax.Array) -> jax.Array:
  """No defence: the row 'none' of the tables."""
  return x


def noise_defence(config: RepairConfig) -> Defence:
  """Random noise within the repair's ball: the control that costs nothing."""
  return lambda x, seed_B: config.ball.random(x, seed_B)


def behind(objective: Objective, defence: Defence) -> Objective:
  """The objective of what a defence makes of the input, with the defence's true values and its true gradient."""
  return lambda x, seed_B: objective(defence(x, seed_B), seed_B)


def straight_through(defence: Defence) -> Defence:
  """The defence with the identity as its gradient (BPDA: Athalye et al., 2018)."""

  def through(x: jax.Array, seed_B: jax.Array) -> jax.Array:
    moved = checkpoint_name(jax.lax.stop_gradient(defence(jax.lax.stop_gradient(x), seed_B)), _DEFENDED)
    return moved + (x - jax.lax.stop_gradient(x))

  return through


def defended_objective(logits: Logits, defence: Defence, label_B: jax.Array, loss: str = 'margin') -> Objective:
  """Fooling the defended classifier, with the defence's true values and its true gradient."""
  return behind(classifier_objective(logits, label_B, loss), defence)


def bpda(logits: Logits, defence: Defence, label_B: jax.Array, loss: str = 'margin') -> Objective:
  """The defended classifier, with the identity as the defence's gradient."""
  return defended_objective(logits, straight_through(defence), label_B, loss)


def unrolled(
  logits: Logits,
  terms: Sequence[LossTerm],
  config: RepairConfig,
  label_B: jax.Array,
  loss: str = 'margin',
) -> Objective:
  """The defended classifier with the gradient through every step of the repair.

  The sign's derivative is 0: where the repair makes sign steps, the backward pass sees a soft sign instead.
  Costs second derivatives of every task at every step: for short repairs.
  """
  return defended_objective(logits, repair_defence(terms, replace(config, sharpness=1.0)), label_B, loss)


def averaged(objective: Objective, draws: int) -> Objective:
  """Expectation over transformation: an objective's mean over independent seeds, one after another.

  Fooled means more often fooled than not.
  """

  def mean(x: jax.Array, seed_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    def one(total: tuple[jax.Array, jax.Array], draw: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
      loss_B, fooled_B = objective(x, fold(seed_B, _DRAW, draw))
      return (total[0] + loss_B, total[1] + fooled_B), None

    # One draw's activations at a time, in the backward pass too, but a defence is not made twice.
    one_at_a_time = jax.checkpoint(
      one, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(_DEFENDED)
    )
    zero = jnp.zeros(x.shape[:1], jnp.float32)
    (loss_B, fooled_B), _ = jax.lax.scan(one_at_a_time, (zero, zero), jnp.arange(draws, dtype=jnp.uint32))
    return loss_B / draws, 2 * fooled_B > draws

  return mean


def task_aware(logits: Logits, terms: Sequence[LossTerm], label_B: jax.Array, strength: float) -> Objective:
  """CE - lambda * sum_k alpha_k L_k on the undefended classifier, see `paying`."""
  return paying(classifier_objective(logits, label_B, 'ce'), terms, strength)


def paying(objective: Objective, terms: Sequence[LossTerm], strength: float) -> Objective:
  """An objective minus lambda times the tasks' losses: fools what is undefended while there is nothing to repair.

  It never looks at the repair; `strength` is to be swept, and the worst of the sweep counted an example at a time.
  """

  def less(x: jax.Array, seed_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    loss_B, fooled_B = objective(x, seed_B)
    tasks_B = sum(term.weight * term.loss(x, fold(seed_B, _TERM, k)) for k, term in enumerate(terms))
    return loss_B - strength * tasks_B, fooled_B

  return less
