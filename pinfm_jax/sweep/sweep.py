"""Runs a sweep: prepares the data, trains each tower and each ranker once, compares them."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from pinfm_jax.checks import check_experiment
from pinfm_jax.config import Arm, Experiment
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import to_dict
from pinfm_jax.run import hold_workdir
from pinfm_jax.stages.context import Run
from pinfm_jax.stages.prepare import prepare_stage
from pinfm_jax.sweep.arms_file import ArmsFile, DataFacts
from pinfm_jax.sweep.grid import Axis, grid_arms
from pinfm_jax.sweep.jobs import FINISHED, Job, machine_slots, run_jobs
from pinfm_jax.sweep.plan import Plan, make_plan
from pinfm_jax.sweep.results import Rows, findings
from pinfm_jax.workdir import read_json, write_json


@dataclass(frozen=True)
class Sweep:
  """What to run.

  Attributes:
    experiment: the launch file's, with seeds and split as asked for.
    name: of the sweep; its results stand in WORKDIR/sweeps/NAME.
    file: of arms, or None.
    axes: of the grid.
    only: names of arms to run, besides the baseline; empty = all.
    at_once: runs at a time.
    changed: settings of the experiment that the command changed.
  """

  experiment: Experiment
  name: str
  file: ArmsFile | None = None
  axes: tuple[Axis, ...] = ()
  only: tuple[str, ...] = ()
  at_once: int = 1
  changed: tuple[str, ...] = ()


def run_sweep(sweep: Sweep, workdir: Path) -> bool:
  """Runs or resumes a sweep: what has finished is kept, by whatever command.

  Args:
    sweep: what to run.
    workdir: of the launch file; prepared data, towers and rankers are shared with `pinfm run`.

  Returns:
    Whether every run has finished.

  Raises:
    UserError: arms that cannot work, a workdir of other settings or in use, or data that cannot be prepared.
  """
  machine_slots(sweep.at_once)  # before the data are prepared
  directory = workdir / 'sweeps' / sweep.name
  with ExitStack() as lock:
    hold_workdir(workdir, lock)
    directory.mkdir(parents=True, exist_ok=True)
    prepare_data(sweep.experiment, workdir, directory / 'logs')
    plan = _plan(sweep, workdir, directory / 'logs')
    _check_name(directory / 'experiment.json', plan.run.experiment)
    write_json(directory / 'experiment.json', to_dict(plan.run.experiment))
    rows = Rows(plan, directory / 'runs.csv')
    rows.write()
    jobs = plan.jobs()
    print('\n'.join([*_unreached(sweep.changed, plan.run.experiment.arms), _size(plan, jobs)]), flush=True)
    run_jobs(jobs, workdir, sweep.at_once, lambda job, outcome: rows.ended(job.directory, outcome))
    found = findings(plan, rows, f'{sweep.experiment.name}: {sweep.name}', sweep.file.about if sweep.file else '')
    found.write(directory)
  print(f'\n{found.text()}\n\n{directory / "results.md"}')
  return all(rows.status(one) == FINISHED for one in plan.trained)


def _check_name(path: Path, experiment: Experiment) -> None:
  """Refuses to write over the results of arms that are not among this sweep's."""
  if not path.exists():
    return
  own, earlier = ({arm['name'] for arm in found['arms']} for found in (to_dict(experiment), read_json(path)))
  if not earlier <= own:
    raise UserError(
      f'{path.parent} holds the results of other arms too ({", ".join(sorted(earlier - own))}); '
      'give this sweep a --name of its own'
    )


def sweep_experiment(sweep: Sweep, facts: DataFacts) -> Experiment:
  """The launch file's experiment with the sweep's arms, baseline and challenger.

  A grid alone varies the launch file's experiment and keeps its baseline beside; a grid with a file of arms runs
  every arm at every point of the grid, and the baseline as it is besides.

  Raises:
    UserError: no arms, a baseline or challenger that is none of them, or --only names nothing.
  """
  experiment, file = sweep.experiment, sweep.file
  arms = file.arms(experiment, facts) if file else experiment.arms
  baseline = (file.baseline if file else '') or experiment.baseline
  names = [arm.name for arm in arms]
  for kind, name in (
    ('baseline', baseline if arms or not sweep.axes else ''),
    ('challenger', file and file.challenger),
  ):
    if name and name not in names:
      raise UserError(f"the {kind} is '{name}'; expected one of the arms: {', '.join(names) or 'none'}")
  own = tuple(arm for arm in arms if arm.name == baseline)
  if sweep.axes:
    arms = (*own, *grid_arms(arms if file else (Arm(''),), sweep.axes))
    baseline = baseline if own else arms[0].name
  arms = _chosen(arms, sweep.only, baseline)
  challenger = (file.challenger if file else '') or experiment.challenger
  challenger = challenger if challenger in [arm.name for arm in arms] else ''
  return replace(experiment, arms=arms, baseline=baseline, challenger=challenger)


def _chosen(arms: Sequence[Arm], only: Sequence[str], baseline: str) -> tuple[Arm, ...]:
  names = [arm.name for arm in arms]
  for name in only:
    if name not in names:
      raise UserError(f"--only got '{name}'; the arms are: {', '.join(names)}")
  return tuple(arm for arm in arms if not only or arm.name in (*only, baseline))


def _plan(sweep: Sweep, workdir: Path, logs: Path) -> Plan:
  run = Run(sweep.experiment, workdir)
  experiment = sweep_experiment(sweep, data_facts(run))
  return make_plan(replace(run, experiment=experiment), sweep.experiment.arms, logs)


def data_facts(run: Run) -> DataFacts:
  """What the files of arms may ask about the data."""
  info = run.dataset.info
  content = run.of_arm(Arm('content', {'ranker.candidate_content': True}))
  try:
    has_content = bool(content.schema)
  except UserError:
    has_content = False
  requests = 0
  if run.experiment.arms:
    run.requests(run.experiment.evaluate.split)  # fails here if there are none, not after the pretraining
    requests = len(run.requests('finetune'))
  return DataFacts(requests, has_content, info.actions, info.labels)


def prepare_data(experiment: Experiment, workdir: Path, logs: Path) -> None:
  """Prepares the data, if need be in a process of its own: memory that this takes is free again for the runs."""
  check_experiment(experiment)
  run = Run(experiment, workdir)
  if (run.data_directory / 'dataset.json').exists():
    prepare_stage(run)  # checks that these are the data
    return
  job = Job('prepare', 'prepare', experiment, workdir / 'prepare', logs / 'prepare.log')
  outcome = run_jobs([job], workdir)[job.directory]
  if outcome.status != FINISHED:
    raise UserError(f'the data could not be prepared: {outcome.message.splitlines()[-1]} (log: {job.log})')


def _unreached(changed: Sequence[str], arms: Sequence[Arm]) -> list[str]:
  """A line for each changed setting that some arms set themselves: it is not what these are run with."""
  own = {key: [f"'{arm.name}'" for arm in arms if key in arm.overrides] for key in changed}
  return [f'note: these arms have a {key} of their own: {", ".join(names)}' for key, names in own.items() if names]


def _size(plan: Plan, jobs: Sequence[Job]) -> str:
  counts = {stage: sum(job.stage == stage for job in jobs) for stage in ('pretrain', 'finetune')}
  distinct = len({one.directory for one in plan.trained})
  return (
    f'{len(plan.run.experiment.arms)} arms, {len(plan.run.experiment.seeds)} seed(s): {distinct} runs, of which '
    f'{distinct - len(jobs)} have finished; to do: {counts["pretrain"]} pretrainings, {counts["finetune"]} rankers'
  )
