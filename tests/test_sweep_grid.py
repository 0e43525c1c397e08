"""Grids, files of arms, and what a sweep makes of them."""

from dataclasses import replace

import pytest
import toy

from pinfm_jax.cli import main
from pinfm_jax.config import Arm
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.sweep.arms_file import DataFacts, load_arms
from pinfm_jax.sweep.grid import grid_arms, parse_grid, settings_text
from pinfm_jax.sweep.sweep import Sweep, sweep_experiment

FACTS = DataFacts(100, False, ('click', 'save'), ('click', 'save'))
HEAD = 'from pinfm_jax.config import Arm\n'


def _values(*words):
  return [axis.values for axis in parse_grid(words, toy.EXPERIMENT)]


@pytest.mark.parametrize(
  ('word', 'values'),
  [
    ('ranker.cross_layers=1,2', (1, 2)),
    ('ranker.cross_layers= 1 , 2 ', (1, 2)),
    ('finetune.update.learning_rate=1e-3,0.01', (1e-3, 0.01)),
    ('ranker.mlp=(64,32),(128,)', ((64, 32), (128,))),
    ("finetune.update.frozen=(),('tower','tables')", ((), ('tower', 'tables'))),
    ('ranker.mlp=[64, 32],16', ((64, 32), (16,))),
    ('pretrain.positive_actions=(click,save),(save),()', (('click', 'save'), ('save',), ())),
    ('ranker.learnable_token=true,false', (True, False)),
    ('ranker.fusion=early,mean', ('early', 'mean')),
    ("finetune.start_from='',bundles/a", ('', 'bundles/a')),
    ("finetune.label_weights={'save': 2, 'click': 1},{}", ({'save': 2.0, 'click': 1.0}, {})),
    ('finetune.label_weights.save=1,2', (1.0, 2.0)),
  ],
)
def test_values_are_read_as_the_settings_type(word, values):
  assert _values(word) == [values]


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['ranker.crosslayers=1,2'], "nearest is 'cross_layers'"),
    (['rankr.cross_layers=1'], "nearest is 'ranker'"),
    (['ranker.cross_layers=1,two'], "'ranker.cross_layers' got 'two'; expected a value of type int"),
    (['ranker.mlp=(64,wide)'], "got 'wide'"),
    (['ranker.cross_layers='], 'empty value'),
    (['ranker.cross_layers=1,,2'], 'empty value'),
    (['ranker.cross_layers=1,'], 'empty value'),
    (['ranker.cross_layers'], 'expected KEY=VALUE'),
    (['ranker.mlp=(64,32'], r'\) is missing'),
    (['ranker.cross_layers=1,2,1'], 'got 1 twice'),
    (['finetune.update.learning_rate=0.001,1e-3'], 'got 1e-3 twice'),
    (['ranker.dropout=0.1', 'ranker.dropout=0.2'], 'got ranker.dropout twice'),
    (['data.test_days=1,2'], 'data.test_days, but all runs of a sweep share data'),
    (['evaluate.split=test'], 'share data, evaluation'),
  ],
)
def test_bad_grids_end_in_one_line(words, message):
  with pytest.raises(UserError, match=message) as error:
    parse_grid(words, toy.EXPERIMENT)
  assert '\n' not in str(error.value)


def test_every_combination_is_an_arm_with_a_folder_of_its_own():
  axes = parse_grid(['ranker.mlp=(8,),(16,8)', 'ranker.cross_layers=1,2,3'], toy.EXPERIMENT)
  arms = grid_arms([Arm('', {'ranker.dropout': 0.5, 'ranker.cross_layers': 9}, 'x')], axes)
  assert len(arms) == 6
  assert len({arm.directory for arm in arms}) == 6
  made = {(ranker.mlp, ranker.cross_layers, ranker.dropout) for ranker in _rankers(arms)}
  assert made == {(mlp, layers, 0.5) for mlp in ((8,), (16, 8)) for layers in (1, 2, 3)}
  assert arms[0].name == 'ranker.mlp=(8,) ranker.cross_layers=1'
  assert arms[0].paper == 'x'
  named = grid_arms([Arm('a'), Arm('b')], axes[:1])
  assert [arm.name for arm in named] == [f'{n} ranker.mlp={t}' for n in 'ab' for t in ('(8,)', '(16,8)')]
  assert grid_arms([Arm('a')], ()) == (Arm('a'),)


def _rankers(arms):
  return [apply_overrides(toy.EXPERIMENT, arm.overrides).ranker for arm in arms]


def test_the_folder_of_a_long_name_fits_a_file_system():
  long = ' '.join(f'finetune.update.some_learning_rate_{i}=0.001' for i in range(9))
  folders = {Arm(name).directory for name in (long, long + '1', long + '2')}
  assert len(folders) == 3
  assert max(map(len, folders)) < 100


def test_settings_are_written_as_the_command_line_takes_them():
  text = settings_text({'ranker.mlp': (64, 32), 'finetune.epochs': 2.0})
  assert text == 'ranker.mlp=(64,32) finetune.epochs=2.0'
  assert _values(*text.split(' ')) == [((64, 32),), (2.0,)]


def _file(tmp_path, text):
  path = tmp_path / 'arms.py'
  path.write_text(HEAD + text)
  return path


