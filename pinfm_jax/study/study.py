"""Runs a study: tunes every block with one budget, trains it with every seed, measures costs, compares, recommends."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.data.kept_examples import can_keep, keep_examples
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import to_dict
from pinfm_jax.run import hold_workdir
from pinfm_jax.stages.context import KEPT, Run
from pinfm_jax.study.blocks_file import BlocksFile
from pinfm_jax.study.costs import CostOptions, measured_costs
from pinfm_jax.study.findings import find
from pinfm_jax.study.rows import Decision
from pinfm_jax.study.tuning import Trial, best_trials, read_trials
from pinfm_jax.sweep.jobs import FINISHED, machine_slots, run_jobs
from pinfm_jax.sweep.plan import Plan, make_plan
from pinfm_jax.sweep.results import Rows
from pinfm_jax.sweep.sweep import data_facts, prepare_data
from pinfm_jax.workdir import is_done, read_results, write_json


@dataclass(frozen=True)
class Study:
  """What to run.

  Attributes:
    experiment: the launch file's, with the seeds and the split that were asked for.
    file: of the blocks.
    name: of the study's folder.
    decision: metric, limits, device, segments.
    costs: how costs are measured.
    only: names of blocks, besides the baseline; empty = all.
    at_once: runs at a time.
  """

  experiment: Experiment
  file: BlocksFile
  name: str
  decision: Decision = Decision()
  costs: CostOptions = CostOptions()
  only: tuple[str, ...] = ()
  at_once: int = 1


def run_study(study: Study, workdir: Path) -> bool:
  """Runs or resumes a study: what has finished is kept.

  The data are those of the launch file's workdir; rankers stand in WORKDIR/studies/NAME, since their settings are not
  those of `pinfm run`.

  Args:
    study: what to run.
    workdir: of the launch file.

  Returns:
    Whether every run has finished.

  Raises:
    UserError: blocks that cannot work, a workdir of other settings or in use, or data that cannot be prepared.
  """
  machine_slots(study.at_once)  # before the data are prepared
  workdir = workdir.absolute()  # the processes of the runs read the data by this path
  directory = workdir / 'studies' / study.name
  with ExitStack() as lock:
    hold_workdir(workdir, lock)
    directory.mkdir(parents=True, exist_ok=True)
    prepare_data(study.experiment, workdir, directory / 'logs')
    run = _study_run(study.experiment, workdir, directory)
    blocks = study.file.blocks(run.experiment, data_facts(run), study.only)
    results = directory / run.experiment.evaluate.split
    _check_name(results, [block.name for block in blocks])
    candidates = study.file.candidates(blocks)
    _keep_examples(run, candidates)
    trials, complete = _tune(study, run, candidates)
    chosen = _chosen(candidates, trials, study.decision.metric)
    plan, rows = _train(study, run, candidates, chosen, results)
    names = _finished(plan, rows, chosen)
    missing = tuple(f'{block.name}: not finished' for block in blocks if block.name not in names)
    if blocks[0].name not in names:
      raise UserError(f"the baseline '{blocks[0].name}' has not finished: nothing can be compared with it; see above")
    arms = tuple(replace(chosen[name], name=name) for name in names)
    measured = replace(run.experiment, arms=arms, baseline=blocks[0].name, challenger='')
    costs = measured_costs(measured, directory, study.costs, directory / 'costs.json')
    found = find(replace(run, experiment=measured), _predictions(plan, chosen, names), costs, study.decision)
    found.write(results, _about(study, run, trials), trials, missing)
  print(f'\n{found.text()}\n\n{results / "results.md"}')
  return complete and not missing


def _study_run(experiment: Experiment, workdir: Path, directory: Path) -> Run:
  data = experiment.data
  path = data.path if data.source == 'prepared' else str(workdir / 'data')
  return Run(replace(experiment, data=replace(data, source='prepared', path=path)), directory)


def _check_name(results: Path, blocks: Sequence[str]) -> None:
  """Refuses to write over the results of blocks that are not among this study's."""
  if not is_done(results):
    return
  others = [name for name in read_results(results)['blocks'] if name not in blocks]
  if others:
    raise UserError(
      f'{results} holds the results of other blocks too ({", ".join(others)}); give this study a --name of its own'
    )


def _keep_examples(run: Run, candidates: Mapping[str, Sequence[Arm]]) -> None:
  """Makes the examples that rankers without a sequence module share: once, not once a ranker."""
  folder = run.workdir / KEPT
  for arm in (arm for arms in candidates.values() for arm in arms):
    own = run.of_arm(arm)
    for part in dict.fromkeys(('finetune', 'validation', run.experiment.evaluate.split)):
      requests = own.requests(part)
      if can_keep(requests):
        folder.mkdir(exist_ok=True)
        keep_examples(requests, folder)


