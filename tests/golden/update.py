"""Writes tests/golden/NAME.json, the settings of each named experiment that tests/test_launch.py compares.

Also tests/golden/ablations/NAME.json, the arms of each ablation on each launch file, for tests/test_ablations.py, and
tests/golden/studies/NAME.json, the files of blocks and of click-through experiments, for tests/test_study_blocks.py.

Run it after a change that is meant to change an experiment, and read the difference before you commit it:

  python tests/golden/update.py && git diff tests/golden
"""

import json
import os
from pathlib import Path

from pinfm_jax.clicks.config import load_clicks
from pinfm_jax.errors import UserError
from pinfm_jax.launch import load_experiment
from pinfm_jax.overrides import to_dict
from pinfm_jax.study.blocks_file import load_blocks
from pinfm_jax.sweep.arms_file import DataFacts, load_arms

GOLDEN = Path(__file__).resolve().parent
EXPERIMENTS = GOLDEN.parent.parent / 'experiments'
# What the ablations ask about the data: as the data sets are today, so that no data are needed to write the files.
FACTS = {
  'kuairand': DataFacts(
    39_477, False, ('click', 'like', 'follow', 'comment', 'forward', 'hate', 'long_view', 'profile_enter'), ()
  ),
  'globo': DataFacts(80_000, True, ('click',), ('click',)),
  'quickstart': DataFacts(5_855, True, ('click', 'closeup', 'save', 'hide', 'share'), ()),
  'ml1m': DataFacts(0, False, ('hide', 'click', 'closeup', 'save'), ()),
}


def launch_files() -> list[Path]:
  """The files that define an experiment; a script beside them does not."""
  files = [*EXPERIMENTS.glob('*.py'), *EXPERIMENTS.glob('sequential/*.py')]
  return [path for path in sorted(files) if '\nexperiment = ' in path.read_text(encoding='utf-8')]


def name(launch_file: Path) -> str:
  """Of the golden file: 'ml1m', 'sequential_ml1m'."""
  return '_'.join(launch_file.relative_to(EXPERIMENTS).with_suffix('').parts)


def settings(launch_file: Path) -> str:
  """The experiment's settings as JSON text, whatever data set folder this machine has."""
  data = os.environ.pop('PINFM_DATA', None)
  try:
    return json.dumps(to_dict(load_experiment(launch_file)), indent=1) + '\n'
  finally:
    if data is not None:
      os.environ['PINFM_DATA'] = data


def study_files() -> list[Path]:
  """The files of blocks and of click-through experiments."""
  texts = {path: path.read_text(encoding='utf-8') for path in sorted(EXPERIMENTS.glob('*.py'))}
  return [path for path, text in texts.items() if '\nclicks = ' in text or '\nbaseline = ' in text]


def study(path: Path) -> str:
  """A study's blocks with all that they try, or a click-through experiment, as JSON text."""
  data = os.environ.pop('PINFM_DATA', None)
  try:
    if '\nclicks = ' in path.read_text(encoding='utf-8'):
      return json.dumps(to_dict(load_clicks(path)), indent=1) + '\n'
  finally:
    if data is not None:
      os.environ['PINFM_DATA'] = data
  file, found = load_blocks(path), {}
  experiment = load_experiment(EXPERIMENTS / 'kuairand.py', file.settings)
  for block, arms in file.candidates(file.blocks(experiment, FACTS['kuairand'])).items():
    found[block] = {arm.name: arm.overrides for arm in arms}
  return json.dumps({'settings': file.settings, 'quick': file.quick, 'blocks': found}, indent=1) + '\n'


def ablation_files() -> list[Path]:
  """The files of arms."""
  return sorted((EXPERIMENTS / 'ablations').glob('*.py'))


def ablation(file: Path) -> str:
  """The arms of an ablation on each launch file as JSON text; where it does not apply, the message that says so."""
  found, arms_file = {}, load_arms(file)
  for name, facts in FACTS.items():
    try:
      arms = arms_file.arms(load_experiment(EXPERIMENTS / f'{name}.py'), facts)
      found[name] = {arm.name: {'overrides': arm.overrides, 'paper': arm.paper} for arm in arms}
    except UserError as error:
      found[name] = str(error)
  return json.dumps(found, indent=1) + '\n'


if __name__ == '__main__':
  for path in launch_files():
    (GOLDEN / f'{name(path)}.json').write_text(settings(path), encoding='utf-8')
    print(GOLDEN / f'{name(path)}.json')
  for path in ablation_files():
    (GOLDEN / 'ablations' / f'{path.stem}.json').write_text(ablation(path), encoding='utf-8')
    print(GOLDEN / 'ablations' / f'{path.stem}.json')
  for path in study_files():
    (GOLDEN / 'studies' / f'{path.stem}.json').write_text(study(path), encoding='utf-8')
    print(GOLDEN / 'studies' / f'{path.stem}.json')
