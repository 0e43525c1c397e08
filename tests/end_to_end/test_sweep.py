"""A whole sweep from the command line: killed, resumed, with a run that fails, which is then run again alone."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pinfm_jax.cli import main
from pinfm_jax.evaluate.metrics import auc
from pinfm_jax.evaluate.ranking import RankingPredictions
from pinfm_jax.run import only_run

TESTS = Path(__file__).resolve().parent.parent
ARMS = """
from pinfm_jax.config import Arm
about = 'What the steps are worth.'
baseline = 'none'
arms = (
  Arm('none', {'ranker.sequence': 'none'}),
  Arm('all', {}, '+2.91 %'),
  Arm('half', {'pretrain.steps': 20}),
  Arm('half without tie', {'pretrain.steps': 20, 'finetune.tie_weight': 0.0}),
)
"""
TOWERS, RANKERS = 2, 4


@dataclass(frozen=True)
class Swept:
  """A sweep that was killed while it trained, then ended with a run that failed."""

  command: list[str]
  workdir: Path
  output: str


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
  root = tmp_path_factory.mktemp('sweep')
  (root / 'launch.py').write_text('from toy import EXPERIMENT as experiment\n')
  (root / 'steps.py').write_text(ARMS)
  workdir = root / 'work'
  command = ['sweep', str(root / 'launch.py'), '--arms', str(root / 'steps.py'), '--workdir', str(workdir)]
  command += ['--set', 'pretrain.steps=40', 'pretrain.checkpoint_every=5', 'finetune.epochs=0.15']
  _kill_while_it_pretrains(command, workdir)
  in_the_way = workdir / 'seed0' / 'ranker_half_without_tie' / 'checkpoints'
  in_the_way.parent.mkdir(parents=True)
  in_the_way.write_text('no folder')  # so that this run cannot write its checkpoints
  process = _start(command)
  output = process.communicate(timeout=600)[0]
  assert process.returncode == 1, output
  in_the_way.unlink()
  return Swept(command, workdir, output)


def _start(command):
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(TESTS.parent), str(TESTS)])}
  code = 'import sys; from pinfm_jax.cli import main; sys.exit(main(sys.argv[1:]))'
  return subprocess.Popen(
    [sys.executable, '-c', code, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def _kill_while_it_pretrains(command, workdir):
  process, deadline = _start(command), time.monotonic() + 300
  metrics = workdir / 'seed0' / 'pretrain' / 'metrics.jsonl'
  while not (metrics.parent / 'checkpoints' / '5').exists():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.communicate(timeout=60)
  before, still = metrics.read_text(), 0
  while still < 10:  # the run that it had started ends by itself
    time.sleep(0.1)
    still = still + 1 if metrics.read_text() == before else 0
    before = metrics.read_text()
  assert not (workdir / 'seed0' / 'pretrain' / 'results.json').exists()


def _rows(workdir):
  with (workdir / 'sweeps' / 'steps_validation' / 'runs.csv').open(newline='') as file:
    return list(csv.DictReader(file))


def _training(workdir):
  """Files of the runs that a further training would touch."""
  files = workdir.glob('seed*/*/metrics.jsonl')
  return {path.parent.name: path.stat().st_mtime_ns for path in files}


@pytest.mark.slow
def test_every_run_has_a_row_and_a_tower_is_trained_once(swept):
  rows = _rows(swept.workdir)
  assert [row['kind'] for row in rows] == ['tower'] * TOWERS + ['ranker'] * RANKERS
  assert [row['status'] for row in rows] == ['finished'] * (TOWERS + RANKERS - 1) + ['failed']
  assert len(list((swept.workdir / 'seed0').glob('pretrain*'))) == TOWERS
  assert swept.output.count('start pretraining') == TOWERS
  assert f'1 seed(s): {TOWERS + RANKERS} runs, of which 0 have finished' in swept.output
  ranker = next(row for row in rows if row['arm'] == 'half')
  assert ranker['settings'] == 'pretrain.steps=20'
  assert ranker['seed'] == '0'
  assert float(ranker['seconds']) > 0
  predictions = RankingPredictions.load(swept.workdir / ranker['directory'] / 'predictions.npz')
  place = predictions.label_names.index('save')
  expected = auc(predictions.labels_MT[:, place], predictions.scores_MT[:, place])
  assert float(ranker['save/auc']) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_failed_run_is_told_and_left_out(swept):
  assert 'half without tie, seed 0: FAILED after' in swept.output
  log = swept.workdir / 'sweeps' / 'steps_validation' / 'logs' / 'seed0_ranker_half_without_tie.log'
  assert str(log) in swept.output
  last = log.read_text().splitlines()[-1]
  assert last in swept.output
  assert 'left out of the tables until all their seeds are there: half without tie' in swept.output


@pytest.mark.slow
def test_a_killed_run_went_on_from_its_checkpoint(swept):
  text = (swept.workdir / 'seed0' / 'pretrain' / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert [line['step'] for line in lines] == list(range(1, 41))
  times = [line['time'] for line in lines]
  assert max(b - a for a, b in zip(times, times[1:], strict=False)) > 1  # the second process's start lies between


@pytest.mark.slow
def test_another_run_in_the_workdir_is_refused(swept, capsys):
  with only_run(swept.workdir):
    assert main(swept.command) == 2
  assert 'another run is working in' in capsys.readouterr().err


@pytest.mark.slow
def test_the_next_call_runs_the_failed_one_alone(swept, capsys):
  before = _training(swept.workdir)
  assert main(swept.command) == 0
  output, after = capsys.readouterr().out, _training(swept.workdir)
  assert 'to do: 0 pretrainings, 1 rankers' in output
  assert output.count('start ') == 1
  assert set(after) - set(before) == {'ranker_half_without_tie'}
  assert {name: after[name] for name in before} == before
  assert {row['status'] for row in _rows(swept.workdir)} == {'finished'}
  assert all(row['seconds'] for row in _rows(swept.workdir))  # those of the earlier calls are kept
  _check_results(swept.workdir / 'sweeps' / 'steps_validation', output)
  assert main(swept.command) == 0
  assert 'to do: 0 pretrainings, 0 rankers' in capsys.readouterr().out


def _check_results(directory, output):
  page = (directory / 'results.md').read_text()
  for text in (page, output):
    for words in ('measured on the validation split (the test split was not read)', 'What the steps are worth.',
                  'half without tie', '+2.91 %', 'pretrain.steps=20'):  # fmt: skip
      assert words in text
  assert 'Not complete' not in page
  results = json.loads((directory / 'results.json').read_text())
  arms = ('none', 'all', 'half', 'half without tie')
  assert all(f'{arm}/save/hit@3/mean' in results for arm in arms)
  assert all(f'{arm}/lift/save/auc/low' in results for arm in arms[1:])
  assert 'tower/pretrain.steps=20/hr@5/mean' in results


@pytest.mark.slow
def test_runs_are_shared_with_pinfm_run(swept, capsys):
  """The sweep's 'none' and 'all' have the settings of the launch file's arms, under other names."""
  launch, settings = swept.command[1], swept.command[swept.command.index('--set') :]
  before = _training(swept.workdir)
  command = ['run', launch, '--workdir', str(swept.workdir), '--stages', 'prepare,pretrain,finetune', *settings]
  assert main([*command, 'evaluate.split=validation']) == 0
  assert capsys.readouterr().out.count('finished earlier') == 3
  assert _training(swept.workdir) == before


@pytest.mark.slow
def test_a_ranker_is_trained_once_and_measured_on_both_splits(swept):
  before = _training(swept.workdir)
  assert main([*swept.command, '--split', 'test', '--only', 'all']) == 0
  assert _training(swept.workdir) == before
  folder = swept.workdir / 'seed0' / 'ranker_with_pinfm'
  parts = [RankingPredictions.load(folder / split / 'predictions.npz').request_M for split in ('test', 'validation')]
  assert set(parts[0]).isdisjoint(parts[1])


@pytest.mark.slow
def test_other_settings_in_the_same_workdir_are_refused(swept, capsys):
  assert main([*swept.command, 'finetune.update.learning_rate=0.5']) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert 'finetune.update.learning_rate=0.003, now it is 0.5' in line
