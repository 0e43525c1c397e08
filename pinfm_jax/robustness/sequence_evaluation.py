"""Evaluates the repair of event embeddings: rows of defences by columns of attacks and noise, cell by cell, resumable.

A cell is one defence of one strength under one column with one seed: each example's outcome (probabilities, or the rank
of the next item) and the loss that attacks raise. What meets every row alike (noise, attacks that do not know the
defence) is made once.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.data.records import History, HistoryChange
from pinfm_jax.progress import Progress
from pinfm_jax.robustness.cells import filled, save_cell
from pinfm_jax.robustness.draws import example_seeds
from pinfm_jax.robustness.event_noise import Injection, Noise
from pinfm_jax.robustness.sequences import (
  ADAPTIVE,
  EMBEDDING,
  INJECTED,
  NATURAL,
  NOISE,
  NONE,
  ROWS,
  SequenceConfig,
  adaptive_attack,
  defence,
  embedding_attack,
  greedy_choice,
  row_weights,
)
from pinfm_jax.robustness.subjects import Bound, Subject, Weights
from pinfm_jax.workdir import claim

_DEFENCE = 50  # purpose of draws


class Key(NamedTuple):
  """A cell."""

  column: str
  row: str
  strength: float
  seed: int


class SequenceEvaluation:
  """The cells of one subject in a directory."""

  def __init__(
    self,
    directory: Path,
    config: SequenceConfig,
    subject: Subject,
    weights: Weights,
    pool: History,
    settings: Mapping[str, Any],
  ):
    """Opens the directory.

    Args:
      directory: of the cells; made with other settings, it is refused.
      config: what is measured.
      subject: on what.
      weights: of its model.
      pool: events to inject, or to replace others.
      settings: what else the cells depend on (which model, which examples).
    """
    # What decides which cells there are may change; what a cell means may not.
    choice = ('strengths', 'seeds', 'columns', 'adaptive', 'rows', 'batch')
    fixed = {name: value for name, value in asdict(config).items() if name not in choice}
    claim(directory, {**settings, **fixed}, started=any(directory.glob('*/*.npz')))
    self.directory, self.config, self.subject, self.pool = directory, config, subject, pool
    self._weights = weights
    self._programs: dict[Any, Callable[..., Any]] = {}
    self._kept: tuple[str, tuple[dict[str, np.ndarray], np.ndarray]] | None = None

  def planned(self, adaptive: bool = True) -> Iterator[Key]:
    """All cells in the order in which they are made: the main strength, seed by seed, the others, then what adapts."""
    c = self.config
    for seed in c.seeds:
      yield from (Key(column, row, c.main, seed) for column in c.columns for row in c.rows)
    for strength in c.strengths:
      if strength != c.main:
        yield from (Key(column, row, strength, c.seeds[0]) for column in c.columns for row in c.rows if row != NONE)
    for seed in c.seeds if adaptive else ():
      yield from (Key(column, row, c.main, seed) for column in c.adaptive for row in c.rows)

  def run(self, rows: tuple[str, ...] | None = None, adaptive: bool = True) -> None:
    """Makes the cells that are not there yet, of some rows (None = all)."""
    open_keys = [key for key in self.planned(adaptive) if key.row in (rows or self.config.rows)]
    open_keys = [key for key in open_keys if not self.path(key).exists()]
    progress = Progress(f'{self.subject.name}: all cells', len(open_keys), 'cells')
    for number, key in enumerate(open_keys, 1):
      if not self.path(key).exists():  # of a row without draws one seed stands for all
        self._make(key)
      progress.update(number)
    progress.close()

  def found(self, key: Key) -> dict[str, np.ndarray] | None:
    """A finished cell: outcome [N, ...] and loss [N]."""
    path = self.path(key)
    return dict(np.load(path)) if path.exists() else None

  def path(self, key: Key) -> Path:
    """Where a cell stands."""
    if key.row == NONE:  # nothing is drawn in a defence that does nothing
      return self.directory / key.column / f'{NONE}.npz'
    return self.directory / key.column / f'{key.row}-{key.strength:g}-{key.seed}.npz'

  def column(self, column: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The examples' inputs [N, ...] and the event embeddings [N, L, D] as the defences of a column meet them."""
    if self._kept is None or self._kept[0] != column:
      self._kept = None
      examples = self.subject.examples(self._change(column))
      if column in EMBEDDING:
        path = self.directory / 'attacked' / f'{column}.npz'
        if not path.exists():
          attack = lambda bound, x, index_B: embedding_attack(column, bound, self.config, index_B)  # noqa: E731
          save_cell(path, x=self._batched(column, column, attack, examples))
        x_NLD = np.load(path)['x']
      else:
        x_NLD = self._batched(f'{column}: embed', 'embed', lambda bound, x, index_B: bound.x_ULD, examples)
      self._kept = column, (examples, x_NLD)
    return self._kept[1]

  def _make(self, key: Key) -> None:
    config, pretrain = self.config, self.subject.pretrain

    def measure(
      bound: Bound, x: jax.Array, index_B: jax.Array, seed: jax.Array, weight_K: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
      terms = bound.terms(pretrain, weight_K)
      guard = defence(key.row, terms, config.repair_of(key.strength))
      if key.column in ADAPTIVE:
        x = adaptive_attack(key.column, guard, terms if ROWS[key.row] else (), bound, config, index_B, seed)
      moved = guard(x, example_seeds(index_B, _DEFENCE, seed))
      return bound.outcome(moved), bound.loss(moved)

    adapts = key.column in ADAPTIVE
    examples, x_NLD = self.column('clean' if adapts else key.column)
    # The tasks of a row are weights, and so an argument: all repairs share a program.
    program = ('repair' if ROWS[key.row] else key.row, key.strength, key.column if adapts else '')
    label = f'{key.column} / {key.row} {key.strength:g} / seed {key.seed}'
    weight_K = row_weights(key.row, pretrain)
    outcome, loss = self._batched(label, program, measure, examples, x_NLD, np.uint32(key.seed), weight_K)
    save_cell(self.path(key), outcome=outcome, loss=loss)

  def _change(self, column: str) -> HistoryChange | None:
    """What happens to the events in a column."""
    c = self.config
    if column in NATURAL:
      return Noise(column, c.share, self.pool)
    if column not in INJECTED:
      return None
    injection = Injection(c.injected, self.pool, *self.subject.window)
    if column == INJECTED[0]:
      return injection
    path = self.directory / 'attacked' / f'{column}.npz'
    if not path.exists():
      save_cell(path, choice=self._greedy(injection))
    return replace(injection, choices=np.load(path)['choice'], rows=self.subject.rows)

  def _greedy(self, injection: Injection) -> np.ndarray:
    """[N, K]: the events of the pool that the greedy attack injects."""
    examples = self.subject.examples(injection)
    rows, lengths = self.subject.rows, self.subject.lengths
    examples['choice'] = np.stack([injection.choice(int(row)) for row in rows]).astype(np.int32)
    examples['slot'] = np.stack([injection.slots(*map(int, pair)) for pair in zip(rows, lengths, strict=True)])

    def choose(bound: Bound, batch: Mapping[str, jax.Array], index_B: jax.Array) -> jax.Array:
      pool_PD = self.subject.pool_tokens(batch['weights'], self.pool)
      return greedy_choice(bound, pool_PD, batch['choice'], batch['slot'], self.config.tried)

    return self._batched(INJECTED[1], INJECTED[1], choose, examples)

  def _batched(
    self,
    label: str,
    key: Any,
    function: Callable[..., Any],
    examples: Mapping[str, np.ndarray],
    x_NLD: np.ndarray | None = None,
    *arguments: Any,
  ) -> Any:
    """A function of (Bound, embeddings or else the batch, rows, arguments) over all examples; arrays [N, ...].

    `key` names the function among those compiled: weights and arguments do not enter it, so columns and seeds share it.
    """

    def program(weights: Weights, batch: Any, x: Any, index_B: jax.Array, *arguments: jax.Array) -> Any:
      own = {name: value for name, value in batch.items() if name not in ('choice', 'slot')}
      bound = self.subject.bind(weights, own)
      return function(bound, {**batch, 'weights': weights} if x is None else x, index_B, *arguments)

    rows, count = self.subject.rows, len(self.subject.rows)
    compiled = self._programs.setdefault(key, jax.jit(program))
    progress, parts = Progress(label, count, 'examples'), []
    size = min(self.config.batch, count)
    for place in filled(np.arange(count), size):
      batch = {name: jnp.asarray(value[place]) for name, value in examples.items()}
      x = None if x_NLD is None else jnp.asarray(x_NLD[place])
      found = compiled(self._weights, batch, x, jnp.asarray(rows[place]), *arguments)
      parts.append(jax.tree.map(np.asarray, found))
      progress.update(min(size * len(parts), count))
    progress.close()
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *parts)


def cost(row: str, config: SequenceConfig) -> float:
  """Forward-backward passes of the tower that the defence of one history costs."""
  return float(config.repair.steps) if ROWS[row] and row != NOISE else 0.0
