"""Does a plan fit the chip, and if not: the smallest change of the settings that makes it fit."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pinfm_jax.errors import UserError
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.plan.chips import Chip
from pinfm_jax.plan.compile import Compiled
from pinfm_jax.plan.memory import StateBytes, activation_bytes, batch_bytes, least_bytes, state_bytes
from pinfm_jax.plan.problem import Problem
from pinfm_jax.train.sharding import AXES

BATCHES = 2  # on the device: the one in use, and the next one on its way
MOST_COMPILES = 3


@dataclass(frozen=True)
class Memory:
  """Bytes on one device during a step; `padding` is what state and batch take beyond their values."""

  state: StateBytes
  batches: int
  padding: float
  temporaries: float
  not_in_place: float

  @property
  def total(self) -> float:
    """All of it."""
    return self.state.total + self.batches + self.padding + self.temporaries + self.not_in_place


@dataclass(frozen=True)
class Change:
  """Settings that differ, and how big a step away they are.

  Attributes:
    settings: dotted names and values.
    devices: of the changed plan.
    size: sum over the settings, see `_options`.
  """

  settings: dict[str, Any]
  devices: int
  size: int


@dataclass(frozen=True)
class Suggestion:
  """A change that fits.

  Attributes:
    change: what to change.
    total: bytes a device with it.
    verified: 'compiled' or 'arithmetic'.
  """

  change: Change
  total: float
  verified: str


def memory(problem: Problem, compiled: Compiled, state: StateBytes | None = None) -> Memory:
  """State and batches by arithmetic, the rest from the compiled program."""
  state, batch = state or state_bytes(problem), batch_bytes(problem)
  padding = max(compiled.arguments - state.total - batch, 0)
  return Memory(state, BATCHES * batch, padding, compiled.temporaries, max(compiled.not_in_place, 0))


def nearest_fit(
  problem: Problem, chip: Chip, compiled: Compiled, compile_again: Callable[[Problem], Compiled]
) -> Suggestion | None:
  """The smallest change that fits; None if none of those tried does.

  Candidates are taken by size; their temporaries are the compiled ones times the ratio of `activation_bytes`. Each
  that fits by this arithmetic is compiled, and a compile that says otherwise corrects the ratio. After MOST_COMPILES
  the next one is given by arithmetic alone.

  Args:
    problem: does not fit.
    chip: its memory counts.
    compiled: of the problem.
    compile_again: compiles a candidate.
  """
  scale, tried = compiled.temporaries / activation_bytes(problem), 0
  for change, candidate, state in _candidates(problem, chip):
    total = state.total + BATCHES * batch_bytes(candidate) + scale * activation_bytes(candidate)
    if total > chip.usable:
      continue
    if tried == MOST_COMPILES:
      return Suggestion(change, total, 'arithmetic')
    tried += 1
    again = compile_again(candidate)
    exact = memory(candidate, again, state).total
    if exact <= chip.usable:
      return Suggestion(change, exact, 'compiled')
    scale = max(scale, again.temporaries / activation_bytes(candidate))
  return None


def _candidates(problem: Problem, chip: Chip) -> Iterator[tuple[Change, Problem, StateBytes]]:
  """Changed problems from the smallest change on, but for those whose tables alone do not fit.

  The state's bytes take a second, so they are worked out once a mesh and table type.
  """
  known: dict[tuple[Any, ...], StateBytes] = {}
  options = _options(problem)
  combinations = (_combine(problem, parts) for parts in itertools.product(*options))
  for change in sorted(combinations, key=lambda change: change.size):
    if not change.size:
      continue
    candidate = Problem(apply_overrides(problem.experiment, change.settings), change.devices)
    try:
      layout = candidate.layout
    except UserError:  # the batch does not divide over this mesh
      continue
    if least_bytes(candidate) > chip.usable:
      continue
    key = (candidate.shape, layout.table_axes, candidate.model.tables.dtype)
    if key not in known:
      known[key] = state_bytes(candidate)
    yield change, candidate, known[key]


def _options(problem: Problem) -> list[list[tuple[int, dict[str, Any], int]]]:
  """Independent groups of (size, settings, factor of devices).

  A step counts 1 for half the batch or for recomputing more, 2 for what changes the numbers or the exchange (bfloat16
  tables, rows over the whole mesh), 3 for a doubled fsdp axis, 4 for twice the devices.
  """
  experiment, nothing = problem.experiment, (0, {}, 1)
  groups = []
  segments = experiment.pretrain.batch_segments
  halvings = [k for k in range(1, segments.bit_length()) if segments % 2**k == 0]
  groups.append([nothing] + [(k, {'pretrain.batch_segments': segments >> k}, 1) for k in halvings])
  kinds = ('none', 'dots', 'full')
  now = kinds.index(experiment.model.tower.remat)
  groups.append([nothing] + [(i - now, {'model.tower.remat': kinds[i]}, 1) for i in range(now + 1, len(kinds))])
  if experiment.model.tables.dtype == 'float32':
    groups.append([nothing, (2, {'model.tables.dtype': 'bfloat16'}, 1)])
  if experiment.mesh.table_axes != AXES:
    groups.append([nothing, (2, {'mesh.table_axes': AXES}, 1)])
  fsdp = problem.shape[1]
  groups.append([nothing] + [(3 * k, {'mesh.fsdp': fsdp << k}, 1) for k in range(1, 4)])
  groups.append([nothing] + [(4 * k, {}, 1 << k) for k in range(1, 9)])
  return groups


def _combine(problem: Problem, parts: tuple[tuple[int, dict[str, Any], int], ...]) -> Change:
  settings = {key: value for _, changes, _ in parts for key, value in changes.items()}
  devices = problem.devices * math.prod(factor for _, _, factor in parts)
  if settings.get('mesh.fsdp') or devices != problem.devices:
    layout = replace(problem.layout, fsdp=settings.get('mesh.fsdp', problem.shape[1]))
    settings['mesh.data'] = devices // (layout.fsdp * layout.model)  # 0 (too few devices) is filtered below
    settings['mesh.fsdp'], settings['mesh.model'] = layout.fsdp, layout.model
  return Change(settings, devices, sum(size for size, _, _ in parts))
