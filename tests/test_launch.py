"""Launch files: what is loaded, what is refused, and that the named experiments are what they were."""

import importlib.util
import json
from pathlib import Path

import pytest
import toy

from pinfm_jax.errors import UserError
from pinfm_jax.launch import load_experiment, saved_experiment
from pinfm_jax.overrides import to_dict
from pinfm_jax.workdir import write_json

GOLDEN = Path(__file__).resolve().parent / 'golden'
EXPERIMENTS = GOLDEN.parent.parent / 'experiments'
HEAD = 'from pinfm_jax.config import Arm, Experiment\n'


def _launch(tmp_path, text):
  path = tmp_path / 'launch.py'
  path.write_text(HEAD + text)
  return path


def _golden_update():
  spec = importlib.util.spec_from_file_location('golden_update', GOLDEN / 'update.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


LAUNCH_FILES = {_golden_update().name(path): path for path in _golden_update().launch_files()}


def test_a_launch_file_is_loaded_and_overridden(tmp_path):
  path = _launch(tmp_path, "experiment = Experiment(name='mine', seeds=(1, 2))")
  assert load_experiment(path).seeds == (1, 2)
  changed = load_experiment(str(path), {'pretrain.steps': '7', 'seeds': '5'})
  assert (changed.pretrain.steps, changed.seeds) == (7, (5,))


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match=r'nothing\.py does not exist; give a launch file'):
    load_experiment(tmp_path / 'nothing.py')
  with pytest.raises(UserError, match='is a directory'):
    load_experiment(tmp_path)


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('1 / 0', 'ZeroDivisionError: division by zero'),
    ('def broken(', 'SyntaxError'),
    ('import no_such_module', "No module named 'no_such_module'"),
    ("experiment = Experiment(nam='x')", "unexpected keyword argument 'nam'"),
  ],
)
def test_an_error_in_the_file_is_one_line(tmp_path, text, words):
  path = _launch(tmp_path, text)
  with pytest.raises(UserError) as error:
    load_experiment(path)
  assert str(error.value).startswith(f'{path} failed: ')
  assert words in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('text', ['x = 1', "experiment = 'quickstart'", 'experiment = Experiment'])
def test_a_file_without_an_experiment_is_refused(tmp_path, text):
  with pytest.raises(UserError, match='defines no `experiment`'):
    load_experiment(_launch(tmp_path, text))


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ("baseline='nobody'", "baseline is 'nobody'; expected one of the arms: without PinFM, with PinFM"),
    ("arms=(Arm('a b'), Arm('A.B')), baseline='a b'", 'arms need names that differ'),
    ("arms=(Arm('a'), Arm('a')), baseline='a'", 'arms need names that differ'),
    ("arms=(Arm('a', {'ranker.sequenc': 'none'}),), baseline='a'", "nearest is 'sequence'"),
    ("arms=(Arm('a', {'ranker.mlp': 'wide'}),), baseline='a'", "'ranker.mlp' got 'wide'"),
    ('seeds=()', 'expected one or more distinct numbers'),
    ('seeds=(0, 0)', 'expected one or more distinct numbers'),
  ],
)  # fmt: skip
def test_arms_and_seeds_are_checked_before_anything_runs(tmp_path, fields, words):
  with pytest.raises(UserError, match=words):
    load_experiment(_launch(tmp_path, f"experiment = Experiment(name='x', {fields})"))


def test_an_override_can_break_the_arms(tmp_path):
  path = _launch(tmp_path, "experiment = Experiment(name='x')")
  with pytest.raises(UserError, match="baseline is 'b'"):
    load_experiment(path, {'baseline': 'b'})


def test_the_experiment_of_a_run_is_read_back(tmp_path):
  with pytest.raises(UserError, match=r'holds no run \(no experiment\.json\)'):
    saved_experiment(tmp_path)
  write_json(tmp_path / 'experiment.json', to_dict(toy.EXPERIMENT))
  assert saved_experiment(tmp_path) == toy.EXPERIMENT
  for text in ('{', '[]', '{}', '{"name": "x", "stepz": 1}', '{"name": "x", "pretrain": {"steps": "a"}}'):
    (tmp_path / 'experiment.json').write_text(text)
    with pytest.raises(UserError):
      saved_experiment(tmp_path)


def test_every_launch_file_has_a_golden_file_and_the_other_way_round():
  assert set(LAUNCH_FILES) == {p.stem for p in GOLDEN.glob('*.json')}


@pytest.mark.parametrize('name', sorted(LAUNCH_FILES))
def test_a_named_experiment_is_what_it_was(name):
  found = json.loads(_golden_update().settings(LAUNCH_FILES[name]))
  expected = json.loads((GOLDEN / f'{name}.json').read_text(encoding='utf-8'))
  hint = f'the settings of {LAUNCH_FILES[name].name} changed; if that is meant: python tests/golden/update.py'
  assert found == expected, hint


@pytest.mark.parametrize(
  'path', sorted([*EXPERIMENTS.glob('*.py'), *EXPERIMENTS.glob('sequential/*.py')]), ids=lambda path: path.stem
)
def test_a_named_experiment_says_what_it_does(path):
  name, text = path.relative_to(EXPERIMENTS).with_suffix(''), path.read_text(encoding='utf-8')
  for word in ('Command:', 'Hardware:', 'Time:', 'Expected:'):
    assert word in text.split('"""')[1], f'the docstring of experiments/{name}.py states no {word}'
  command = 'pinfm run' if path in LAUNCH_FILES.values() else 'python'
  command = '--arms' if '\nbaseline = ' in text else command
  if path in _golden_update().study_files():
    command = 'pinfm clicks' if '\nclicks = ' in text else '--blocks'
  assert f'{command} experiments/{name}.py' in text