@pytest.mark.parametrize(
  'text',
  [
    "arms = (Arm('a'), Arm('b'))",
    "def arms(experiment):\n  return Arm('a'), Arm(experiment.name[:0] + 'b')",
    "def arms(experiment, facts):\n  return Arm('a'), Arm('b' if facts.requests == 100 else 'c')",
  ],
)
def test_arms_are_a_tuple_or_a_function(tmp_path, text):
  file = load_arms(_file(tmp_path, text + "\nbaseline = 'a'\nabout = 'why'\nchallenger = 'b'"))
  assert [arm.name for arm in file.arms(toy.EXPERIMENT, FACTS)] == ['a', 'b']
  assert (file.baseline, file.about, file.challenger) == ('a', 'why', 'b')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('x = 1', 'defines no `arms`'),
    ('arms = ()', '0 values; expected a tuple of one or more Arm'),
    ("arms = ('a', 'b')", '2 values; expected a tuple'),
    ("arms = Arm('a')", 'of type Arm; expected a tuple'),
    ('1 / 0', 'ZeroDivisionError'),
    ('def arms(a, b, c):\n  return ()', 'takes 3 arguments'),
    ("arms = (Arm('a'),)\nabout = 3", '`about` is of type int; expected a text'),
  ],
)
def test_a_wrong_file_of_arms_ends_in_one_line(tmp_path, text, message):
  with pytest.raises(UserError, match=message) as error:
    load_arms(_file(tmp_path, text))
  assert '\n' not in str(error.value)


def test_a_function_that_fails_names_its_file(tmp_path):
  file = load_arms(_file(tmp_path, 'def arms(experiment):\n  return 1 / 0'))
  with pytest.raises(UserError, match=r'arms\.py: arms\(\) failed: ZeroDivisionError'):
    file.arms(toy.EXPERIMENT, FACTS)
  with pytest.raises(UserError, match='which is no file'):
    load_arms(tmp_path / 'nothing.py')


def _experiment(tmp_path, text='', grid=(), only=(), **changes):
  file = load_arms(_file(tmp_path, text)) if text else None
  experiment = replace(toy.EXPERIMENT, **changes)
  return sweep_experiment(Sweep(experiment, 'x', file, parse_grid(grid, toy.EXPERIMENT), tuple(only)), FACTS)


def test_a_grid_keeps_the_launch_files_baseline_beside(tmp_path):
  made = _experiment(tmp_path, grid=['ranker.mlp=8,16'])
  assert [arm.name for arm in made.arms] == ['without PinFM', 'ranker.mlp=8', 'ranker.mlp=16']
  assert made.baseline == 'without PinFM'
  towers = _experiment(tmp_path, grid=['pretrain.steps=8,16'], arms=())
  assert [arm.name for arm in towers.arms] == ['pretrain.steps=8', 'pretrain.steps=16']
  assert towers.baseline == 'pretrain.steps=8'


def test_a_grid_with_arms_runs_each_arm_at_each_point(tmp_path):
  text = "arms = (Arm('a'), Arm('b'))\nbaseline = 'a'\nchallenger = 'b'"
  made = _experiment(tmp_path, text, ['ranker.mlp=8,16'])
  assert [arm.name for arm in made.arms] == ['a', *(f'{n} ranker.mlp={v}' for n in 'ab' for v in (8, 16))]
  assert (made.baseline, made.challenger) == ('a', '')  # no point of the grid is the challenger


def test_only_some_arms_run_and_the_baseline(tmp_path):
  text = "arms = (Arm('a'), Arm('b'), Arm('c'))\nbaseline = 'a'\nchallenger = 'b'"
  made = _experiment(tmp_path, text, only=['c'])
  assert [arm.name for arm in made.arms] == ['a', 'c']
  assert made.challenger == ''
  assert _experiment(tmp_path, text).challenger == 'b'
  with pytest.raises(UserError, match="--only got 'd'; the arms are: a, b, c"):
    _experiment(tmp_path, text, only=['d'])


def test_the_baseline_is_one_of_the_arms(tmp_path):
  with pytest.raises(UserError, match="baseline is 'without PinFM'; expected one of the arms: a"):
    _experiment(tmp_path, "arms = (Arm('a'),)")
  with pytest.raises(UserError, match="challenger is 'b'; expected one of the arms: a"):
    _experiment(tmp_path, "arms = (Arm('a'),)\nbaseline = 'a'\nchallenger = 'b'")


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    ([], 'nothing to compare'),
    (['--grid', 'ranker.mlp=8', '--seeds', '0'], '--seeds is 0'),
    (['--grid', 'ranker.mlp=8', '--jobs', '0'], '--jobs is 0'),
    (['--grid', 'ranker.mlp=8', '--set', 'ranker.mlp=8'], 'given by --set and by --grid'),
    (['--grid', 'ranker.mlp=8', '--set', 'evaluate.split=test'], 'a sweep has an option for it: --split'),
    (['--grid', 'ranker.mlp=8', '--name', 'a/b'], "--name got 'a/b'"),
    (['--grid', 'ranker.ml=8'], "nearest is 'mlp'"),
  ],
)
def test_a_wrong_command_is_refused_before_anything_is_written(tmp_path, capsys, words, message):
  launch = tmp_path / 'launch.py'
  launch.write_text('from toy import EXPERIMENT as experiment\n')
  assert main(['sweep', str(launch), '--workdir', str(tmp_path / 'work'), *words]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line
  assert not (tmp_path / 'work').exists()
