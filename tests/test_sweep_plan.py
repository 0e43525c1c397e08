"""What a sweep trains and what it shares, and its tables over runs that are there and runs that are missing."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.ranking import RankingPredictions
from pinfm_jax.overrides import apply_overrides, from_dict, to_dict
from pinfm_jax.stages.context import Run
from pinfm_jax.stages.evaluate import _retrieval_figures, evaluate_stage, measured_figure, tower_figures
from pinfm_jax.sweep import sweep as sweep_module
from pinfm_jax.sweep.jobs import FAILED, Outcome
from pinfm_jax.sweep.plan import make_plan
from pinfm_jax.sweep.results import Rows, findings
from pinfm_jax.sweep.sweep import Sweep, _check_name, _unreached, run_sweep
from pinfm_jax.workdir import claim, write_json

NONE, HALF = Arm('none', {'ranker.sequence': 'none'}), {'pretrain.steps': 3}
ARMS = (
  NONE,
  Arm('all', {}, '+2.91 %'),
  Arm('half', HALF),
  Arm('half, no tie', HALF | {'finetune.tie_weight': 0.0}),
  Arm('scratch', {'finetune.init': 'scratch'}),
)


@pytest.fixture
def run(toy_run, tmp_path):
  """The toy experiment with its data, in an empty workdir."""
  (tmp_path / 'data').symlink_to(toy_run.workdir / 'data')
  return Run(_experiment(), tmp_path)


def _experiment(arms=ARMS, **changes):
  return replace(toy.EXPERIMENT, **{'arms': arms, 'baseline': arms[0].name, 'seeds': (0, 1), **changes})


def _measured(run):
  """Figures of a tower as its results have them."""
  figures = {f'retrieval/tower/hr@{k}': 0.1 for k in run.experiment.evaluate.ks}
  return figures | {measured_figure(key): value for key, value in run.retrieval_settings().items()}


def _plan(run, launch_arms=toy.EXPERIMENT.arms):
  return make_plan(run, launch_arms, run.workdir / 'sweeps' / 'x' / 'logs')


def test_towers_are_shared_by_arms_of_equal_pretraining(run):
  plan = _plan(run)
  jobs = plan.jobs()
  assert [job.stage for job in jobs] == ['pretrain'] * 4 + ['finetune'] * 10
  towers = {name: {one.seed for one in runs} for name, runs in plan.of('tower').items()}
  assert towers == {"the launch file's": {0, 1}, 'pretrain.steps=3': {0, 1}}
  needs = {name: [one.job.needs and one.job.needs.name for one in runs] for name, runs in plan.of('ranker').items()}
  assert needs['none'] == needs['scratch'] == [None, None]
  assert needs['all'] == ['pretrain', 'pretrain']
  assert needs['half'] == needs['half, no tie']
  assert all(name.startswith('pretrain_') for name in needs['half'])
  for job in jobs:
    assert len(job.experiment.seeds) == len(job.experiment.arms) == 1
    made = Run(from_dict(Experiment, to_dict(job.experiment)), run.workdir)  # as it reaches the run's process
    (arm,), (seed,) = made.experiment.arms, made.experiment.seeds
    own = made.of_arm(arm)
    made_directory = own.pretrain_directory(seed) if job.stage == 'pretrain' else made.measured_directory(seed, arm)
    assert made_directory == job.directory  # the run fills the folder that the sweep looks into


def test_an_arm_with_a_launch_arms_settings_is_that_run(run):
  folders = {name: runs[0].directory.parent.name for name, runs in _plan(run).of('ranker').items()}
  assert folders['none'] == 'ranker_without_pinfm'
  assert folders['all'] == 'ranker_with_pinfm'
  assert folders['half'] == 'ranker_half'
  twice = replace(run, experiment=_experiment((*ARMS, Arm('half again', HALF))))
  assert _plan(twice).of('ranker')['half again'][0].directory.parent.name == 'ranker_half'
  assert len(_plan(twice).jobs()) == len(_plan(run).jobs())
  validation = replace(toy.EXPERIMENT.evaluate, split='validation')
  other = replace(run, experiment=_experiment(evaluate=validation))
  assert _plan(other).of('ranker')['half'][0].directory.relative_to(run.workdir) == Path('seed0/ranker_half/validation')


def test_results_of_other_arms_are_not_written_over(run, tmp_path):
  path = tmp_path / 'experiment.json'
  _check_name(path, run.experiment)
  write_json(path, to_dict(run.experiment))
  _check_name(path, run.experiment)
  fewer = replace(run.experiment, arms=run.experiment.arms[:2])
  with pytest.raises(UserError, match='holds the results of other arms too .*give this sweep a --name'):
    _check_name(path, fewer)


def test_an_arm_may_not_take_a_launch_arms_name_for_other_settings(run):
  taken = replace(run, experiment=_experiment((NONE, Arm('With PinFM', HALF))))
  with pytest.raises(UserError, match="arm 'With PinFM' has the name of the launch file's arm 'with PinFM'"):
    _plan(taken)


def test_finished_runs_are_not_run_again(run):
  tower = run.workdir / 'seed0' / 'pretrain'
  claim(tower, run.pretrain_settings(0))
  write_json(tower / 'results.json', _measured(run))
  jobs = _plan(run).jobs()
  assert tower not in [job.directory for job in jobs]
  more = replace(run, experiment=_experiment(evaluate=replace(toy.EXPERIMENT.evaluate, ks=(7,))))
  assert tower in [job.directory for job in _plan(more).jobs()]  # measured again, for the figures that it lacks
  ranker = next(job for job in jobs if job.directory == run.workdir / 'seed0' / 'ranker_with_pinfm' / 'test')
  assert ranker.needs is None


@pytest.mark.parametrize('setting', ['evaluate.retrieval_users', 'finetune.history_block'])
def test_figures_of_other_users_or_windows_are_not_taken(run, setting):
  tower, value = run.workdir / 'seed0' / 'pretrain', run.retrieval_settings()[setting] - 1
  claim(tower, run.pretrain_settings(0))
  write_json(tower / 'results.json', _measured(run))
  assert tower not in [job.directory for job in _plan(run).jobs()]
  other = replace(run, experiment=apply_overrides(run.experiment, {setting: value}))
  with pytest.raises(UserError, match=f'no figures with {setting}={value}; run the pretrain stage too'):
    tower_figures(other, 0)
  assert tower in [job.directory for job in _plan(other).jobs()]


def test_runs_without_rankers_are_evaluated_with_all_their_seeds(run):
  alone = replace(run, experiment=replace(run.experiment, arms=(), baseline='', seeds=(0, 1)))
  for seed in (0, 1):
    with pytest.raises(UserError, match=f'no pretrained tower of seed {seed} yet'):
      evaluate_stage(alone)
    directory = alone.pretrain_directory(seed)
    claim(directory, alone.pretrain_settings(seed))
    names = [f'{row}/{name}@{k}' for row in ('tower', 'popularity') for name in ('hr', 'ndcg') for k in (5, 10)]
    names += ['tower/mrr', 'popularity/mrr', 'users', 'catalogue', 'unseen_share']
    write_json(directory / 'results.json', _measured(alone) | {f'retrieval/{name}': float(seed) for name in names})
  evaluate_stage(alone)
  assert json.loads((run.workdir / 'results.json').read_text())['retrieval/tower/mrr'] == 0.5


def test_a_launch_files_tower_that_no_arm_starts_from_is_not_asked_for(run):
  own = replace(run, experiment=_experiment((NONE, Arm('half', HALF))))
  directory = own.pretrain_directory(0)
  directory.mkdir(parents=True)
  write_json(directory / 'results.json', {})
  assert _retrieval_figures(own) == {}


def test_work_of_other_settings_is_refused_before_anything_runs(run):
  tower = run.workdir / 'seed1' / 'pretrain'
  claim(
    tower,
    replace(run, experiment=_experiment(pretrain=replace(run.experiment.pretrain, steps=99))).pretrain_settings(1),
  )
  write_json(tower / 'results.json', {})
  with pytest.raises(UserError, match=r'seed1/pretrain was made with pretrain\.steps=99, now it is 6'):
    _plan(run)


def test_settings_that_do_not_reach_an_arm_are_named():
  assert _unreached(('pretrain.steps', 'model.tower.layers'), ARMS) == [
    "note: these arms have a pretrain.steps of their own: 'half', 'half, no tie'"
  ]


def test_without_rankers_the_arms_are_towers(run):
  plan = _plan(run, launch_arms=())
  assert plan.towers_alone
  assert {name: len(runs) for name, runs in plan.of('tower').items()} == {'all': 2, 'half': 2, 'half, no tie': 2}
  assert len(plan.jobs()) == 4  # of two arms the tower is the same
  for one in plan.trained:
    names = [f'{row}/{figure}' for row in ('tower', 'popularity') for figure in ('hr@5', 'ndcg@5', 'mrr')]
    one.directory.mkdir(parents=True, exist_ok=True)
    write_json(one.directory / 'results.json', {f'retrieval/{name}': 0.5 for name in (*names, 'users', 'catalogue')})
  text = _found(plan)[1].text()
  assert 'One tower: half; half, no tie.' in text
  assert plan.of('ranker') == {}
  assert all(job.towers_alone and job.stage == 'pretrain' for job in plan.jobs())
  padded = Arm('padded', {'model.tower.backbone': 'padded_sasrec', 'pretrain.pack': True})  # no ranker can have it
  experiment = replace(run.experiment, arms=(padded,), baseline='padded')
  assert len(_plan(replace(run, experiment=experiment), launch_arms=()).jobs()) == 2


def test_the_name_of_a_towers_folder_does_not_depend_on_how_numbers_are_spelled(run):
  """A launch file may say 3 where the saved experiment says 3.0."""
  spelled = replace(run.experiment, data=replace(run.experiment.data, test_days=1.0, finetune_days=2.0))
  other = replace(run, experiment=spelled)
  assert run.of_arm(ARMS[2]).pretrain_directory(0) == other.of_arm(ARMS[2]).pretrain_directory(0)
  assert run.of_arm(ARMS[2]).pretrain_directory(0) != run.of_arm(ARMS[1]).pretrain_directory(0)


# --- results of runs that are made up ------------------------------------------------------------------------------


def _finish(plan, name, seeds, quality):
  """Predictions that agree with the labels as told (0 = chance)."""
  for one in plan.of('ranker')[name]:
    if one.seed in seeds:
      rng = np.random.default_rng(7)
      labels_MT = rng.integers(0, 2, (400, 5)).astype(np.uint8)
      noise_MT = np.random.default_rng(one.seed).uniform(size=(400, 5))
      scores_MT = (quality * labels_MT + (1 - quality) * noise_MT).clip(0.01, 0.99).astype(np.float32)
      request_M = np.arange(400) // 8
      ages = np.full(400, 30, np.float32)
      names = ('click', 'closeup', 'save', 'hide', 'share')
      one.directory.mkdir(parents=True)
      claim(one.directory, plan.run.measured_settings())
      RankingPredictions(
        request_M, request_M // 2, np.arange(400, dtype=np.uint64), ages, labels_MT, scores_MT, None, names
      ).save(one.directory / 'predictions.npz')
      write_json(one.directory / 'results.json', {})


def _found(plan):
  rows = Rows(plan, plan.run.workdir / 'sweeps' / 'x' / 'runs.csv')
  return rows, findings(plan, rows, 'toy: x', 'About it.')


@pytest.fixture
def plan(run):
  plan = _plan(run)
  (run.workdir / 'sweeps' / 'x').mkdir(parents=True)
  return plan


def test_the_tables_hold_all_complete_arms(plan):
  for name, quality in (('none', 0.1), ('all', 0.6), ('half', 0.3)):
    _finish(plan, name, (0, 1), quality)
  _finish(plan, 'scratch', (1,), 0.2)
  rows, found = _found(plan)
  assert list(found.comparison.metrics) == ['none', 'all', 'half']
  assert found.comparison.seeds == 2
  assert found.figures['all/lift/save/auc/low'] > 0
  assert found.figures['all/save/auc/mean'] > found.figures['half/save/auc/mean'] > found.figures['none/save/auc/mean']
  missing = '\n'.join(found.failed)
  assert 'left out of the tables until all their seeds are there: half, no tie, scratch' in missing
  assert 'scratch, seed 0: not run' in missing
  assert 'scratch, seed 1' not in missing
  found.write(plan.run.workdir / 'sweeps' / 'x')
  page = (plan.run.workdir / 'sweeps' / 'x' / 'results.md').read_text()
  for words in ('# toy: x', 'About it.', 'seeds 0, 1', '+2.91 %', '### Not complete'):
    assert words in page
  assert json.loads((plan.run.workdir / 'sweeps' / 'x' / 'results.json').read_text()) == found.figures


def test_the_seeds_are_those_of_the_baseline(plan):
  for name in ('none', 'scratch'):
    _finish(plan, name, (1,), 0.4)
  _finish(plan, 'all', (0, 1), 0.5)
  _, found = _found(plan)
  assert list(found.comparison.metrics) == ['none', 'all', 'scratch']
  assert found.comparison.seeds == 1
  assert 'seeds 1.' in found.about


def test_without_a_baseline_there_is_no_table_but_a_reason(plan):
  _finish(plan, 'all', (0, 1), 0.5)
  _, found = _found(plan)
  assert found.comparison is None
  assert "no table: the baseline 'none' has no finished seed" in found.failed


def test_rows_say_what_became_of_each_run_and_keep_the_seconds(plan):
  _finish(plan, 'none', (0, 1), 0.4)
  rows, _ = _found(plan)
  done, bad = plan.of('ranker')['none'][0], plan.of('ranker')['half'][0]
  rows.ended(done.directory, Outcome('finished', 12.34))
  rows.ended(bad.directory, Outcome(FAILED, 3.0, 'killed by signal 9\nlast words'))
  again, found = _found(plan)
  again.write()
  with (plan.run.workdir / 'sweeps' / 'x' / 'runs.csv').open(newline='') as file:
    table = {(row['arm'], row['seed']): row for row in csv.DictReader(file)}
  assert len(table) == 4 + 10
  assert table['none', '0']['seconds'] == '12.3'
  assert table['none', '0']['status'] == 'finished'
  assert 0 < float(table['none', '0']['save/auc']) < 1
  assert table['half', '0']['settings'] == 'pretrain.steps=3'
  assert rows.status(bad) == FAILED
  assert again.status(bad) == 'not run'  # of this call
  lines = findings(plan, rows, 'x', '').failed
  assert any(line.startswith('half, seed 0: failed (last words') for line in lines)


def test_a_split_without_requests_is_refused_before_anything_trains(run, tmp_path, monkeypatch):
  monkeypatch.setattr(sweep_module, 'run_jobs', None)  # would fail if a run were started
  data = replace(toy.EXPERIMENT.data, validation_days=0)
  split = replace(toy.EXPERIMENT.evaluate, split='validation')
  claim(tmp_path / 'prepare', {'data': {'source': 'simulator', 'path': '', 'simulator': dict(data.simulator)}})
  sweep = Sweep(replace(toy.EXPERIMENT, data=data, evaluate=split), 'x')
  with pytest.raises(UserError, match='data.validation_days is 0'):
    run_sweep(sweep, tmp_path)


def test_the_facts_are_those_of_the_data(run):
  facts = sweep_module.data_facts(run)
  assert facts.requests == len(run.requests('finetune'))
  assert facts.content  # the simulated items have content vectors
  assert set(facts.actions) == {'click', 'closeup', 'save', 'hide', 'share'}
  assert facts.labels == run.dataset.info.labels
