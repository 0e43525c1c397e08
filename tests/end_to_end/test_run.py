"""A whole run from the command line: every stage, running it again, exporting, scoring, and what survives a kill."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from toy import load_arrays

from pinfm_jax.cli import main
from pinfm_jax.evaluate.ranking import RankingPredictions
from pinfm_jax.train import loop

TESTS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Finished:
  """A run that went through every stage."""

  launch: Path
  workdir: Path
  output: str


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  root = tmp_path_factory.mktemp('run')
  launch, workdir, output = root / 'launch.py', root / 'work', io.StringIO()
  launch.write_text('"""The toy experiment."""\n\nfrom toy import EXPERIMENT as experiment\n')
  with contextlib.redirect_stdout(output):
    assert main(['run', str(launch), '--workdir', str(workdir)]) == 0
  return Finished(launch, workdir, output.getvalue())


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_results_hold_the_named_figures(finished):
  results = json.loads((finished.workdir / 'results.json').read_text())
  assert all(isinstance(value, float | int) for value in results.values())
  arms, labels, metrics = ('with', 'without'), ('click', 'save', 'hide'), ('auc', 'hit@3', 'logloss', 'per_user_auc')
  expected = [f'{arm} PinFM/{label}/{metric}/mean' for arm in arms for label in labels for metric in metrics]
  expected += [f'retrieval/{row}/{name}' for row in ('tower', 'popularity') for name in ('hr@5', 'ndcg@5', 'mrr')]
  expected += [f'{arm} PinFM/save/{bucket}/positives/mean' for arm in arms for bucket in ('seen', 'unseen')]
  expected += ['retrieval/users', 'retrieval/catalogue', 'retrieval/unseen_share']
  expected += [f'bundle/{storage}/save/{name}/change' for storage in ('float32', 'int4') for name in ('auc', 'hit@3')]
  assert [name for name in expected if name not in results] == []
  assert any(re.match(r'with PinFM/lift/save/auc', name) for name in results)
  for arm in ('with PinFM', 'without PinFM'):
    assert 0.3 < results[f'{arm}/click/auc/mean'] < 1
  assert results['ranking/seeds'] == 1


def test_every_arm_has_a_calibration_curve_of_the_main_label(finished):
  curves = json.loads((finished.workdir / 'reliability.json').read_text())
  assert curves['label'] == 'save'
  assert set(curves['arms']) == {'with PinFM', 'without PinFM'}
  rows = len(
    RankingPredictions.load(finished.workdir / 'seed0' / 'ranker_with_pinfm' / 'test' / 'predictions.npz').request_M
  )
  assert all(sum(count for *_, count in parts) == rows for parts in curves['arms'].values())
  assert '<h2>Calibration' in (finished.workdir / 'report.html').read_text()


def test_the_bundle_scores_what_the_evaluation_scored(finished):
  results = json.loads((finished.workdir / 'results.json').read_text())
  assert results['bundle/float32/max_difference'] <= 1e-5
  assert 0 < results['bundle/int4/max_difference'] < 0.1
  assert results['bundle/float32/save/auc/change'] == pytest.approx(0, abs=1e-4)


def test_the_figures_are_those_of_the_predictions(finished):
  from pinfm_jax.evaluate.metrics import auc

  results = json.loads((finished.workdir / 'results.json').read_text())
  for arm in ('with PinFM', 'without PinFM'):
    folder = 'ranker_' + arm.lower().replace(' ', '_')
    predictions = RankingPredictions.load(finished.workdir / 'seed0' / folder / 'test' / 'predictions.npz')
    place = predictions.label_names.index('save')
    expected = auc(predictions.labels_MT[:, place], predictions.scores_MT[:, place])
    assert results[f'{arm}/save/auc/mean'] == pytest.approx(expected, abs=1e-9)


def test_the_table_and_the_stages_are_printed(finished):
  for stage in ('prepare', 'pretrain', 'finetune', 'evaluate', 'export', 'report'):
    assert f'== {stage}\n' in finished.output
    assert re.search(rf'== {stage} took [\d:.]+', finished.output)
  for words in ('without PinFM', 'with PinFM', 'best attainable', 'HIT@3', 'AUC', 'popularity', 'simulated'):
    assert words in finished.output


def test_example_scores_stand_in_the_requests_order(finished):
  requests, scores = (_lines(finished.workdir / name) for name in ('requests.jsonl', 'scores.jsonl'))
  assert len(requests) == 20
  assert [r['request_id'] for r in requests] == [s['request_id'] for s in scores]
  for request, result in zip(requests, scores, strict=True):
    assert [c['item_id'] for c in request['candidates']] == [s['item_id'] for s in result['scores']]
    for score in result['scores']:
      assert {'click', 'save', 'hide', 'utility'} <= set(score)
      assert score['utility'] == pytest.approx(score['save'] - score['hide'], abs=1e-6)
      assert all(0 < score[label] < 1 for label in ('click', 'save', 'hide'))


def test_every_file_of_a_run_is_there(finished):
  page = (finished.workdir / 'report.html').read_text()
  assert page.lstrip().lower().startswith('<!doctype html>')
  assert 'http://' not in re.sub(r'http://www\.w3\.org/\S*', '', page)  # viewable offline
  experiment = json.loads((finished.workdir / 'experiment.json').read_text())
  assert experiment['name'] == 'toy'
  assert experiment['data']['simulator']['users'] == 120
  for name, steps in (('pretrain', 6), ('ranker_with_pinfm', None), ('ranker_without_pinfm', None)):
    rows = _lines(finished.workdir / 'seed0' / name / 'metrics.jsonl')
    assert [row['step'] for row in rows] == list(range(1, (steps or len(rows)) + 1))
    assert all({'loss', 'grad_norm', 'examples_per_s', 'data_wait_share'} <= set(row) for row in rows)
  leftovers = [p for p in finished.workdir.rglob('*') if re.search(r'partial|replaced|\.check-|tmp', p.name)]
  assert leftovers == []


def _snapshot(workdir):
  kept = [p for p in workdir.rglob('*') if p.is_file() and ('seed0' in p.parts or 'data' in p.parts)]
  return {p: p.stat().st_mtime_ns for p in kept if p.name != 'settings.json'}


def test_running_again_trains_nothing(finished, monkeypatch, capsys):
  monkeypatch.setattr(loop, 'put_batch', None)  # would fail if a step ran
  before = _snapshot(finished.workdir)
  assert before
  begin = time.monotonic()
  command = ['run', str(finished.launch), '--workdir', str(finished.workdir)]
  assert main(command) == 0
  assert time.monotonic() - begin < 30  # the bootstrap and the report's plots are made again
  assert _snapshot(finished.workdir) == before
  assert capsys.readouterr().out.count('finished earlier') >= 3


def test_some_stages(finished, capsys):
  (finished.workdir / 'report.html').unlink()
  command = ['run', str(finished.launch), '--workdir', str(finished.workdir), '--stages']
  assert main([*command, 'report']) == 0
  assert '== evaluate' not in capsys.readouterr().out
  assert (finished.workdir / 'report.html').exists()
  assert main([*command, 'report,prepare']) == 0  # in the order of a run, whatever the order of the words
  output = capsys.readouterr().out
  assert output.index('== prepare') < output.index('== report')


@pytest.mark.parametrize(
  ('setting', 'words'),
  [
    ('pretrain.steps=7', 'pretrain.steps=6, now it is 7'),
    ('data.simulator.users=121', 'data.simulator.users=120, now it is 121'),
    ('model.tower.width=32', 'model.tower.width=16, now it is 32'),
    ('finetune.update.learning_rate=0.5', 'finetune.update.learning_rate=0.003, now it is 0.5'),
    ('ranker.cross_layers=2', 'ranker.cross_layers=1, now it is 2'),
  ],
)
def test_another_setting_in_the_same_workdir_is_refused(finished, capsys, setting, words):
  described = (finished.workdir / 'experiment.json').read_text()
  command = ['run', str(finished.launch), '--workdir', str(finished.workdir), '--set', setting]
  assert main(command) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('pinfm: error: ')
  assert words in line
  assert 'another --workdir' in line
  assert (finished.workdir / 'experiment.json').read_text() == described  # so that export and report stay right


def test_a_refused_command_leaves_the_workdir_as_it_was(finished, capsys):
  described = (finished.workdir / 'experiment.json').read_text()
  command = ['run', str(finished.launch), '--workdir', str(finished.workdir), '--stages', 'evaluate', '--set']
  assert main([*command, 'evaluate.main_label=nope']) == 2
  assert "'nope'" in capsys.readouterr().err
  assert (finished.workdir / 'experiment.json').read_text() == described


def test_other_settings_than_the_trained_ones_are_not_exported(finished, tmp_path, capsys):
  """A hash seed changes no shape: the bundle would be made, and every id would read another id's rows."""
  command = ['run', str(finished.launch), '--workdir', str(finished.workdir), '--stages', 'report']
  assert main([*command, '--set', 'model.tables.hash_seed=7']) == 0
  assert main(['export', str(finished.workdir), '--out', str(tmp_path / 'bundle')]) == 2
  assert 'model.tables.hash_seed=0, now it is 7' in capsys.readouterr().err
  assert not (tmp_path / 'bundle').exists()
  assert main(command) == 0  # writes the right settings again


