"""A whole study from the command line: runs that fail, their repetition, costs that stay."""

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
"""


@pytest.fixture(scope='module')
def studied(tmp_path_factory):
  """The command and its directory, after a first call in which the baseline's runs cannot write."""
  root = tmp_path_factory.mktemp('study')
  (root / 'launch.py').write_text('from toy import EXPERIMENT as experiment\n')
  (root / 'blocks.py').write_text(BLOCKS)
  workdir = root / 'work'
  command = ['study', str(root / 'launch.py'), '--blocks', str(root / 'blocks.py'), '--workdir', str(workdir)]
  command += ['--rounds', '2', '--memory-requests', '64', '--max-latency', '+1000%', '--max-memory', '+1000%']
  in_the_way = [
    workdir / f'studies/blocks/seed0/ranker_cross_finetune_update_learning_rate_{rate}/checkpoints'
    for rate in ('0_001', '0_003')
  ]
  for path in in_the_way:
    path.parent.mkdir(parents=True)
    path.write_text('no folder')
  before = os.environ.get('PYTHONPATH')
  os.environ['PYTHONPATH'] = str(TESTS)
  assert main(command) == 2
  for path in in_the_way:
    path.unlink()
  yield command, workdir / 'studies' / 'blocks'
  os.environ.pop('PYTHONPATH') if before is None else os.environ.update(PYTHONPATH=before)


def _trained(directory):
  return {path: path.stat().st_mtime_ns for path in directory.glob('seed*/*/metrics.jsonl')}


@pytest.mark.slow
def test_a_study_goes_on_and_ends(studied, capsys):
  command, directory = studied
  before = _trained(directory)
  assert len(before) == 2
  assert not (directory / 'costs.json').exists()
  assert main(command) == 0
  output, after = capsys.readouterr().out, _trained(directory)
  assert 'tuning: 4 runs, of which 2 have finished' in output
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
  labels, candidates = 4 * 64 * 10, 16 * 4 * 64 * 10  # of the batch, and what the MLP keeps of it
  assert none['memory_bytes'] > labels + candidates
  assert results['memory_requests'] == 64
  assert cross['latency_ratio']['median'] == 1
  assert none['latency_ratio']['least'] > 0
  best = max(results['blocks'], key=lambda name: results['blocks'][name]['seeds']['save/auc'][0])
  assert results['recommended'] == best
  assert (directory / 'validation' / 'latency.svg').read_text().startswith('<svg')


@pytest.mark.slow
def test_results_of_other_blocks_are_not_written_over(studied, capsys):
  command, directory = studied
  blocks = Path(command[command.index('--blocks') + 1])
  blocks.write_text(BLOCKS.replace("Arm('none'", "Arm('nothing'"))
  assert main(command) == 2
  assert 'holds the results of other blocks too (none); give this study a --name' in capsys.readouterr().err
  blocks.write_text(BLOCKS)
