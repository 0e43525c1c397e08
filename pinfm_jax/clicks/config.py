"""Configuration of click-through experiments, their launch files and their checks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pinfm_jax.checks import check_experiment
from pinfm_jax.config import Arm, Experiment, RankerConfig
from pinfm_jax.data.click_through import CLICK_SOURCES
from pinfm_jax.errors import UserError
from pinfm_jax.launch import run_file
from pinfm_jax.overrides import apply_overrides

GROUPS = ('ranker.', 'training.')  # what an arm may change


@dataclass(frozen=True)
class ClickData:
  """The table (`data.click_through.load_click_table`)."""

  source: str = 'movielens'  # 'criteo', 'avazu' or 'movielens'
  path: str = ''  # the folder of the published files, or one file
  options: Mapping[str, Any] = field(default_factory=dict)  # split, shares, seed, min_count; rows of criteo and avazu


@dataclass(frozen=True)
class ClickTraining:
  """Adam with early stopping on the validation logloss."""

  epochs: int = 10  # at most
  batch: int = 4096
  learning_rate: float = 1e-3
  embedding_l2: float = 0.0  # adds embedding_l2 / 2 times the squares of all sparse features' embeddings to the loss
  kernel_l2: float = 0.0  # likewise of the kernels
  evaluate_every: float = 1.0  # epochs between looks at the validation part
  patience: int = 2  # looks without a better logloss end the training; the best weights are kept
  decay: float = 1.0  # a look without a better logloss multiplies the learning rate by it


@dataclass(frozen=True)
class ClickExperiment:
  """Everything `pinfm clicks` needs; a launch file defines one, named `clicks`."""

  name: str
  data: ClickData = ClickData()
  ranker: RankerConfig = RankerConfig(sequence='none')  # its sequence modules and item_buckets are not used
  training: ClickTraining = ClickTraining()
  arms: tuple[Arm, ...] = (Arm('the ranker'),)
  baseline: str = 'the ranker'
  seeds: tuple[int, ...] = (0, 1, 2)


def load_clicks(path: str | Path, overrides: Mapping[str, Any] | None = None) -> ClickExperiment:
  """Runs the launch file and applies the overrides.

  Raises:
    UserError: no such file, an error in it, no experiment of this kind, or settings that cannot work.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f'{path} is no file; give a launch file such as experiments/movielens_clicks.py')
  clicks = run_file(path, 'launch file').get('clicks')
  if not isinstance(clicks, ClickExperiment):
    raise UserError(f"{path} defines no `clicks`; expected `clicks = ClickExperiment(name='...', ...)`")
  clicks = apply_overrides(clicks, overrides or {})
  check_clicks(clicks)
  return clicks


def check_clicks(clicks: ClickExperiment) -> None:
  """Checks an experiment and every arm of it.

  Raises:
    UserError: the first setting that cannot work.
  """
  if clicks.data.source not in CLICK_SOURCES:
    raise UserError(f"data.source is '{clicks.data.source}'; expected one of: {', '.join(CLICK_SOURCES)}")
  if not clicks.arms:
    raise UserError('arms is empty; give at least one, as `arms=(Arm(...),)`')
  for arm in clicks.arms:
    for key in arm.overrides:
      if not key.startswith(GROUPS):
        raise UserError(f"arm '{arm.name}' changes {key}; an arm may change {', '.join(f'{g}*' for g in GROUPS)}")
  for each in (clicks, *(apply_overrides(clicks, arm.overrides) for arm in clicks.arms)):
    _check_training(each.training)
    if each.ranker.sequence != 'none' or each.ranker.transact.length:
      raise UserError('click-through tables have no histories; set ranker.sequence=none and ranker.transact.length=0')
    # The checks of `pinfm run`: of names, seeds, and of all that the ranker's settings say.
    plain = tuple(replace(arm, overrides={}) for arm in each.arms)
    check_experiment(Experiment(each.name, ranker=each.ranker, arms=plain, baseline=each.baseline, seeds=each.seeds))


def _check_training(training: ClickTraining) -> None:
  for item in fields(training):
    value, key = getattr(training, item.name), f'training.{item.name}'
    if not math.isfinite(value) or value < 0:
      raise UserError(f'{key} is {value}; expected a finite number that is not negative')
    if value == 0 and not item.name.endswith('_l2'):
      raise UserError(f'{key} is 0; expected a positive number')
  if training.decay > 1:
    raise UserError(f'training.decay is {training.decay}; expected at most 1 (1 = no decay)')
