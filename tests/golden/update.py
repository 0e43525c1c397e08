"""Writes tests/golden/NAME.json, the settings of each named experiment that tests/test_launch.py compares.

Run it after a change that is meant to change an experiment, and read the difference before you commit it:

  python tests/golden/update.py && git diff tests/golden
"""

import json
import os
from pathlib import Path

from pinfm_jax.launch import load_experiment
from pinfm_jax.overrides import to_dict

GOLDEN = Path(__file__).resolve().parent
EXPERIMENTS = GOLDEN.parent.parent / 'experiments'


def launch_files() -> list[Path]:
  """The files that define an experiment; a script beside them does not."""
  return [path for path in sorted(EXPERIMENTS.glob('*.py')) if '\nexperiment = ' in path.read_text(encoding='utf-8')]


def settings(launch_file: Path) -> str:
  """The experiment's settings as JSON text, whatever data set folder this machine has."""
  data = os.environ.pop('PINFM_DATA', None)
  try:
    return json.dumps(to_dict(load_experiment(launch_file)), indent=1) + '\n'
  finally:
    if data is not None:
      os.environ['PINFM_DATA'] = data


if __name__ == '__main__':
  for path in launch_files():
    (GOLDEN / f'{path.stem}.json').write_text(settings(path), encoding='utf-8')
    print(GOLDEN / f'{path.stem}.json')
