"""Evaluations of the image repair and of the sequence repair: cells that resume, figures, tables, verdict."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from pinfm_jax.config import Arm
from pinfm_jax.data.public.cifar10 import Images
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.predict import predictions_of
from pinfm_jax.evaluate.ranking import ranking_metrics
from pinfm_jax.overrides import to_dict
from pinfm_jax.robustness.balls import Ball
from pinfm_jax.robustness.defended import EvaluationConfig
from pinfm_jax.robustness.evaluation import Evaluation
from pinfm_jax.robustness.from_run import pinfm_arm, ranking_subject
from pinfm_jax.robustness.networks import CLASSIFIERS
from pinfm_jax.robustness.repair import RepairConfig
from pinfm_jax.robustness.sequence_evaluation import Key, SequenceEvaluation
from pinfm_jax.robustness.sequence_figures import WORST, WORST_STATIC, Figures
from pinfm_jax.robustness.sequences import ADAPTIVE, CLEAN, HOSTILE, ROWS, STATIC, SequenceConfig
from pinfm_jax.robustness.tables import difference, kept, tables, verdict
from pinfm_jax.robustness.tasks import Tasks, TasksConfig
from pinfm_jax.stages.context import Run
from pinfm_jax.stages.finetune import finetune_stage
from pinfm_jax.stages.prepare import prepare_stage
from pinfm_jax.stages.pretrain import pretrain_stage
from pinfm_jax.workdir import write_json

EXPERIMENT = Path(__file__).parents[1] / 'experiments' / 'sequence_repair.py'


def _recorded(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[str]:
  """Labels of everything that an evaluation computes from here on."""
  labels, batched = [], kind._batched
  monkeypatch.setattr(kind, '_batched', lambda self, label, *rest: labels.append(label) or batched(self, label, *rest))
  return labels


@pytest.fixture(scope='module')
def images(tmp_path_factory: pytest.TempPathFactory):
  """(make an evaluation of networks that nobody trained, its directory)."""
  rng = np.random.default_rng(0)
  config = TasksConfig(bank=8, projection=(8, 4), rotation_width=16, inpainting_width=16, inpainting_blocks=1)
  tasks = Tasks(config, CLASSIFIERS['test'])
  pixels = rng.integers(0, 256, (8, 32, 32, 3), np.uint8)
  classifier = jax.jit(tasks.classifier.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))['params']
  shape = classifier['logits']['kernel'].shape
  classifier['logits']['kernel'] = jax.random.normal(jax.random.key(1), shape)  # they start at 0
  params = jax.jit(tasks.init)(jax.random.key(2), classifier)
  label = np.asarray(jax.jit(tasks.logits)(params, pixels.astype(np.float32) / 255)).argmax(1).astype(np.int32)
  label[0] = (label[0] + 1) % 10  # one that is wrong from the start
  settings = EvaluationConfig(
    repair=RepairConfig(Ball('linf', 16 / 255), steps=1, step_size=8 / 255), transfer_images=8, adaptive_images=4,
    batch=4, seeds=(0, 1), steps=2, adaptive_steps=1, transfer=('pgd',), adaptive=('bpda',),
    rows=('none', 'noise', 'inpainting'),
  )  # fmt: skip
  directory = tmp_path_factory.mktemp('images')

  def make(rounding=0.0, **changes):
    trained = {**params, 'bank': params['bank'] + rounding}
    return Evaluation(directory, replace(settings, **changes), tasks, trained, params, Images(pixels, label), {'n': 1})

  return make, directory


@pytest.mark.slow
def test_image_cells_resume_one_by_one(images, monkeypatch: pytest.MonkeyPatch) -> None:
  make, directory = images
  made = _recorded(monkeypatch, Evaluation)
  make().run(adaptive=False)
  # One attack; clean and attacked for noise and repair with two seeds, and once for none, where nothing is drawn.
  assert len(made) == 1 + 2 * (1 + 2 * 2)
  assert sum(kept(make(), row, 'bpda') is not None for row in ('none', 'noise', 'inpainting')) == 0
  assert '6 cells' not in verdict(make())[-1]
  assert verdict(make())[-1].startswith('3 cells are not finished')

  cell = directory / 'pgd' / 'inpainting-1.npz'
  before = np.load(cell)['correct']
  cell.unlink()
  made.clear()
  make().run(adaptive=False)
  assert made == ['inpainting / pgd / seed 1']
  np.testing.assert_array_equal(np.load(cell)['correct'], before)
  made.clear()
  make().run()
  assert [label.split(' / ')[1] for label in made] == ['bpda'] * 5
  made.clear()
  make(seeds=(0,)).run()  # fewer cells of the same meaning
  assert made == []
  make(rounding=1e-6).run()  # a GPU computes the bank with other last bits in every process
  assert made == []
  with pytest.raises(UserError, match='steps'):
    make(steps=3)
  with pytest.raises(UserError, match='eot is 0; expected at least 1'):
    make(eot=0)
  assert kept(make(), 'none', CLEAN).mean() == 7 / 8
  assert (kept(make(), 'none', 'worst transfer') <= kept(make(), 'none', CLEAN)).all()
  text = '\n'.join(table.text() for table in tables(make()))
  assert re.search(r'none +87.5 ± 0.0 \[', text)
  change = difference(make(), 'inpainting', 'none', CLEAN)
  assert change.difference == pytest.approx(kept(make(), 'inpainting', CLEAN).mean() - 7 / 8)


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
  """A run of a few steps, as `pinfm run` leaves it."""
  model = replace(toy.EXPERIMENT.model, tower=replace(toy.EXPERIMENT.model.tower, layers=1))
  pretrain = replace(toy.EXPERIMENT.pretrain, steps=2)
  finetune = replace(toy.EXPERIMENT.finetune, epochs=0.1, ntl_weight=0.0)
  arms = {'arms': (Arm('with PinFM'),), 'baseline': 'with PinFM'}
  experiment = replace(toy.EXPERIMENT, model=model, pretrain=pretrain, finetune=finetune, **arms)
  run = Run(experiment, tmp_path_factory.mktemp('run'))
  write_json(run.workdir / 'experiment.json', to_dict(run.experiment))
  for stage in (prepare_stage, pretrain_stage, finetune_stage):
    stage(run)
  return run


@pytest.mark.slow
def test_sequence_experiment_resumes_and_reports(finished: Run, tmp_path: Path, monkeypatch, capsys) -> None:
  spec = importlib.util.spec_from_file_location('sequence_repair', EXPERIMENT)
  experiment = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(experiment)
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)  # the tests' own compilation cache stays
  made = _recorded(monkeypatch, SequenceEvaluation)
  settings = ['--run', str(finished.workdir), '--workdir', str(tmp_path), '--requests', '8', '--users', '8']
  settings += ['--set', 'steps=2', 'adaptive_steps=1', 'pool=8', 'bank=16', 'batch=8', 'repair.steps=1']
  settings += ['strengths=0.2', 'columns=clean,pgd-l2,dropped', 'adaptive=bpda-l2', 'rows=none,all']
  assert experiment.main([*settings, '--seeds', '0', '--until', 'static']) == 0
  output = capsys.readouterr().out
  assert 'NDCG@10: On clean histories' in output
  assert 'cells are not finished' in output
  cells = {path: path.read_bytes() for path in tmp_path.glob('cells/*/*/*.npz')}
  assert len(cells) == 2 * (3 * 2 + 1)  # and the attacked embeddings

  made.clear()
  assert experiment.main([*settings, '--seeds', '0,1', '--subjects', 'ranking']) == 0
  assert all(path.read_bytes() == before for path, before in cells.items())
  new = ['clean / all', 'pgd-l2 / all', 'dropped / all', 'bpda-l2 / none', 'bpda-l2 / all', 'bpda-l2 / all']
  assert [label.split(' 0.2')[0] for label in made if 'seed' in label] == new
  output = capsys.readouterr().out
  assert 'cells are not finished' not in output
  for text in ('HIT@3: On clean histories', 'AUC: In the worst case', 'AUC: With 20 % of the events dropped'):
    assert text in output
  assert (tmp_path / 'results.md').read_text().count('### ') == 2 * 5
  for name in ('HIT_at_3', 'AUC', 'NDCG_at_10'):
    assert '<svg' in (tmp_path / f'{name}.svg').read_text()
  assert experiment.main([*settings, 'steps=3']) == 2
  assert 'steps' in capsys.readouterr().err


@pytest.mark.slow
def test_figures_are_the_evaluators(finished: Run, tmp_path: Path) -> None:
  """On cells with known outcomes; nothing is compiled for them."""
  subject, weights = ranking_subject(finished, pinfm_arm(finished), 0, 16)
  config = SequenceConfig(columns=(CLEAN, 'pgd-l2'), adaptive=('bpda-l2',), rows=('none', 'all'), strengths=(0.2,))
  evaluation = SequenceEvaluation(tmp_path, config, subject, weights, None, {})
  rng, shape = np.random.default_rng(0), (len(subject.rows), subject.requests.config.candidates)
  cells = {}
  for key in evaluation.planned():
    outcome = rng.random((*shape, len(subject.requests.schema.labels))).astype(np.float32)
    cells[key] = outcome, rng.random(shape[0]).astype(np.float32)
    if not evaluation.path(key).exists():
      evaluation.path(key).parent.mkdir(exist_ok=True)
      np.savez(evaluation.path(key), outcome=cells[key][0], loss=cells[key][1])
    else:
      cells[key] = cells[key._replace(seed=0)]
  utility = dict(finished.experiment.evaluate.utility)
  figures = Figures(evaluation, utility)
  examples = subject.examples()

  def expected(outcome):
    predictions = predictions_of(subject.requests, outcome[examples['candidate_mask']])
    found = ranking_metrics(predictions, utility)
    return found['save/hit@3'], found['save/auc']

  for row in ('none', 'all'):
    keys = [Key('pgd-l2', row, 0.2, seed) for seed in ((0,) if row == 'none' else (0, 1, 2))]
    means = np.mean([expected(cells[key][0]) for key in keys], axis=0)
    for metric, mean in zip(('HIT@3', 'AUC'), means, strict=True):
      value, std, low, high = figures.figure(metric, 'pgd-l2').interval((row, 0.2))
      assert value == pytest.approx(mean)
      assert low < value < high
      assert (std == std) == (row == 'all')
  # The worst case takes each request's outcome from where its loss is highest.
  for column, names in ((WORST_STATIC, (CLEAN, 'pgd-l2')), (WORST, (CLEAN, 'pgd-l2', 'bpda-l2'))):
    found = [cells[Key(name, 'none', 0.2, 0)] for name in names]
    worst = np.argmax([loss for _, loss in found], axis=0)
    outcome = np.stack([outcome for outcome, _ in found])[worst, np.arange(shape[0])]
    assert figures.figure('AUC', column).interval(('none', 0.2))[0] == pytest.approx(expected(outcome)[1])
  change = figures.figure('AUC', CLEAN).difference(('all', 0.2), ('none', 0.2))
  assert change.difference_low < change.difference < change.difference_high
  assert figures.figure('AUC', CLEAN).difference(('ntl', 0.2), ('none', 0.2)) is None


def test_wrong_sequence_settings(toy_run) -> None:
  for make, message in (
    (lambda: SequenceConfig(columns=('pgd',)), "columns name 'pgd'"),
    (lambda: SequenceConfig(adaptive=('pgd-l2',)), "adaptive name 'pgd-l2'"),
    (lambda: SequenceConfig(rows=('pairs',)), "rows name 'pairs'"),
    (lambda: SequenceConfig(strengths=(0.1,)), 'expected the radius of the repair, 0.2, among them'),
    (lambda: pinfm_arm(toy_run, 'without PinFM'), "no arm 'without PinFM' whose ranker reads PinFM"),
    (lambda: pinfm_arm(toy_run, 'other'), "no arm 'other'"),
  ):
    with pytest.raises(UserError, match=message):
      make()
  bidirectional = replace(toy_run.experiment, arms=(Arm('both ways', {'ranker.bidirectional': True}),))
  with pytest.raises(UserError, match='see later ones'):
    pinfm_arm(replace(toy_run, experiment=bidirectional))
  assert set(HOSTILE) < set(STATIC)
  assert not set(ADAPTIVE) & set(STATIC)
  assert SequenceConfig().rows == tuple(ROWS)
  repair = SequenceConfig().repair_of(0.4)
  assert (repair.ball.radius, repair.step_size) == (0.4, pytest.approx(0.1))
