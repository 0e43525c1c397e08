"""Evaluates a repair as its critics would: rows of defences by columns of attacks, cell by cell, resumable.

A cell is one defence under one attack with one seed of the defence: which images stayed correct, as a file. Transfer
attacks (against the undefended classifier) are made once and meet every row; adaptive attacks are made for each row.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.data.public.cifar10 import Images, as_floats
from pinfm_jax.errors import UserError
from pinfm_jax.progress import Progress
from pinfm_jax.robustness import adaptive
from pinfm_jax.robustness.apgd import apgd, apgd_targeted
from pinfm_jax.robustness.attacks import Attacked, classifier_objective, pgd
from pinfm_jax.robustness.balls import Ball
from pinfm_jax.robustness.draws import example_seeds
from pinfm_jax.robustness.repair import RepairConfig, passes
from pinfm_jax.robustness.square import square
from pinfm_jax.robustness.tasks import NAMES, Tasks
from pinfm_jax.workdir import claim

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
TRANSFER = ('pgd', 'apgd-ce', 'apgd-dlr', 'apgd-t', 'cw')
ADAPTIVE = ('task-aware', 'bpda', 'bpda+eot', 'unrolled', 'square')
_DEFENCE, _ATTACK = 40, 41  # purposes of draws


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
    if self.adaptive_images > self.transfer_images:
      raise UserError(
        f'evaluation.adaptive_images {self.adaptive_images} exceeds transfer_images {self.transfer_images}: '
        'the worst case is taken over both'
      )


class Evaluation:
  """The cells of one classifier and its task networks in a directory."""

  def __init__(
    self,
    directory: Path,
    config: EvaluationConfig,
    tasks: Tasks,
    trained: Mapping[str, Any],
    untrained: Mapping[str, Any],
    test: Images,
    settings: Mapping[str, Any],
  ):
    """Opens the directory.

    Args:
      directory: of the cells; made with other settings, it is refused.
      config: what is measured.
      tasks: the networks.
      trained: their parameters.
      untrained: the control's: same classifier, task networks that never learnt.
      test: images in an order that is not by class.
      settings: what else the cells depend on (how the networks were trained).
    """
    if len(test) < config.transfer_images:
      raise UserError(f'evaluation.transfer_images is {config.transfer_images}; the test split has {len(test)} images')
    # What decides which cells there are may change; what a cell means may not.
    fixed = {k: v for k, v in asdict(config).items() if k not in ('seeds', 'transfer', 'adaptive', 'rows', 'batch')}
    claim(directory, {**settings, **fixed}, started=any(directory.glob('*/*.npz')))
    self.directory, self.config, self.tasks = directory, config, tasks
    self.x = as_floats(test.pixels[: config.transfer_images])
    self.label = test.labels[: config.transfer_images]
    self._params = {UNTRAINED: untrained}
    self._trained = trained

  def defence(self, row: str) -> adaptive.Defence:
    """A row's defence."""
    if row == NONE:
      return adaptive.static_defence
    if row == NOISE:
      return adaptive.noise_defence(self.config.repair)
    return adaptive.repair_defence(self.terms(row), self.config.repair)

  def terms(self, row: str) -> tuple:
    """The loss terms of a row's tasks."""
    return self.tasks.terms(self._params.get(row, self._trained), ROWS[row])

  def logits(self, x: jax.Array) -> jax.Array:
    """[B, classes] of the undefended classifier."""
    return self.tasks.logits(self._trained, x)

  def cost(self, row: str) -> float:
    """Forward-backward passes of the classifier that the defence of one image costs."""
    return passes(self.terms(row), self.config.repair) if ROWS[row] else 0.0

  def run(self, rows: tuple[str, ...] | None = None, adaptive: bool = True) -> None:
    """Makes the attacked images, then the cells that are not there yet: one seed of all rows, then the next.

    Args:
      rows: that are worked on; None = all of the configuration.
      adaptive: whether the adaptive columns are too, after the transfer columns.
    """
    c = self.config
    for column in c.transfer:
      self.attacked(column)
    for columns, cell in (
      ((CLEAN, *c.transfer), self.transfer_cell),
      (c.adaptive if adaptive else (), self.adaptive_cell),
    ):
      for seed in c.seeds:
        for row in rows or c.rows:
          for column in columns:
            cell(row, column, seed)

  def attacked(self, column: str) -> np.ndarray:
    """[N, ...] float32: the test images as a transfer attack leaves them."""
    if column == CLEAN:
      return self.x
    path = self.directory / 'attacked' / f'{column}.npz'
    if not path.exists():
      _save(path, x=self._batched(f'attack {column}', partial(self._transfer_attack, column), self.x, self.label)[0])
    return np.load(path)['x']

  def transfer_cell(self, row: str, column: str, seed: int) -> np.ndarray:
    """[N] bool: which images a defence leaves correct that never knew of it."""
    path = self._cell(row, column, seed)
    if not path.exists():
      x, defence = self.attacked(column), self.defence(row)

      def correct(x: jax.Array, label_B: jax.Array, index_B: jax.Array) -> tuple[jax.Array]:
        moved = defence(x, example_seeds(index_B, _DEFENCE, seed))
        return (jnp.argmax(self.logits(moved), axis=-1) == label_B,)

      _save(path, correct=self._batched(f'{row} / {column} / seed {seed}', correct, x, self.label)[0])
    return np.load(path)['correct']

  def adaptive_cell(self, row: str, column: str, seed: int) -> np.ndarray:
    """[M] bool: which of the first images the defence leaves correct under an attack that knows of it.

    The attack's draws are not the defence's: what counts is a fresh draw, which the attacker cannot know.
    """
    path = self._cell(row, column, seed)
    if not path.exists():
      M, defence = self.config.adaptive_images, self.defence(row)

      def correct(x: jax.Array, label_B: jax.Array, index_B: jax.Array) -> tuple[jax.Array]:
        seed_B, kept_B = example_seeds(index_B, _DEFENCE, seed), jnp.ones(label_B.shape, bool)
        found = self._adaptive_attack(row, column, x, label_B, index_B, seed)
        found = found.x[None] if isinstance(found, Attacked) else found

        def one(kept_B: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
          return kept_B & (jnp.argmax(self.logits(defence(x, seed_B)), axis=-1) == label_B), None

        return (jax.lax.scan(one, kept_B, found)[0],)

      _save(path, correct=self._batched(f'{row} / {column} / seed {seed}', correct, self.x[:M], self.label[:M])[0])
    return np.load(path)['correct']

  def found(self, row: str, column: str) -> dict[int, np.ndarray]:
    """The finished cells by seed; of the row 'none' the same for all, as nothing is drawn there."""
    paths = {seed: self._cell(row, column, seed) for seed in self.config.seeds}
    return {seed: np.load(path)['correct'] for seed, path in paths.items() if path.exists()}

  def _cell(self, row: str, column: str, seed: int) -> Path:
    if row == NONE:  # nothing is drawn in a defence that does nothing: its first seed stands for all
      seed = self.config.seeds[0]
    return self.directory / column / f'{row}-{seed}.npz'

  def _transfer_attack(self, column: str, x: jax.Array, label_B: jax.Array, index_B: jax.Array) -> tuple[jax.Array]:
    c = self.config
    if column == 'apgd-t':
      return (apgd_targeted(self.logits, x, label_B, c.ball, index_B, c.steps, c.targets, _ATTACK).x,)
    loss = {'pgd': 'ce', 'apgd-ce': 'ce', 'apgd-dlr': 'dlr', 'cw': 'margin'}[column]
    attack = apgd if column.startswith('apgd') else pgd
    objective = classifier_objective(self.logits, label_B, loss)
    return (attack(objective, x, c.ball, index_B, c.steps, seed=_ATTACK).x,)

  def _adaptive_attack(
    self, row: str, column: str, x: jax.Array, label_B: jax.Array, index_B: jax.Array, seed: int
  ) -> Attacked | jax.Array:
    """The attacked images; of the task-aware attack those of every strength, [S, B, ...]."""
    c, defence, seed = self.config, self.defence(row), _ATTACK + 1 + seed
    attack = partial(pgd, x=x, ball=c.ball, index_B=index_B, seed=seed)
    through = adaptive.bpda(self.logits, defence, label_B)
    if column == 'bpda':
      return attack(through, steps=c.adaptive_steps)
    if column == 'bpda+eot':
      return attack(adaptive.averaged(through, c.eot), steps=c.adaptive_steps)
    if column == 'square':
      objective = adaptive.defended_objective(self.logits, defence, label_B)
      return square(objective, x, c.ball, index_B, c.queries, seed=seed)
    terms = self.terms(row) if ROWS[row] else ()
    if column == 'unrolled':
      objective = adaptive.unrolled(self.logits, terms, c.repair, label_B) if terms else through
      return attack(objective, steps=c.unrolled_steps)

    def aware(_: None, strength: jax.Array) -> tuple[None, jax.Array]:
      return None, attack(adaptive.task_aware(self.logits, terms, label_B, strength), steps=c.steps).x

    strengths = c.strengths if terms else c.strengths[:1]
    return jax.lax.scan(aware, None, jnp.asarray(strengths, jnp.float32))[1]

  def _batched(self, label: str, function: Callable[..., tuple], x: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """A function of (x, label, index) over all images; the last batch is filled up with its first image."""
    step, parts, size = jax.jit(function), [], min(self.config.batch, len(x))
    progress = Progress(label, len(x), 'images')
    for start in range(0, len(x), size):
      rows = np.arange(start, min(start + size, len(x)))
      padded = np.concatenate([rows, np.full(size - len(rows), rows[0])])
      found = step(jnp.asarray(x[padded]), jnp.asarray(labels[padded]), jnp.asarray(padded))
      parts.append([np.asarray(leaf)[: len(rows)] for leaf in found])
      progress.update(start + len(rows))
    progress.close()
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _save(path: Path, **arrays: np.ndarray) -> None:
  """Writes an .npz that appears only when it is complete."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial_path = path.with_name(f'{path.stem}.partial.npz')
  np.savez_compressed(partial_path, **arrays)
  partial_path.replace(path)
