"""The ablations of experiments/ablations: that they are what they were, and that every arm may run."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import toy

from pinfm_jax.checks import check_experiment
from pinfm_jax.errors import UserError
from pinfm_jax.launch import load_experiment
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.sweep.ablations import equal_compute_epochs
from pinfm_jax.sweep.arms_file import load_arms

GOLDEN = Path(__file__).resolve().parent / 'golden'
ABLATIONS = GOLDEN.parent.parent / 'experiments' / 'ablations'
NAMES = sorted(path.stem for path in ABLATIONS.glob('*.py'))


@pytest.fixture(scope='module')
def update():
  spec = importlib.util.spec_from_file_location('golden_update', GOLDEN / 'update.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _arms(update, name, launch):
  file, experiment = load_arms(ABLATIONS / f'{name}.py'), load_experiment(ABLATIONS.parent / f'{launch}.py')
  return file, experiment, file.arms(experiment, update.FACTS[launch])


def test_every_ablation_has_a_golden_file_and_the_other_way_round():
  assert {p.stem for p in (GOLDEN / 'ablations').glob('*.json')} == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_an_ablation_is_what_it_was(update, name):
  found = json.loads(update.ablation(ABLATIONS / f'{name}.py'))
  expected = json.loads((GOLDEN / 'ablations' / f'{name}.json').read_text(encoding='utf-8'))
  assert found == expected, f'experiments/ablations/{name}.py changed; if meant: python tests/golden/update.py'


@pytest.mark.parametrize('launch', ['kuairand', 'quickstart', 'globo'])
@pytest.mark.parametrize('name', NAMES)
def test_every_arm_may_run(update, name, launch):
  if (name, launch) == ('actions', 'globo'):
    with pytest.raises(UserError, match='actions of the histories: click; this ablation needs'):
      _arms(update, name, launch)
    return
  file, experiment, arms = _arms(update, name, launch)
  check_experiment(replace(experiment, arms=arms, baseline=file.baseline, challenger=file.challenger))
  settings = [apply_overrides(experiment, arm.overrides) for arm in arms]
  assert [s.data for s in settings] == [experiment.data] * len(arms)


@pytest.mark.parametrize('name', NAMES)
def test_an_ablation_says_what_it_does(name):
  file = load_arms(ABLATIONS / f'{name}.py')
  text = (ABLATIONS / f'{name}.py').read_text(encoding='utf-8').split('"""')[1]
  for word in ('Command:', 'Hardware:', 'Time:', 'Expected:', f'--arms experiments/ablations/{name}.py'):
    assert word in text
  for launch in {line.split('experiments/')[1].split('.py')[0] for line in text.splitlines() if 'pinfm sweep' in line}:
    assert (ABLATIONS.parent / f'{launch}.py').is_file()
  assert file.baseline
  assert file.about.endswith('.')


def test_lengths_change_what_they_name(update):
  _, experiment, arms = _arms(update, 'sequence_length', 'ml1m')
  named = {arm.name: apply_overrides(experiment, arm.overrides) for arm in arms}
  assert set(named) == {"the launch file's lengths", 'L_d 32', 'L_d 64', 'L_d 256', 'L_d 64, L 72', 'L 272'}
  for name, made in named.items():
    lengths = dict(part.split(' ') for part in name.split(', ')) if name.startswith('L') else {}
    history, segment = made.finetune.history_length, made.pretrain.segment_length
    assert history == made.pretrain.downstream_length == int(lengths.get('L_d', 128))
    assert segment == int(lengths.get('L', max(136, history + 8)))
    assert made.model.tower.max_positions >= max(segment, history + 2)
    positions = made.pretrain.batch_segments * segment
    assert positions == pytest.approx(32 * 136, rel=0.07)  # whole segments


def test_the_equal_compute_is_that_of_pretraining_and_fine_tuning():
  """Positions through the tower, counted one step after the other."""
  experiment, requests = toy.EXPERIMENT, 400
  pretrain, finetune = experiment.pretrain, experiment.finetune
  counted = sum(pretrain.segment_length for _ in range(pretrain.steps) for _ in range(pretrain.batch_segments))
  an_epoch = sum(finetune.history_length + finetune.candidates for _ in range(requests))
  epochs = equal_compute_epochs(experiment, requests)
  assert epochs * an_epoch == pytest.approx(counted + finetune.epochs * an_epoch, abs=0.005 * an_epoch)
  doubled = replace(experiment, pretrain=replace(pretrain, steps=2 * pretrain.steps))
  assert equal_compute_epochs(doubled, requests) > epochs
  with pytest.raises(UserError, match='no training requests'):
    equal_compute_epochs(experiment, 0)
