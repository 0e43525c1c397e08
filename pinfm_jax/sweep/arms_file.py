"""Files of arms: what a sweep compares, for example experiments/ablations/fusion.py."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.errors import UserError
from pinfm_jax.launch import run_file


@dataclass(frozen=True)
class DataFacts:
  """What an ablation may depend on, besides the launch file.

  Attributes:
    requests: training requests, as `finetune.epochs` counts them.
    content: whether candidates have content vectors.
    actions: of the histories.
    labels: of the ranker.
  """

  requests: int
  content: bool
  actions: tuple[str, ...]
  labels: tuple[str, ...]


@dataclass(frozen=True)
class ArmsFile:
  """The names that a file of arms defines: `arms`, and maybe `baseline`, `challenger` and `about`.

  Attributes:
    path: of the file.
    make: the arms of an experiment on its data.
    baseline: the arm that lifts are relative to; '' = the launch file's.
    challenger: the arm that is compared with every other one; '' = the launch file's.
    about: text above the tables.
  """

  path: Path
  make: Callable[[Experiment, DataFacts], tuple[Arm, ...]]
  baseline: str = ''
  challenger: str = ''
  about: str = ''

  def arms(self, experiment: Experiment, facts: DataFacts) -> tuple[Arm, ...]:
    """The arms.

    Raises:
      UserError: the file's function fails, or gives no arms.
    """
    try:
      arms = self.make(experiment, facts)
    except UserError:
      raise
    except Exception as error:  # the function is the user's, as the file is
      raise UserError(f'{self.path}: arms() failed: {type(error).__name__}: {error}; mend the file') from error
    if not isinstance(arms, tuple | list) or not arms or not all(isinstance(arm, Arm) for arm in arms):
      raise UserError(f'{self.path}: `arms` is {_kind(arms)}; expected a tuple of one or more Arm')
    return tuple(arms)


def load_arms(path: str | Path) -> ArmsFile:
  """Runs a file that defines `arms`: a tuple of `Arm`, or a function of the experiment (and of `DataFacts`).

  Raises:
    UserError: no such file, an error in it, no arms, or `baseline`, `challenger` or `about` that are no text.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f'--arms got {path}, which is no file; give one such as experiments/ablations/fusion.py')
  return arms_file(path, run_file(path, 'file'))


def arms_file(path: Path, names: Mapping[str, Any]) -> ArmsFile:
  """What the names that a file defines say of arms.

  Raises:
    UserError: see `load_arms`.
  """
  if 'arms' not in names:
    raise UserError(f"{path} defines no `arms`; expected `arms = (Arm('...', {{...}}), ...)` or `def arms(experiment)`")
  texts = {name: names.get(name, '') for name in ('baseline', 'challenger', 'about')}
  for name, text in texts.items():
    if not isinstance(text, str):
      raise UserError(f'{path}: `{name}` is {_kind(text)}; expected a text')
  file = ArmsFile(path, _maker(path, names['arms']), **texts)
  if not callable(names['arms']):
    file.arms(Experiment('check'), DataFacts(0, False, (), ()))
  return file


def _maker(path: Path, arms) -> Callable[[Experiment, DataFacts], tuple[Arm, ...]]:
  if not callable(arms):
    return lambda experiment, facts: arms
  count = len(inspect.signature(arms).parameters)
  if count not in (1, 2):
    raise UserError(f'{path}: arms() takes {count} arguments; expected arms(experiment) or arms(experiment, facts)')
  return arms if count == 2 else lambda experiment, facts: arms(experiment)


def _kind(value) -> str:
  return f'of type {type(value).__name__}' if not isinstance(value, tuple | list) else f'{len(value)} values'
