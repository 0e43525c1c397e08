"""Files of blocks: what a study compares, for example experiments/homefeed_interactions.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.errors import UserError
from pinfm_jax.launch import run_file
from pinfm_jax.sweep.arms_file import ArmsFile, DataFacts, arms_file
from pinfm_jax.sweep.grid import Axis, grid_arms, settings_text

DEFAULT = 'homefeed_interactions.py'


@dataclass(frozen=True)
class BlocksFile:
  """A file of arms with what a study needs besides.

  Attributes:
    arms: the blocks (`arms`, `baseline`, `about` of the file).
    settings: of the experiment, for all blocks; --set wins over them.
    tune: setting -> the values that every block tries.
    sizes: block -> the overrides that it tries, as many as every other block.
    quick: names of the blocks of --quick.
  """

  arms: ArmsFile
  settings: Mapping[str, Any] = field(default_factory=dict)
  tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)
  sizes: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
  quick: tuple[str, ...] = ()

  def without_tuning(self) -> 'BlocksFile':
    """Every block as it is listed."""
    return replace(self, tune={}, sizes={})

  def blocks(self, experiment: Experiment, facts: DataFacts, only: Sequence[str] = ()) -> tuple[Arm, ...]:
    """The blocks, the baseline first.

    Args:
      experiment: the launch file's.
      facts: of its data.
      only: names of blocks, besides the baseline; empty = all.

    Raises:
      UserError: a name that no block has, two blocks of one name, or no baseline.
    """
    arms = self.arms.arms(experiment, facts)
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
      raise UserError(f'{self.arms.path}: two blocks are called {max(names, key=names.count)!r}; rename one')
    if self.arms.baseline not in names:
      raise UserError(f"{self.arms.path}: baseline is '{self.arms.baseline}'; expected one of: {', '.join(names)}")
    for name in (*only, *self.sizes, *self.quick):
      if name not in names:
        raise UserError(f"no block is called '{name}'; the blocks of {self.arms.path} are: {', '.join(names)}")
    chosen = [arm for arm in arms if not only or arm.name in (*only, self.arms.baseline)]
    return tuple(sorted(chosen, key=lambda arm: arm.name != self.arms.baseline))

  def candidates(self, blocks: Sequence[Arm]) -> dict[str, tuple[Arm, ...]]:
    """Block -> the settings that it tries, as arms: every size with every point of `tune`.

    Raises:
      UserError: one block would try more than another.
    """
    axes = [Axis(key, tuple(map(_text, values)), tuple(values)) for key, values in self.tune.items()]
    found = {}
    for block in blocks:
      sized = [
        replace(block, name=f'{block.name} {settings_text(size)}'.strip(), overrides={**block.overrides, **size})
        for size in self.sizes.get(block.name, ({},))
      ]
      found[block.name] = grid_arms(sized, axes)
    counts = {name: len(arms) for name, arms in found.items()}
    most, least = max(counts, key=counts.get), min(counts, key=counts.get)
    if counts[most] != counts[least]:
      raise UserError(
        f"{self.arms.path}: '{most}' would try {counts[most]} settings and '{least}' {counts[least]}; an equal budget "
        'needs as many `sizes` of every block'
      )
    return found


def load_blocks(path: str | Path) -> BlocksFile:
  """Runs a file of blocks.

  Raises:
    UserError: no such file, an error in it, or names that are not what they should be.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f'--blocks got {path}, which is no file; give one such as experiments/{DEFAULT}')
  names = run_file(path, 'file of blocks')
  for name, kind in (('settings', Mapping), ('tune', Mapping), ('sizes', Mapping), ('quick', tuple)):
    if not isinstance(names.get(name, () if kind is tuple else {}), kind):
      raise UserError(f'{path}: `{name}` is of type {type(names[name]).__name__}; expected a {kind.__name__.lower()}')
  tune = names.get('tune', {})
  sizes = names.get('sizes', {})
  for name, choices in (('tune', tune), ('sizes', sizes)):
    for key, values in choices.items():
      if not isinstance(values, tuple | list) or not values:
        raise UserError(f'{path}: `{name}` has {key}: {values!r}; expected a tuple of one or more values')
  for block, settings in sizes.items():
    if not all(isinstance(each, Mapping) for each in settings):
      raise UserError(f'{path}: `sizes` has {block}: {settings!r}; expected a tuple of settings by name')
  return BlocksFile(arms_file(path, names), names.get('settings', {}), tune, sizes, names.get('quick', ()))


def default_blocks(launch_file: str | Path) -> Path:
  """The file of blocks beside a launch file."""
  return Path(launch_file).parent / DEFAULT


def _text(value: Any) -> str:
  return settings_text({'': value}).removeprefix('=')
