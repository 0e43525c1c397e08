"""A whole study from the command line: a run that fails, its repetition, the other split, costs that were measured."""

import json
import os
from pathlib import Path

import pytest

from pinfm_jax.cli import main
from pinfm_jax.evaluate.metrics import auc
from pinfm_jax.evaluate.ranking import RankingPredictions

TESTS = Path(__file__).resolve().parent.parent
BLOCKS = """
from pinfm_jax.config import Arm
about = 'Crossing or not.'
baseline = 'cross'
settings = {'ranker.sequence': 'none', 'finetune.epochs': 0.15}
tune = {'finetune.update.learning_rate': (1e-3, 3e-3)}
arms = (Arm('none', {'ranker.interaction': 'none'}), Arm('cross', {'ranker.interaction': 'dcnv2'}))
quick = ('none',)
"""


@pytest.fixture(scope='module')
def studied(tmp_path_factory):
  """The command, its workdir, and the exit code of a first call in which one run cannot write."""
  root = tmp_path_factory.mktemp('study')
  (root / 'launch.py').write_text('from toy import EXPERIMENT as experiment\n')
  (root / 'blocks.py').write_text(BLOCKS)
  workdir = root / 'work'
  command = ['study', str(root / 'launch.py'), '--blocks', str(root / 'blocks.py'), '--workdir', str(workdir)]
  command += ['--rounds', '2', '--metric', 'auc', '--max-latency', '+1000%', '--max-memory', '+1000%']
  in_the_way = workdir / 'studies/blocks/seed0/ranker_none_finetune_update_learning_rate_0_003/checkpoints'
  in_the_way.parent.mkdir(parents=True)
  in_the_way.write_text('no folder')
  before = os.environ.get('PYTHONPATH')
  os.environ['PYTHONPATH'] = str(TESTS)
  with pytest.raises(SystemExit) as stopped:
    main(command)
  assert stopped.value.code == 1
  in_the_way.unlink()
  yield command, workdir / 'studies' / 'blocks'
  os.environ.pop('PYTHONPATH') if before is None else os.environ.update(PYTHONPATH=before)


def _trained(directory):
  return {path: path.stat().st_mtime_ns for path in directory.glob('seed*/*/metrics.jsonl')}


@pytest.mark.slow
def test_a_study_goes_on_and_ends(studied, capsys):
  command, directory = studied
  before = _trained(directory)
  assert len(before) == 3
  assert main(command) == 0
  output, after = capsys.readouterr().out, _trained(directory)
  assert 'tuning: 4 runs, of which 3 have finished' in output
  assert {path: after[path] for path in before} == before
  assert len(after) == 4
  assert 'blocks: 2 runs, of which 2 have finished' in output  # the chosen trials are the runs of the first seed
  _check_tuning(directory)
  _check_results(json.loads((directory / 'validation' / 'results.json').read_text()), directory)
  assert (
    'The test split was not read. Settings were chosen on this split too.'
    in (directory / 'validation' / 'results.md').read_text()
  )
  costs = (directory / 'costs.json').stat().st_mtime_ns
  assert main(command) == 0
  output = capsys.readouterr().out
  assert 'start ' not in output
  assert 'measuring' not in output
  assert (directory / 'costs.json').stat().st_mtime_ns == costs
  assert main([*command, '--split', 'test']) == 0
  assert _trained(directory) == after
  assert 'measured on the test split' in (directory / 'test' / 'results.md').read_text()


def _check_tuning(directory):
  tuning = json.loads((directory / 'tuning.json').read_text())
  assert [len(tried) for tried in tuning['blocks'].values()] == [2, 2]
  for trial, rate in zip(tuning['blocks']['none'], ('0_001', '0_003'), strict=True):
    folder = directory / f'seed0/ranker_none_finetune_update_learning_rate_{rate}/validation'
    predictions = RankingPredictions.load(folder / 'predictions.npz')
    place = predictions.label_names.index('save')
    assert trial['value'] == auc(predictions.labels_MT[:, place], predictions.scores_MT[:, place])


def _check_results(results, directory):
  cross, none = results['blocks']['cross'], results['blocks']['none']
  assert none['block_parameters'] == 0
  # The cross layer has a square kernel and a bias; behind it the MLP of 16 reads [x0, crossed], without it x0 alone.
  width = round((-1 + (1 + 4 * cross['block_parameters']) ** 0.5) / 2)
  assert cross['block_parameters'] == width**2 + width
  assert cross['parameters'] - none['parameters'] == cross['block_parameters'] + 16 * width
  assert cross['memory_bytes'] > none['memory_bytes'] > 12 * none['parameters']  # weights and two moments
  assert cross['latency_ratio']['median'] == 1
  assert none['latency_ratio']['least'] > 0
  best = max(results['blocks'], key=lambda name: results['blocks'][name]['seeds']['save/auc'][0])
  assert results['recommended'] == best
  assert (directory / 'validation' / 'latency.svg').read_text().startswith('<svg')


@pytest.mark.slow
def test_the_quick_form_tunes_nothing(studied, capsys):
  command, directory = studied
  assert main([*command, '--quick', '--name', 'quick']) == 0
  output = capsys.readouterr().out
  assert 'tuning' not in output
  assert 'blocks: 2 runs, of which 0 have finished' in output
  page = (directory.parent / 'quick' / 'validation' / 'results.md').read_text()
  assert 'No block was tuned' in page
  assert 'from one seed' in page or 'It is the baseline' in page