def test_a_setting_of_the_evaluation_may_change(finished):
  """It changes no training, so the same workdir takes it."""
  command = ['run', str(finished.launch), '--workdir', str(finished.workdir), '--stages', 'evaluate']
  assert main([*command, '--set', 'evaluate.utility.save=2']) == 0
  assert main(command) == 0


def test_export_and_score(finished, tmp_path, capsys):
  bundle, scores = tmp_path / 'bundle', tmp_path / 'scores.jsonl'
  export = ['export', str(finished.workdir), '--out', str(bundle), '--storage', 'int8']
  assert main(export) == 0
  assert json.loads((bundle / 'manifest.json').read_text())['tables']['storage'] == 'int8'
  assert main(export) == 2  # it exists
  assert 'exists already' in capsys.readouterr().err
  assert main([*export, '--overwrite']) == 0
  assert main(['score', str(bundle), str(finished.workdir / 'requests.jsonl'), '--out', str(scores)]) == 0
  found, int4 = _lines(scores), _lines(finished.workdir / 'scores.jsonl')
  assert [r['request_id'] for r in found] == [r['request_id'] for r in int4]
  values = [np.array([[s['click'], s['save']] for r in results for s in r['scores']]) for results in (found, int4)]
  np.testing.assert_allclose(*values, atol=0.1)
  assert np.any(values[0] != values[1])
  evaluated = RankingPredictions.load(finished.workdir / 'seed0' / 'ranker_with_pinfm' / 'test' / 'predictions.npz')
  last = evaluated.request_M >= np.unique(evaluated.request_M)[-20]  # the examples are the last requests
  places = [evaluated.label_names.index(name) for name in ('click', 'save')]
  np.testing.assert_allclose(values[0], evaluated.scores_MT[last][:, places], atol=2e-3)


