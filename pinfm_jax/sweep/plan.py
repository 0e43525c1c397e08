"""What a sweep has to run: its arms and seeds, the towers that they share, and what stands already."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pinfm_jax.checks import check_experiment
from pinfm_jax.config import Arm, Experiment
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.stages.context import Run, needs_pretraining
from pinfm_jax.stages.pretrain import is_measured
from pinfm_jax.sweep.grid import settings_text
from pinfm_jax.sweep.jobs import Job
from pinfm_jax.workdir import claim, has_work, is_done


@dataclass(frozen=True)
class Trained:
  """A tower or a ranker of the sweep, with one seed.

  Attributes:
    kind: 'tower' or 'ranker'.
    name: of the arm; a tower is called by its settings.
    settings: what differs from the launch file, as text.
    seed: of the run.
    directory: where its results stand: a tower's own, or a ranker's of the measured split.
    job: that trains it, whether it is finished or not.
  """

  kind: str
  name: str
  settings: str
  seed: int
  directory: Path
  job: Job


@dataclass(frozen=True)
class Plan:
  """Everything that a sweep trains.

  Attributes:
    run: the launch file's run, with the arms and seeds of the sweep.
    dataset: that all runs share.
    towers_alone: the launch file has no rankers: arms differ in their towers.
    trained: towers first; arms of equal settings share a directory.
  """

  run: Run
  dataset: PreparedDataset
  towers_alone: bool
  trained: tuple[Trained, ...]

  def jobs(self) -> list[Job]:
    """What is not finished, towers first, each once."""
    jobs: dict[Path, Job] = {}
    for one in self.trained:
      if not is_done(one.directory):
        jobs.setdefault(one.directory, one.job)
    return [replace(job, needs=job.needs if job.needs in jobs else None) for job in jobs.values()]

  def of(self, kind: str) -> dict[str, list[Trained]]:
    """Name -> its runs, one a seed."""
    named: dict[str, list[Trained]] = {}
    for one in self.trained:
      if one.kind == kind:
        named.setdefault(one.name, []).append(one)
    return named


def make_plan(run: Run, launch_arms: Sequence[Arm], logs: Path) -> Plan:
  """Lays out the runs, and refuses directories that hold something else.

  Args:
    run: whose experiment has the sweep's arms, baseline, seeds and split.
    launch_arms: the launch file's own: an arm of the same settings is the same run. Without any it has no rankers,
      and arms that start from no pretrained tower are left out.
    logs: folder of the logs.

  Raises:
    UserError: an arm that cannot work, or a directory made with other settings.
  """
  experiment = run.experiment
  towers_alone = not launch_arms
  check_experiment(experiment, towers_alone)
  homes = _homes(experiment, launch_arms)
  base = replace(run, experiment=replace(experiment, arms=())) if towers_alone else run
  towers, rankers, known = [], [], set()
  for arm in experiment.arms:
    own, home = base.of_arm(arm), homes[arm.name]
    if towers_alone and not needs_pretraining(own.experiment):
      continue  # nothing to measure: it has no pretrained tower
    for seed in experiment.seeds:
      alone = replace(experiment, seeds=(seed,), arms=(home,), baseline=home.name, challenger='')
      tower = None
      if towers_alone or needs_pretraining(own.experiment):
        tower = own.pretrain_directory(seed)
        if towers_alone or tower not in known:
          towers.append(_tower(own, arm, seed, alone, logs, towers_alone))
          known.add(tower)
      if not towers_alone:
        trained, directory = run.arm_directory(seed, home), run.measured_directory(seed, home)
        job = Job(f'{arm.name}, seed {seed}', 'finetune', alone, directory, _log(logs, trained), tower)
        rankers.append(Trained('ranker', arm.name, settings_text(arm.overrides), seed, directory, job))
        _check_stands(trained, own.finetune_settings(seed))
        if is_done(directory):
          claim(directory, run.measured_settings())
  return Plan(run, base.dataset, towers_alone, (*towers, *rankers))


def _homes(experiment: Experiment, launch_arms: Sequence[Arm]) -> Mapping[str, Arm]:
  """The arm whose directory each arm uses: the first one with equal settings, the launch file's before the sweep's."""
  candidates = [(arm, apply_overrides(experiment, arm.overrides)) for arm in (*launch_arms, *experiment.arms)]
  homes = {}
  for arm in experiment.arms:
    settings = apply_overrides(experiment, arm.overrides)
    homes[arm.name] = next(home for home, theirs in candidates if theirs == settings)
  for arm in launch_arms:
    for home in homes.values():
      if home.directory == arm.directory and home is not arm:
        raise UserError(
          f"arm '{home.name}' has the name of the launch file's arm '{arm.name}' but other settings; rename it"
        )
  return homes


def _tower(own: Run, arm: Arm, seed: int, alone: Experiment, logs: Path, towers_alone: bool) -> Trained:
  directory, results = own.pretrain_directory(seed), own.tower_results(seed)
  launch = own.base.experiment
  changed = {
    key: value
    for key, value in arm.overrides.items()
    if key.startswith(('model.', 'pretrain.')) and apply_overrides(launch, {key: value}) != launch
  }
  is_own = directory.name == 'pretrain'
  settings = '' if is_own else settings_text(changed)
  name = arm.name if towers_alone else settings or "the launch file's"
  job = Job(f'pretraining ({name}), seed {seed}', 'pretrain', alone, results, _log(logs, directory))
  _check_stands(directory, own.pretrain_settings(seed))
  is_measured(own, seed)  # drops results that lack figures
  return Trained('tower', name, settings, seed, results, replace(job, towers_alone=towers_alone))


def _check_stands(directory: Path, settings: Mapping) -> None:
  if has_work(directory):
    claim(directory, settings)


def _log(logs: Path, directory: Path) -> Path:
  return logs / f'{directory.parent.name}_{directory.name}.log'
