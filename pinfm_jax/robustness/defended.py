"""The defences of an evaluation's rows and the attacks of its columns, over one set of networks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from pinfm_jax.errors import UserError
from pinfm_jax.robustness import adaptive
from pinfm_jax.robustness.apgd import apgd, apgd_targeted
from pinfm_jax.robustness.attacks import ascend, classifier_objective, pgd
from pinfm_jax.robustness.balls import Ball
from pinfm_jax.robustness.repair import RepairConfig, passes
from pinfm_jax.robustness.square import square
from pinfm_jax.robustness.tasks import NAMES, Tasks

NONE, NOISE, ALL, UNTRAINED = 'none', 'noise', 'all', 'untrained'
ROWS: Mapping[str, tuple[str, ...]] = {
  NONE: (),
  NOISE: (),
  **{name: (name,) for name in NAMES},
  **{f'{a}+{b}': (a, b) for i, a in enumerate(NAMES) for b in NAMES[i + 1 :]},
  ALL: NAMES,
  UNTRAINED: NAMES,
}
CLEAN = 'clean'
TRANSFER = ('pgd', 'apgd-ce', 'apgd-dlr', 'cw', 'apgd-t')  # the strongest last: attacks on defences begin there
ADAPTIVE = ('task-aware', 'bpda', 'bpda+eot', 'unrolled', 'square')
_ATTACK = 41  # purpose of draws


@dataclass(frozen=True)
class EvaluationConfig:
  """What is measured, on how many images.

  Attributes:
    ball: of the attacks.
    repair: the defence; adaptive attacks attack this very repair.
    transfer_images: the first so many test images, in the columns clean and transfer.
    adaptive_images: the first so many of them, in the adaptive columns.
    batch: images at a time.
    seeds: of the defence.
    steps: of the transfer attacks.
    targets: classes that targeted APGD tries.
    adaptive_steps: of the attacks through the repair.
    eot: draws of the repair in each of their steps.
    unrolled_steps: of the attack that differentiates the repair.
    strengths: lambda of the task-aware attack.
    queries: of Square.
  """

  ball: Ball = Ball('linf', 8 / 255)
  repair: RepairConfig = RepairConfig()
  transfer_images: int = 4000
  adaptive_images: int = 128
  batch: int = 128
  seeds: tuple[int, ...] = (0, 1, 2)
  steps: int = 20
  targets: int = 9
  adaptive_steps: int = 10
  eot: int = 4
  unrolled_steps: int = 5
  strengths: tuple[float, ...] = (0.0, 0.3, 1.0, 3.0)
  queries: int = 100
  transfer: tuple[str, ...] = TRANSFER
  adaptive: tuple[str, ...] = ADAPTIVE
  rows: tuple[str, ...] = field(default_factory=lambda: tuple(ROWS))

  def __post_init__(self):
    for name, choices in (('transfer', TRANSFER), ('adaptive', ADAPTIVE), ('rows', tuple(ROWS))):
      unknown = [value for value in getattr(self, name) if value not in choices]
      if unknown:
        raise UserError(f"evaluation.{name} names '{unknown[0]}'; expected some of {', '.join(choices)}")
    counts = ('steps', 'targets', 'adaptive_steps', 'unrolled_steps', 'queries')
    for name in ('transfer_images', 'adaptive_images', 'batch', 'eot', *counts):
      if getattr(self, name) < 1:
        raise UserError(f'evaluation.{name} is {getattr(self, name)}; expected at least 1')
    if self.adaptive and not self.transfer:
      raise UserError('evaluation.transfer is empty: the attacks through a defence begin where its last one ended')
    if self.adaptive_images > self.transfer_images:
      raise UserError(
        f'evaluation.adaptive_images {self.adaptive_images} exceeds transfer_images {self.transfer_images}: '
        'the worst case is taken over both'
      )


class Defended:
  """A classifier with its defences, and the attacks on them; parameters may be traced."""

  def __init__(self, tasks: Tasks, config: EvaluationConfig, params: Mapping[str, Any]):
    """Takes the networks.

    Args:
      tasks: the networks.
      config: repair and attacks.
      params: 'trained', the parameters, and 'untrained', those of the control.
    """
    self._tasks, self.config, self._params = tasks, config, params

  def defence(self, row: str) -> adaptive.Defence:
    """A row's defence."""
    if row == NONE:
      return adaptive.static_defence
    if row == NOISE:
      return adaptive.noise_defence(self.config.repair)
    return adaptive.repair_defence(self.terms(row), self.config.repair)

  def terms(self, row: str) -> tuple:
    """The loss terms of a row's tasks."""
    return self._tasks.terms(self._params[UNTRAINED if row == UNTRAINED else 'trained'], ROWS[row])

  def logits(self, x: jax.Array) -> jax.Array:
    """[B, classes] of the undefended classifier."""
    return self._tasks.logits(self._params['trained'], x)

  def cost(self, row: str) -> float:
    """Forward-backward passes of the classifier that the defence of one image costs."""
    return passes(self.terms(row), self.config.repair) if ROWS[row] else 0.0

  def transfer_attack(self, column: str, x: jax.Array, label_B: jax.Array, index_B: jax.Array) -> jax.Array:
    """The images as an attack leaves them that knows the classifier alone."""
    c = self.config
    if column == 'apgd-t':
      return apgd_targeted(self.logits, x, label_B, c.ball, index_B, c.steps, c.targets, _ATTACK).x
    loss = {'pgd': 'ce', 'apgd-ce': 'ce', 'apgd-dlr': 'dlr', 'cw': 'margin'}[column]
    attack = apgd if column.startswith('apgd') else pgd
    objective = classifier_objective(self.logits, label_B, loss)
    return attack(objective, x, c.ball, index_B, c.steps, seed=_ATTACK).x

  def adaptive_attack(
    self, row: str, column: str, x: jax.Array, start: jax.Array, label_B: jax.Array, index_B: jax.Array, seed: Any
  ) -> jax.Array:
    """The images that an attack leads to, each of which counts, [S, B, ...].

    Of a gradient attack through the defence the best point and the last one; of the task-aware attack one of each
    strength. `start` is where the former begin: what the strongest attack on the undefended classifier found.
    """
    c, defence, seed = self.config, self.defence(row), _ATTACK + 1 + seed
    terms = self.terms(row) if ROWS[row] else ()
    through = adaptive.bpda(self.logits, defence, label_B)
    if column == 'square':
      objective = adaptive.defended_objective(self.logits, defence, label_B)
      return square(objective, x, c.ball, index_B, c.queries, seed=seed).x[None]
    if column != 'task-aware':
      objective, steps = through, c.adaptive_steps
      if column == 'bpda+eot':
        objective = adaptive.averaged(through, c.eot)
      elif column == 'unrolled':
        steps = c.unrolled_steps
        objective = adaptive.unrolled(self.logits, terms, c.repair, label_B) if terms else through
      found = ascend(objective, x, c.ball, index_B, steps, seed=seed, start=start)
      return jnp.stack([found.best.x, found.end])

    def aware(_: None, strength: jax.Array) -> tuple[None, jax.Array]:
      objective = adaptive.task_aware(self.logits, terms, label_B, strength)
      return None, pgd(objective, x, c.ball, index_B, c.steps, seed=seed).x

    strengths = c.strengths if terms else c.strengths[:1]
    return jax.lax.scan(aware, None, jnp.asarray(strengths, jnp.float32))[1]