def test_the_ranker_without_pinfm_is_exported_by_name(finished, tmp_path):
  bundle = tmp_path / 'bundle'
  assert main(['export', str(finished.workdir), '--out', str(bundle), '--arm', 'without PinFM']) == 0
  manifest = json.loads((bundle / 'manifest.json').read_text())
  assert manifest['tables'] is None
  assert manifest['run']['arm'] == 'without PinFM'


# --- processes that are killed -------------------------------------------------------------------------------------

# Python ignores SIGINT in a process that was started in the background of a shell; this one never does.
COMMAND = (
  'import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);'
  'from pinfm_jax.cli import main; sys.exit(main(sys.argv[1:]))'
)
# Long enough that a poll every few milliseconds meets each moment.
SETTINGS = (
  'pretrain.steps=300', 'pretrain.checkpoint_every=30', 'finetune.epochs=3', 'finetune.checkpoint_every=20',
  'data.simulator.users=150',
)  # fmt: skip


def _start(launch, workdir, *words):
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(TESTS.parent), str(TESTS)])}
  command = [sys.executable, '-c', COMMAND, 'run', str(launch), '--workdir', str(workdir), '--set', *SETTINGS, *words]
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _signal_when(process, sign, moment, timeout=300):
  """Sends the signal as soon as `moment()` is true; returns the process's error output."""
  deadline = time.monotonic() + timeout
  while not moment():
    assert process.poll() is None, process.communicate()[1][-3000:]
    assert time.monotonic() < deadline
    time.sleep(0.002)
  process.send_signal(sign)
  return process.communicate(timeout=120)[1]


