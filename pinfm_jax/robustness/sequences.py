"""Defences of event embeddings and attacks on them, for one batch of histories (`subjects.Bound`).

Attacks move the embeddings within a ball or inject events; whoever makes them knows the model and the labels. Natural
noise (`event_noise`) has no adversary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.config import PretrainConfig
from pinfm_jax.errors import UserError
from pinfm_jax.robustness.adaptive import (
  Defence,
  behind,
  noise_defence,
  paying,
  repair_defence,
  static_defence,
  straight_through,
)
from pinfm_jax.robustness.attacks import Objective, ascend, pgd
from pinfm_jax.robustness.balls import Ball
from pinfm_jax.robustness.repair import LossTerm, RepairConfig
from pinfm_jax.robustness.sequence_terms import NAMES
from pinfm_jax.robustness.subjects import Bound

NONE, NOISE, ALL = 'none', 'noise', 'all'
ROWS: Mapping[str, tuple[str, ...]] = {NONE: (), NOISE: (), **{name: (name,) for name in NAMES}, ALL: NAMES}
CLEAN = 'clean'
EMBEDDING = ('pgd-l2', 'pgd-linf')  # transferred: they do not know the repair
INJECTED = ('injected', 'injected-greedy')
NATURAL = ('replaced', 'dropped', 'misordered')
ADAPTIVE = ('bpda-l2', 'bpda-linf', 'task-aware-l2', 'task-aware-linf')
HOSTILE = (*EMBEDDING, *INJECTED)
STATIC = (CLEAN, *HOSTILE, *NATURAL)
_ATTACK = 51  # purpose of draws


@dataclass(frozen=True)
class SequenceConfig:
  """What is measured. Radii are of each event's embedding, whose length is about 1 (phi_in has unit length).

  Attributes:
    radius_l2: of the attacks on embeddings, in l_2.
    radius_linf: in l_inf.
    repair: the defence; adaptive attacks attack this very repair.
    strengths: radii of the repair, all measured on what does not adapt; the step grows with the radius.
    seeds: of the defence.
    steps: of the attacks that do not know the repair.
    adaptive_steps: of those through it.
    lambdas: swept by the task-aware attack.
    injected: events that are injected.
    pool: events to inject, or to replace others.
    tried: events of the pool that the greedy attack tries at each place, by the gradient's choice.
    share: of the events that natural noise meets.
    bank: negatives of the losses.
    batch: examples at a time.
    columns: measured beside the adaptive ones.
    adaptive: see ADAPTIVE.
    rows: defences.
  """

  radius_l2: float = 0.1
  radius_linf: float = 0.0125
  repair: RepairConfig = RepairConfig(Ball('l2', 0.2, None, None, 'vector'), steps=10, step_size=0.05)
  strengths: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
  seeds: tuple[int, ...] = (0, 1, 2)
  steps: int = 20
  adaptive_steps: int = 10
  lambdas: tuple[float, ...] = (0.0, 0.1, 1.0)
  injected: int = 4
  pool: int = 256
  tried: int = 8
  share: float = 0.2
  bank: int = 512
  batch: int = 64
  columns: tuple[str, ...] = STATIC
  adaptive: tuple[str, ...] = ADAPTIVE
  rows: tuple[str, ...] = field(default_factory=lambda: tuple(ROWS))

  def __post_init__(self):
    for name, choices in (('columns', STATIC), ('adaptive', ADAPTIVE), ('rows', tuple(ROWS))):
      unknown = [value for value in getattr(self, name) if value not in choices]
      if unknown:
        raise UserError(f"{name} name '{unknown[0]}'; expected some of {', '.join(choices)}")
    if self.repair.ball.radius not in self.strengths:
      raise UserError(f'strengths are {self.strengths}; expected the radius of the repair, {self.main}, among them')

  @property
  def main(self) -> float:
    """The radius of the repair that all rows and columns are measured with."""
    return self.repair.ball.radius

  def repair_of(self, strength: float) -> RepairConfig:
    """The repair with another radius, and steps that reach as far in it."""
    repair = self.repair
    ball = replace(repair.ball, radius=strength)
    return replace(repair, ball=ball, step_size=repair.step_size * strength / self.main)

  def attack_ball(self, column: str) -> Ball:
    """Of an attack on embeddings, by its name."""
    norm = column.rsplit('-', 1)[1]
    return Ball(norm, self.radius_l2 if norm == 'l2' else self.radius_linf, None, None, 'vector')


def row_weights(row: str, pretrain: PretrainConfig) -> np.ndarray:
  """[K] float32: what a row's repair weighs each loss, in the order of NAMES.

  That is its weight in pretraining, 1 if it had no part there, and 0 for the losses that the row leaves out.
  """
  trained = {'ntl': pretrain.ntl_weight, 'mtl': pretrain.mtl_weight, 'ftl': pretrain.ftl_weight}
  return np.array([(trained[name] or 1.0) * (name in ROWS[row]) for name in NAMES], np.float32)


def defence(row: str, terms: Sequence[LossTerm], repair: RepairConfig) -> Defence:
  """A row's defence of a batch, whose terms have the row's weights."""
  if row == NONE:
    return static_defence
  return noise_defence(repair) if row == NOISE else repair_defence(terms, repair)


def objective_of(bound: Bound) -> Objective:
  """Raising the loss of the undefended model; nothing counts as fooled, so the highest loss wins."""
  return lambda x, seed_B: (bound.loss(x), jnp.zeros(x.shape[:1], bool))


def embedding_attack(column: str, bound: Bound, config: SequenceConfig, index_B: jax.Array) -> jax.Array:
  """[U, L, D]: projected gradient ascent from where nothing of a defence is known."""
  ball = config.attack_ball(column)
  return pgd(objective_of(bound), bound.x_ULD, ball, index_B, config.steps, seed=_ATTACK).x


def adaptive_attack(
  column: str,
  guard: Defence,
  terms: Sequence[LossTerm],
  bound: Bound,
  config: SequenceConfig,
  index_B: jax.Array,
  seed: jax.Array,
) -> jax.Array:
  """[U, L, D]: an attack that knows a row's defence and its terms, but not the draws that the defence will make.

  BPDA takes the defence's gradient for the identity; its end counts, as the best of points that are measured with
  different draws is partly the luckiest. The task-aware attack keeps the tasks content, with each lambda;
  what counts is the one that the defended model suffers most from. Without terms there is nothing to keep content.
  """
  ball, seed = config.attack_ball(column), _ATTACK + 1 + seed
  plain, defended = objective_of(bound), behind(objective_of(bound), guard)
  if column.startswith('bpda'):
    known = behind(plain, straight_through(guard))
    return ascend(known, bound.x_ULD, ball, index_B, config.adaptive_steps, seed=seed).end
  seed_B = (index_B + seed).astype(jnp.uint32)

  def one(best: tuple[jax.Array, jax.Array], strength: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    found = pgd(paying(plain, terms, strength), bound.x_ULD, ball, index_B, config.steps, seed=seed).x
    loss_B = defended(found, seed_B)[0]
    wins_B = loss_B > best[1]
    return (jnp.where(wins_B[:, None, None], found, best[0]), jnp.maximum(loss_B, best[1])), None

  start = (bound.x_ULD, jnp.full(bound.x_ULD.shape[:1], -jnp.inf))
  lambdas = config.lambdas if terms else config.lambdas[:1]
  return jax.lax.scan(one, start, jnp.asarray(lambdas, jnp.float32))[0][0]


def greedy_choice(bound: Bound, pool_PD: jax.Array, choice_UK: jax.Array, slot_UK: jax.Array, tried: int) -> jax.Array:
  """Which events of a pool to inject so that the loss is high: one place after another, starting from given ones.

  At each place the gradient ranks the pool (to first order), the best few are tried, and the one of the highest loss
  stays, what stood there included; so the result is never worse than the start.

  Args:
    bound: of histories that hold `choice_UK` already.
    pool_PD: phi_in of the pool's events.
    choice_UK: int32 places in the pool, of the events that are injected now.
    slot_UK: int32 where they stand; -1 = a history into which nothing is injected.
    tried: events tried at each place.

  Returns:
    [U, K] int32.
  """
  users, length = bound.x_ULD.shape[:2]
  user_U = jnp.arange(users)

  def put(x_ULD: jax.Array, slot_U: jax.Array, change_UD: jax.Array) -> jax.Array:
    return x_ULD.at[user_U, jnp.where(slot_U < 0, length, slot_U)].add(change_UD, mode='drop')

  def place(x_ULD: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    slot_U, own_U = now
    gradient_ULD = jax.grad(lambda x: jnp.sum(bound.loss(x)))(x_ULD)
    gain_UP = jnp.take_along_axis(gradient_ULD, slot_U[:, None, None], axis=1)[:, 0] @ pool_PD.T
    candidate_TU = jax.lax.top_k(gain_UP, tried)[1].T
    own_UD = pool_PD[own_U]

    def one(best: tuple[jax.Array, jax.Array], choice_U: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
      loss_U = bound.loss(put(x_ULD, slot_U, pool_PD[choice_U] - own_UD))
      return (jnp.where(loss_U > best[1], choice_U, best[0]), jnp.maximum(loss_U, best[1])), None

    (choice_U, _), _ = jax.lax.scan(one, (own_U, bound.loss(x_ULD)), candidate_TU)
    return put(x_ULD, slot_U, pool_PD[choice_U] - own_UD), choice_U

  return jax.lax.scan(place, bound.x_ULD, (slot_UK.T, choice_UK.T))[1].T
