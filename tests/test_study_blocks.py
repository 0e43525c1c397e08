"""Files of blocks: the named one is what it was, equal budgets, and what is refused; tuning and the study's tables."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from pinfm_jax.checks import check_experiment
from pinfm_jax.cli import main
from pinfm_jax.config import Arm, Experiment
from pinfm_jax.errors import UserError
from pinfm_jax.launch import load_experiment
from pinfm_jax.model.interaction.settings import INTERACTIONS
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.study import study as study_module
from pinfm_jax.study.blocks_file import default_blocks, load_blocks
from pinfm_jax.study.tuning import Trial, best_trials, tuning_table
from pinfm_jax.sweep.arms_file import DataFacts

GOLDEN = Path(__file__).resolve().parent / 'golden'
EXPERIMENTS = GOLDEN.parent.parent / 'experiments'
FACTS = DataFacts(0, False, (), ())
HEAD = 'from pinfm_jax.config import Arm\nbaseline = "a"\narms = (Arm("a"), Arm("b"))\n'


@pytest.fixture(scope='module')
def update():
  spec = importlib.util.spec_from_file_location('golden_update', GOLDEN / 'update.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='module')
def homefeed():
  return load_blocks(EXPERIMENTS / 'homefeed_interactions.py')


def _file(tmp_path, text):
  path = tmp_path / 'blocks.py'
  path.write_text(HEAD + text)
  return path


@pytest.mark.parametrize('name', sorted(path.stem for path in (GOLDEN / 'studies').glob('*.json')))
def test_a_study_is_what_it_was(update, name):
  found = json.loads(update.study(EXPERIMENTS / f'{name}.py'))
  expected = json.loads((GOLDEN / 'studies' / f'{name}.json').read_text(encoding='utf-8'))
  assert found == expected, f'experiments/{name}.py changed; if meant: python tests/golden/update.py'


def test_every_study_has_a_golden_file(update):
  assert {path.stem for path in update.study_files()} == {path.stem for path in (GOLDEN / 'studies').glob('*.json')}


@pytest.mark.parametrize('launch', ['kuairand', 'quickstart', 'globo'])
def test_every_block_may_run(homefeed, launch):
  experiment = load_experiment(EXPERIMENTS / f'{launch}.py', homefeed.settings)
  blocks = homefeed.blocks(experiment, FACTS)
  candidates = homefeed.candidates(blocks)
  arms = tuple(arm for tried in candidates.values() for arm in tried)
  check_experiment(replace(experiment, arms=arms, baseline=arms[0].name))
  assert {len(tried) for tried in candidates.values()} == {6}
  for arm in arms:  # what is tried is seen in the settings, and blocks differ in nothing else
    own = apply_overrides(experiment, arm.overrides)
    assert own.ranker.sequence == 'none'
    assert own.data == experiment.data
    assert replace(own.finetune, update=experiment.finetune.update) == experiment.finetune


def test_the_papers_experiments_come_first_and_every_kind_is_there(homefeed):
  blocks = homefeed.blocks(Experiment('x'), FACTS)
  assert [block.name for block in blocks[:3]] == ['DCNv2, 4 layers', 'DCNv2, 2 layers', 'DCNv2, 8 layers']
  kinds = {block.overrides['ranker.interaction'] for block in blocks}
  assert kinds == set(INTERACTIONS) - {'none'}
  final = apply_overrides(Experiment('x'), {**homefeed.settings, **blocks[9].overrides}).ranker
  assert (final.interaction, final.cross_layers, final.block.blocks, final.block.ratio) == ('final', 4, 3, 2.0)
  assert not final.block.concat


def test_the_settings_of_the_command_line_win(homefeed, tmp_path):
  experiment = load_experiment(EXPERIMENTS / 'quickstart.py', {**homefeed.settings, 'ranker.mlp': (8,)})
  assert experiment.ranker.mlp == (8,)
  assert default_blocks(EXPERIMENTS / 'kuairand.py') == EXPERIMENTS / 'homefeed_interactions.py'


def test_a_block_is_tried_at_every_size_and_every_point(tmp_path):
  sizes = '{n: ({"ranker.block.rank": 1}, {"ranker.block.rank": 2}) for n in "ab"}'
  text = f'tune = {{"ranker.mlp": ((8,), (16, 8))}}\nsizes = {sizes}'
  file = load_blocks(_file(tmp_path, text))
  tried = file.candidates(file.blocks(Experiment('x'), FACTS))['b']
  assert [arm.overrides for arm in tried] == [
    {'ranker.block.rank': rank, 'ranker.mlp': mlp} for rank in (1, 2) for mlp in ((8,), (16, 8))
  ]
  assert tried[1].name == 'b ranker.block.rank=1 ranker.mlp=(16,8)'
  assert [len(arms) for arms in file.without_tuning().candidates([Arm('a'), Arm('b')]).values()] == [1, 1]


def test_unequal_budgets_are_refused(tmp_path):
  file = load_blocks(_file(tmp_path, 'sizes = {"a": ({"ranker.mlp": (8,)}, {"ranker.mlp": (4,)})}'))
  with pytest.raises(UserError, match="'a' would try 2 settings and 'b' 1; an equal budget"):
    file.candidates(file.blocks(Experiment('x'), FACTS))


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('baseline = "c"', "baseline is 'c'; expected one of: a, b"),
    ('arms = (Arm("a"), Arm("a"))', "two blocks are called 'a'"),
    ('sizes = {"c": ({},)}', "no block is called 'c'; the blocks of"),
    ('quick = ("c",)', "no block is called 'c'"),
  ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, text, words):
  file = load_blocks(_file(tmp_path, text))
  with pytest.raises(UserError, match=words):
    file.blocks(Experiment('x'), FACTS)


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('tune = 3', '`tune` is of type int; expected a mapping'),
    ('tune = {"ranker.mlp": 3}', "`tune` has ranker.mlp: 3; expected a tuple of one or more values"),
    ('tune = {"ranker.mlp": ()}', 'expected a tuple of one or more values'),
    ('sizes = {"a": {"ranker.mlp": (8,)}}', 'expected a tuple of one or more values'),
    ('sizes = {"a": ("ranker.mlp",)}', 'expected a tuple of settings by name'),
    ('quick = "a"', '`quick` is of type str; expected a tuple'),
    ('arms = ()', '`arms` is 0 values'),
    ('1 / 0', 'ZeroDivisionError'),
  ],
)  # fmt: skip
def test_files_of_another_form_are_refused(tmp_path, text, words):
  with pytest.raises(UserError, match=words):
    load_blocks(_file(tmp_path, text))


def test_only_some_blocks_keep_the_baseline_in_front(tmp_path):
  file = load_blocks(_file(tmp_path, 'arms = (Arm("b"), Arm("c"), Arm("a"))'))
  assert [arm.name for arm in file.blocks(Experiment('x'), FACTS, ('c',))] == ['a', 'c']
  with pytest.raises(UserError, match="no block is called 'd'"):
    file.blocks(Experiment('x'), FACTS, ('d',))


def test_the_best_trial_is_taken_and_the_table_says_so():
  trials = {'a': (Trial('a x', 'x', 0.5), Trial('a y', 'y', 0.7), Trial('a z', 'z', math.nan)),
            'b': (Trial('b', '', math.nan),)}  # fmt: skip
  assert {name: trial.arm for name, trial in best_trials(trials, 'auc').items()} == {'a': 'a y'}
  assert best_trials(trials, 'logloss')['a'].arm == 'a x'
  rows = tuning_table(trials, 'auc', 'save').rows
  assert rows == (
    ('a', 'x', '0.5000', ''),
    ('a', 'y', '0.7000', 'yes'),
    ('a', 'z', '–', ''),
    ('b', 'as listed', '–', ''),
  )


@pytest.mark.parametrize(
  ('words', 'only', 'seeds', 'tried'),
  [
    ([], (), (0, 1, 2), 6),
    (['--quick'], 'quick', (0,), 1),
    (['--quick', '--seeds', '2', '--only', 'FM'], ('FM',), (0, 1), 1),
    (['--tune', 'none'], (), (0, 1, 2), 1),
    (['--tune', 'finetune.epochs=1,2'], (), (0, 1, 2), 4),
    (['--quick', '--tune', 'finetune.epochs=1,2'], 'quick', (0,), 4),
  ],
)
def test_what_the_options_ask_for(homefeed, tmp_path, monkeypatch, words, only, seeds, tried):
  asked = []
  monkeypatch.setattr(study_module, 'run_study', lambda study, workdir: asked.append(study) or True)
  assert main(['study', str(EXPERIMENTS / 'kuairand.py'), '--split', 'test', '--max-memory=-5%', *words]) == 0
  (study,) = asked
  assert study.only == (homefeed.quick if only == 'quick' else only)
  assert study.experiment.seeds == seeds
  assert study.experiment.evaluate.split == 'test'
  assert study.experiment.ranker.sequence == 'none'
  assert study.name == 'homefeed_interactions' + '_quick' * ('--quick' in words)
  assert study.decision.limits.memory == -0.05
  blocks = study.file.blocks(study.experiment, FACTS, study.only)
  assert {len(arms) for arms in study.file.candidates(blocks).values()} == {tried}
  monkeypatch.setattr(study_module, 'run_study', lambda study, workdir: False)
  with pytest.raises(SystemExit, match='1'):
    main(['study', str(EXPERIMENTS / 'kuairand.py')])


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--blocks', 'nothing.py'], '--blocks got nothing.py, which is no file'),
    (['--seeds', '0'], '--seeds is 0'),
    (['--jobs', '0'], '--jobs is 0'),
    (['--rounds', '0'], '--rounds is 0; expected at least 1'),
    (['--max-memory', '5'], "--max-memory got '5'; expected a change such as +5%"),
    (['--memory-line', '0%'], "--memory-line got '0%'; expected a share"),
    (['--device-memory', 'big'], "--device-memory got 'big'"),
    (['--segments', 'few,many'], "--segments got 'few,many'"),
    (['--name', '../x'], "--name got '../x'"),
    (['--tune', 'ranker.nothing=1,2'], "unknown setting 'ranker.nothing'"),
    (['--set', 'ranker.nothing=1'], "unknown setting 'ranker.nothing'"),
  ],
)
def test_a_users_mistake_is_one_line(tmp_path, capsys, words, message):
  """Before anything is prepared."""
  command = ['study', str(EXPERIMENTS / 'quickstart.py'), '--workdir', str(tmp_path / 'work'), *words]
  assert main(command) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line
  assert not (tmp_path / 'work').exists()