def _steps(directory):
  return len((directory / 'metrics.jsonl').read_text().splitlines()) if (directory / 'metrics.jsonl').exists() else 0


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_bit_identical(finished, tmp_path):
  """Kill -9 while preparing, between and within checkpoints, fine-tuning and exporting; then run to the end."""
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  process = _start(finished.launch, whole)
  _, errors = process.communicate(timeout=600)
  assert process.returncode == 0, errors[-3000:]
  seed = killed / 'seed0'
  saving = lambda folder: any('tmp' in p.name for p in (seed / folder / 'checkpoints').glob('*'))
  done = lambda folder, step: (seed / folder / 'checkpoints' / str(step)).exists()
  moments = {
    'preparing': lambda: (killed / 'raw').exists(),
    'after the first checkpoint': lambda: done('pretrain', 30),
    'some steps later': lambda: done('pretrain', 90) and _steps(seed / 'pretrain') > 97,
    'writing a checkpoint': lambda: done('pretrain', 150) and saving('pretrain'),
    'fine-tuning before a checkpoint': lambda: _steps(seed / 'ranker_with_pinfm') > 2,
    'fine-tuning after one': lambda: done('ranker_with_pinfm', 20),
    'exporting': lambda: any(killed.glob('bundle*')) or (killed / 'export').exists(),
  }
  for name, moment in moments.items():
    process = _start(finished.launch, killed)
    _signal_when(process, signal.SIGKILL, moment)
    assert process.returncode == -signal.SIGKILL, name
  process = _start(finished.launch, killed)
  _, errors = process.communicate(timeout=600)
  assert process.returncode == 0, errors[-3000:]
  for folder in ('pretrain', 'ranker_with_pinfm', 'ranker_without_pinfm'):
    a, b = (load_arrays(root / 'seed0' / folder / 'checkpoints') for root in (whole, killed))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_array_equal(x, y, err_msg=f'{folder} {jax.tree_util.keystr(path)}')
    rows = [_lines(root / 'seed0' / folder / 'metrics.jsonl') for root in (whole, killed)]
    a, b = ([(row['step'], row['loss']) for row in part] for part in rows)
    assert a == b
  for folder in ('ranker_with_pinfm', 'ranker_without_pinfm'):
    a, b = (np.load(root / 'seed0' / folder / 'test' / 'predictions.npz') for root in (whole, killed))
    assert a.files == b.files
    for name in a.files:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)
  for name in ('results.json', 'scores.jsonl', 'requests.jsonl', 'bundle/tables.bin'):
    assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
  leftovers = [str(p) for p in killed.rglob('*') if re.search(r'partial|replaced|\.check-|tmp', p.name)]
  assert leftovers == []