def _tune(study: Study, run: Run, candidates: Mapping[str, Sequence[Arm]]) -> tuple[dict[str, tuple[Trial, ...]], bool]:
  """Trains every candidate with the first seed and measures it on the validation split, if there is any choice."""
  if all(len(arms) == 1 for arms in candidates.values()):
    return {}, True
  arms = tuple(arm for arms in candidates.values() for arm in arms)
  experiment = replace(run.experiment, seeds=run.experiment.seeds[:1])
  experiment = replace(experiment, evaluate=replace(experiment.evaluate, split='validation'))
  plan = _plan(replace(run, experiment=experiment), arms, arms)
  rows = _run(study, plan, run.workdir / 'tuning_runs.csv', 'tuning')
  trials = read_trials(plan, candidates, study.decision.metric, experiment.evaluate)
  write_json(run.workdir / 'tuning.json', {
    'metric': f'{experiment.evaluate.main_label} {study.decision.metric}, validation split',
    'seed': experiment.seeds[0],
    'blocks': {name: [{'settings': t.settings, 'value': t.value} for t in tried] for name, tried in trials.items()},
  })  # fmt: skip
  return trials, all(rows.status(one) == FINISHED for one in plan.trained)


def _chosen(
  candidates: Mapping[str, Sequence[Arm]], trials: Mapping[str, Sequence[Trial]], metric: str
) -> dict[str, Arm]:
  """Block -> the settings that it is trained with; blocks of which no trial has finished are left out."""
  if not trials:
    return {name: arms[0] for name, arms in candidates.items()}
  best = best_trials(trials, metric)
  return {name: arm for name, arms in candidates.items() for arm in arms if name in best and arm.name == best[name].arm}


def _train(
  study: Study, run: Run, candidates: Mapping[str, Sequence[Arm]], chosen: Mapping[str, Arm], results: Path
) -> tuple[Plan, Rows]:
  everything = tuple(arm for arms in candidates.values() for arm in arms)
  plan = _plan(run, tuple(chosen.values()), everything)
  results.mkdir(exist_ok=True)
  write_json(results / 'experiment.json', to_dict(plan.run.experiment))
  return plan, _run(study, plan, results / 'runs.csv', 'blocks')


def _plan(run: Run, arms: Sequence[Arm], everything: Sequence[Arm]) -> Plan:
  """Runs of arms; those of equal settings, tuned or not, are one run."""
  experiment = replace(run.experiment, arms=tuple(arms), baseline=arms[0].name, challenger='')
  return make_plan(replace(run, experiment=experiment), everything, run.workdir / 'logs')


def _run(study: Study, plan: Plan, path: Path, what: str) -> Rows:
  rows, jobs = Rows(plan, path), plan.jobs()
  rows.write()
  distinct = len({one.directory for one in plan.trained})
  print(f'{what}: {distinct} runs, of which {distinct - len(jobs)} have finished', flush=True)
  run_jobs(jobs, plan.run.workdir, study.at_once, lambda job, outcome: rows.ended(job.directory, outcome))
  return rows


def _finished(plan: Plan, rows: Rows, chosen: Mapping[str, Arm]) -> list[str]:
  """The blocks of which every seed has finished."""
  runs = plan.of('ranker')
  return [name for name, arm in chosen.items() if all(rows.status(one) == FINISHED for one in runs[arm.name])]


def _predictions(plan: Plan, chosen: Mapping[str, Arm], names: Sequence[str]) -> dict[str, list[Path]]:
  """Block -> files of its predictions, one a seed."""
  runs = plan.of('ranker')
  return {name: [one.directory / 'predictions.npz' for one in runs[chosen[name].name]] for name in names}


def _about(study: Study, run: Run, trials: Mapping[str, Sequence[Trial]]) -> str:
  info, experiment = run.dataset.info, run.experiment
  split = experiment.evaluate.split
  seeds = ', '.join(map(str, experiment.seeds))
  parts = [f'Data: {info.source}; measured on the {split} split; seeds {seeds}.']
  if split == 'validation':
    parts.append('The test split was not read.' + (' Settings were chosen on this split too.' if trials else ''))
  if trials:
    budget = len(next(iter(trials.values())))
    parts.append(
      f'Every block had the same budget: {budget} settings, trained with seed {experiment.seeds[0]}, the best '
      f'{study.decision.metric} on the validation split chosen (last table).'
    )
  else:
    parts.append('No block was tuned: each has the settings of its file.')
  licence = f'Terms of the data: {info.licence}.' if info.licence else ''
  return '\n\n'.join(part for part in (' '.join(parts), study.file.arms.about, licence) if part)
