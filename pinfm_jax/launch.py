"""Loads a launch file: Python that defines `experiment = Experiment(...)` and says in its docstring what it does."""

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pinfm_jax.checks import check_experiment
from pinfm_jax.config import Experiment
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import apply_overrides, from_dict


def load_experiment(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
  """Runs the launch file and applies the overrides.

  Raises:
    UserError: no such file, an error in it, no experiment, an unknown setting, or arms that do not fit.
  """
  return experiment_and_names(path, overrides)[0]


def experiment_and_names(
  path: str | Path, overrides: Mapping[str, Any] | None = None
) -> tuple[Experiment, dict[str, Any]]:
  """As `load_experiment`, with all names that the file defines."""
  path = Path(path)
  if not path.is_file():
    problem = 'is a directory' if path.is_dir() else 'does not exist'
    raise UserError(f'{path} {problem}; give a launch file such as experiments/quickstart.py')
  names = run_file(path, 'launch file')
  experiment = names.get('experiment')
  if not isinstance(experiment, Experiment):
    raise UserError(f"{path} defines no `experiment`; expected `experiment = Experiment(name='...', ...)`")
  experiment = apply_overrides(experiment, overrides or {})
  check_experiment(experiment)
  return experiment, names


def run_file(path: Path, kind: str) -> dict[str, Any]:
  """The names that a user's Python file defines.

  Raises:
    UserError: an error in it; `kind` says what it is.
  """
  try:
    return runpy.run_path(str(path))
  except UserError:
    raise
  except Exception as error:  # whatever the user's file raises is the user's to mend: say where
    raise UserError(f'{path} failed: {type(error).__name__}: {error}; mend the {kind}') from error


def saved_experiment(workdir: str | Path) -> Experiment:
  """The experiment of a run, as it stands in the run's directory.

  Raises:
    UserError: the directory holds no run.
  """
  path = Path(workdir) / 'experiment.json'
  if not path.is_file():
    raise UserError(f'{workdir} holds no run (no experiment.json); give the --workdir of `pinfm run`')
  try:
    return from_dict(Experiment, json.loads(path.read_text(encoding='utf-8')))
  except ValueError as error:
    raise UserError(f'{path} is not valid JSON ({error}); run the experiment again') from error