@pytest.mark.slow
def test_an_interrupt_ends_with_one_line_and_the_run_resumes(finished, tmp_path):
  process = _start(finished.launch, tmp_path / 'work')
  errors = _signal_when(process, signal.SIGINT, lambda: _steps(tmp_path / 'work' / 'seed0' / 'pretrain') > 5)
  assert process.returncode == 130
  assert 'Traceback' not in errors
  assert errors.splitlines()[-1] == 'pinfm: interrupted; the same command resumes'
  process = _start(finished.launch, tmp_path / 'work', '--stages', 'pretrain')
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors[-3000:]
  rows = _lines(tmp_path / 'work' / 'seed0' / 'pretrain' / 'metrics.jsonl')
  assert [row['step'] for row in rows] == list(range(1, 301))


def test_two_runs_in_one_workdir_are_refused(tmp_path):
  from pinfm_jax.errors import UserError
  from pinfm_jax.run import only_run

  with only_run(tmp_path), pytest.raises(UserError, match='another run is working'), only_run(tmp_path):
    pass
  with only_run(tmp_path):  # free again
    pass


def test_the_bundle_has_a_card_and_a_catalogue(finished):
  import polars as pl

  from pinfm_jax.launch import saved_experiment
  from pinfm_jax.stages.context import Run

  bundle = finished.workdir / 'bundle'
  run = Run(saved_experiment(finished.workdir), finished.workdir)
  card, items = (bundle / 'MODEL_CARD.md').read_text(), pl.read_parquet(bundle / 'items' / 'catalogue.parquet')
  trained = run.dataset.items.filter(pl.col('first_seen') < run.split.finetune[1])
  assert 0 < len(items) == len(trained) < len(run.dataset.items)
  results = json.loads((finished.workdir / 'results.json').read_text())
  for fact in (
    'toy, with PinFM', 'simulated feed, seed 0', 'SIMULATED', run.dataset.info.checksum, 'steps 6', 'epochs 0.3',
    f'{run.dataset.info.counts.events.kept:,} events', f'{results["with PinFM/save/auc/mean"]:.4f}',
    f'{results["with PinFM/click/hit@3/mean"]:.4f}', 'by item age', f'{len(items):,} items', 'stored as int4',
    '2 x 500 rows x 8', 'save +1, hide -1',
  ):  # fmt: skip
    assert fact in card, fact
  assert 'None' not in card


def test_a_demo_is_made_of_the_run(finished, tmp_path, monkeypatch, capsys):
  from pinfm_jax.launch import saved_experiment
  from pinfm_jax.stages import demo as demo_stage
  from pinfm_jax.stages.context import Run

  assert main(['demo', '--run', str(tmp_path)]) == 2
  capsys.readouterr()
  folder = tmp_path / 'demo'
  assert main(['demo', '--run', str(finished.workdir), '--save', str(folder), '--requests', '1']) == 0
  text = capsys.readouterr().out
  assert text.count('Request ') == 1
  assert '12 requests' in text
  documents, truths = _lines(folder / 'requests.jsonl'), _lines(folder / 'truth.jsonl')
  assert [t['request_id'] for t in truths] == [d['request_id'] for d in documents]
  assert len({t['request_id'] for t in truths}) == 12
  dataset = Run(saved_experiment(finished.workdir), finished.workdir).dataset
  rows = dataset.requests['request_id'].to_list()
  for document, truth in zip(documents, truths, strict=True):
    request = dataset.request(rows.index(document['request_id']))
    assert len(document['candidates']) >= demo_stage._LEAST_CANDIDATES
    place = dataset.info.labels.index('save')
    np.testing.assert_allclose(truth['true']['save'], request.reference[:, place], atol=6e-5)
  monkeypatch.setattr(demo_stage, '_LEAST_EVENTS', 10**6)
  assert main(['demo', '--run', str(finished.workdir)]) == 2
  assert 'has 0 requests to show, expected 12' in capsys.readouterr().err
