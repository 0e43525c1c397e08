"""Evaluates a repair as its critics would: rows of defences by columns of attacks, cell by cell, resumable.

A cell is one defence under one attack with one seed of the defence: which images stayed correct, as a file. Transfer
attacks (against the undefended classifier) are made once and meet every row; adaptive attacks are made for each row.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.data.public.cifar10 import Images, as_floats
from pinfm_jax.errors import UserError
from pinfm_jax.progress import Progress
from pinfm_jax.robustness.cells import filled, fingerprint, save_cell
from pinfm_jax.robustness.defended import ADAPTIVE, CLEAN, NONE, Defended, EvaluationConfig
from pinfm_jax.robustness.draws import example_seeds
from pinfm_jax.robustness.tasks import Tasks
from pinfm_jax.workdir import claim

_DEFENCE = 40  # purpose of draws
_ADAPTIVE = 'adaptive'  # folder of the adaptive columns, which depend on further settings
_ADAPTIVE_SETTINGS = ('adaptive_images', 'adaptive_steps', 'eot', 'unrolled_steps', 'strengths', 'queries')


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
    # The bank is computed from the other weights, on a GPU with other last bits in every process.
    learnt = {name: value for name, value in trained.items() if name != 'bank'}
    fixed |= {**settings, 'weights': fingerprint(learnt)}
    adaptive = {name: fixed.pop(name) for name in _ADAPTIVE_SETTINGS}
    claim(directory, fixed, started=any(directory.glob('*/*.npz')))
    claim(directory / _ADAPTIVE, fixed | adaptive, started=any(directory.glob(f'{_ADAPTIVE}/*/*.npz')))
    self.directory, self.config, self.tasks = directory, config, tasks
    self.x = as_floats(test.pixels[: config.transfer_images])
    self.label = test.labels[: config.transfer_images]
    self._params = {'trained': trained, 'untrained': untrained}
    self._programs: dict[Any, Callable[..., Any]] = {}

  @property
  def defended(self) -> Defended:
    """The networks with their defences and attacks."""
    return Defended(self.tasks, self.config, self._params)

  def run(self, rows: tuple[str, ...] | None = None, adaptive: bool = True) -> None:
    """Makes the attacked images, then the cells that are not there yet: one seed of all rows, then the next.

    Args:
      rows: that are worked on; None = all of the configuration.
      adaptive: whether the adaptive columns are too, after the transfer columns.
    """
    c = self.config
    for column in c.transfer:
      self.attacked(column)
    kinds = [(self.transfer_cell, (CLEAN, *c.transfer)), (self.adaptive_cell, c.adaptive if adaptive else ())]
    cells = [
      (make, row, column, seed)
      for make, columns in kinds for seed in c.seeds for row in rows or c.rows for column in columns
    ]  # fmt: skip
    cells = [cell for cell in cells if not self._cell(*cell[1:]).exists()]
    progress = Progress('all cells', len(cells), 'cells')
    for number, (make, row, column, seed) in enumerate(cells, 1):
      make(row, column, seed)
      progress.update(number)
    progress.close()

  def attacked(self, column: str) -> np.ndarray:
    """[N, ...] float32: the test images as a transfer attack leaves them."""
    if column == CLEAN:
      return self.x
    path = self.directory / 'attacked' / f'{column}.npz'
    if not path.exists():
      attack = lambda d, seed, x, label_B, index_B: d.transfer_attack(column, x, label_B, index_B)  # noqa: E731
      save_cell(path, x=self._batched(f'attack {column}', column, attack, 0, self.x, self.label))
    return np.load(path)['x']

  def transfer_cell(self, row: str, column: str, seed: int) -> np.ndarray:
    """[N] bool: which images a defence leaves correct that never knew of it."""
    path = self._cell(row, column, seed)
    if not path.exists():

      def correct(d: Defended, seed: jax.Array, x: jax.Array, label_B: jax.Array, index_B: jax.Array) -> jax.Array:
        moved = d.defence(row)(x, example_seeds(index_B, _DEFENCE, seed))
        return jnp.argmax(d.logits(moved), axis=-1) == label_B

      x = self.attacked(column)
      save_cell(path, correct=self._batched(f'{row} / {column} / seed {seed}', row, correct, seed, x, self.label))
    return np.load(path)['correct']

  def adaptive_cell(self, row: str, column: str, seed: int) -> np.ndarray:
    """[M] bool: which of the first images the defence leaves correct under an attack that knows of it.

    The attack's draws are not the defence's: what counts is a fresh draw, which the attacker cannot know.
    """
    path = self._cell(row, column, seed)
    if not path.exists():

      def correct(d: Defended, seed: jax.Array, x: jax.Array, label_B: jax.Array, index_B: jax.Array) -> jax.Array:
        seed_B, kept_B = example_seeds(index_B, _DEFENCE, seed), jnp.ones(label_B.shape, bool)
        clean, start = x[:, 0], x[:, 1]
        found = d.adaptive_attack(row, column, clean, start, label_B, index_B, seed)

        def one(kept_B: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
          return kept_B & (jnp.argmax(d.logits(d.defence(row)(x, seed_B)), axis=-1) == label_B), None

        return jax.lax.scan(one, kept_B, found)[0]

      count = self.config.adaptive_images
      start, labels = self.attacked(self.config.transfer[-1])[:count], self.label[:count]
      x = np.stack([self.x[:count], start], axis=1)
      label = f'{row} / {column} / seed {seed}'
      save_cell(path, correct=self._batched(label, (row, column), correct, seed, x, labels))
    return np.load(path)['correct']

  def found(self, row: str, column: str) -> dict[int, np.ndarray]:
    """The finished cells by seed; of the row 'none' the same for all, as nothing is drawn there."""
    paths = {seed: self._cell(row, column, seed) for seed in self.config.seeds}
    return {seed: np.load(path)['correct'] for seed, path in paths.items() if path.exists()}

  def _cell(self, row: str, column: str, seed: int) -> Path:
    if row == NONE:  # nothing is drawn in a defence that does nothing: one cell stands for all seeds
      seed = 0
    folder = self.directory / _ADAPTIVE if column in ADAPTIVE else self.directory
    return folder / column / f'{row}-{seed}.npz'

  def _batched(
    self, label: str, key: Any, function: Callable[..., jax.Array], seed: int, x: np.ndarray, labels: np.ndarray
  ) -> np.ndarray:
    """A function of (Defended, seed, x, label, index) over all images; the last batch is filled up.

    `key` names the function among those compiled: parameters and seed are arguments, so columns and seeds share it.
    """
    size = min(self.config.batch, len(x))
    program = self._programs.setdefault(
      (key, size),
      jax.jit(lambda params, *rest: function(Defended(self.tasks, self.config, params), *rest)),
    )
    progress, parts = Progress(label, len(x), 'images'), []
    for rows in filled(np.arange(len(x)), size):
      parts.append(
        np.asarray(program(self._params, np.uint32(seed), jnp.asarray(x[rows]), jnp.asarray(labels[rows]), rows))
      )
      progress.update(min(size * len(parts), len(x)))
    progress.close()
    return np.concatenate(parts)[: len(x)]
