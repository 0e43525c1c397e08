"""Runs an experiment's stages in order: prepare, pretrain, finetune, evaluate, export, report. Each resumes."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from pinfm_jax.config import Arm, Experiment, PinFMConfig
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.featurize import FeatureSchema
from pinfm_jax.data.pipeline import Requests, action_bits
from pinfm_jax.data.simulator import SimulatorConfig, simulate, simulated_prepare_config
from pinfm_jax.data.sources import prepare_source
from pinfm_jax.data.splits import Split, split_by_time
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.comparison import compare
from pinfm_jax.evaluate.predict import predict
from pinfm_jax.evaluate.ranking import RankingPredictions
from pinfm_jax.evaluate.retrieval import evaluate_retrieval, retrieval_task
from pinfm_jax.overrides import apply_overrides, from_dict, to_dict
from pinfm_jax.progress import duration
from pinfm_jax.report import write_report
from pinfm_jax.serve.from_checkpoint import export_and_check
from pinfm_jax.train.checkpoint import load_arrays
from pinfm_jax.train.finetune import FinetuneTask, finetune, training_steps
from pinfm_jax.train.pretrain import pretrain
from pinfm_jax.train.sharding import make_mesh
from pinfm_jax.workdir import claim, is_done, read_results, write_json, write_text

STAGES = ('prepare', 'pretrain', 'finetune', 'evaluate', 'export', 'report')


def run(experiment: Experiment, workdir: str | Path, stages: tuple[str, ...] = STAGES) -> dict[str, float]:
  """Runs or resumes the stages and returns the named figures of those that evaluate.

  Args:
    experiment: what to run.
    workdir: where everything is written; finished stages found there are kept.
    stages: which ones, in the order of STAGES.

  Raises:
    UserError: unknown stages, data that does not fit, a workdir of another configuration.
  """
  unknown = [stage for stage in stages if stage not in STAGES]
  if unknown:
    raise UserError(f"unknown stage '{unknown[0]}'; expected some of {','.join(STAGES)}")
  context = Run(experiment, Path(workdir))
  context.workdir.mkdir(parents=True, exist_ok=True)
  write_json(context.workdir / 'experiment.json', to_dict(experiment))
  functions: Mapping[str, Callable[[Run], None]] = {
    'prepare': prepare_stage,
    'pretrain': pretrain_stage,
    'finetune': finetune_stage,
    'evaluate': evaluate_stage,
    'export': export_stage,
    'report': report_stage,
  }
  for stage in (s for s in STAGES if s in stages):
    begin = time.monotonic()
    print(f'== {stage}', flush=True)
    functions[stage](context)
    print(f'== {stage} took {duration(time.monotonic() - begin)}', flush=True)
  return read_results(context.workdir) if is_done(context.workdir) else {}


@dataclass(frozen=True)
class Run:
  """An experiment in its directory, with what the stages share."""

  experiment: Experiment
  workdir: Path

  @property
  def data_directory(self) -> Path:
    """Where the prepared data set is."""
    data = self.experiment.data
    return Path(data.path) if data.source == 'prepared' else self.workdir / 'data'

  @cached_property
  def dataset(self) -> PreparedDataset:
    """The prepared data set."""
    return PreparedDataset.open(self.data_directory)

  @cached_property
  def split(self) -> Split:
    """The time split."""
    return split_by_time(self.dataset, self.experiment.data)

  @cached_property
  def mesh(self) -> Mesh:
    """The device mesh."""
    return make_mesh(self.experiment.mesh)

  @cached_property
  def model(self) -> PinFMConfig:
    """The model's configuration with the data set's vocabulary sizes."""
    info = self.dataset.info
    return replace(self.experiment.model, num_actions=len(info.actions), num_surfaces=len(info.surfaces))

  def pretrain_directory(self, seed: int) -> Path:
    """Directory of a seed's pretraining run."""
    return self.workdir / f'seed{seed}' / 'pretrain'

  def arm_directory(self, seed: int, arm: Arm) -> Path:
    """Directory of a seed's fine-tuned arm."""
    return self.workdir / f'seed{seed}' / arm.directory

  def arm_experiment(self, arm: Arm) -> Experiment:
    """The experiment with the arm's overrides."""
    return apply_overrides(self.experiment, arm.overrides)

  def schema(self, experiment: Experiment) -> FeatureSchema:
    """The ranker's inputs."""
    return FeatureSchema.of(
      self.dataset.info, experiment.ranker.item_buckets, experiment.finetune.history_length
    )

  def requests(self, experiment: Experiment, part: str) -> Requests:
    """The requests of 'finetune', 'validation' or 'test'."""
    least = 1 if part == 'finetune' else experiment.data.min_candidates
    times = getattr(self.split, part)
    return Requests.between(self.dataset, self.schema(experiment), experiment.finetune, times, least)

  def task(self, experiment: Experiment, steps: int) -> FinetuneTask:
    """The fine-tuning task of an arm."""
    bits = action_bits(experiment.pretrain, self.dataset.info.actions)
    return FinetuneTask(self.model, experiment.ranker, experiment.finetune, self.schema(experiment), steps, bits)


def prepare_stage(run: Run) -> None:
  """Makes the prepared data set, from the simulator or a public source's files."""
  data = run.experiment.data
  if data.source == 'prepared' or (run.data_directory / 'dataset.json').exists():
    claimed = run.workdir / 'prepare'
    if data.source != 'prepared':
      claim(claimed, _data_settings(run))
    info = run.dataset.info
    print(f'data: {run.data_directory} ({info.counts.users} users, {info.counts.requests} requests), as it stands')
    return
  claim(run.workdir / 'prepare', _data_settings(run))
  if data.source == 'simulator':
    feed = simulate(from_dict(SimulatorConfig, data.simulator), run.workdir / 'raw')
    prepare(simulated_prepare_config(feed, run.data_directory))
  else:
    if not data.path:
      raise UserError(f"data.path is empty; set it to the folder of the {data.source} files (--set data.path=DIR)")
    prepare_source(data.source, data.path, run.data_directory)
  counts = run.dataset.info.counts
  print(f'data: {counts.users} users, {counts.items} items, {counts.events.kept} events, {counts.requests} requests')


def pretrain_stage(run: Run) -> None:
  """Pretrains one tower a seed and measures whole-catalogue retrieval."""
  if not any(_needs_pretraining(run.arm_experiment(arm)) for arm in run.experiment.arms):
    print('no arm starts from a pretrained tower: nothing to do')
    return
  for seed in run.experiment.seeds:
    directory = run.pretrain_directory(seed)
    claim(directory, _pretrain_settings(run, seed))
    if is_done(directory):
      print(f'{directory}: finished earlier')
      continue
    config = run.experiment.pretrain
    state = pretrain(run.dataset, run.split.pretrain_until, run.model, config, run.mesh, directory, seed)
    evaluate = run.experiment.evaluate
    task = retrieval_task(
      run.dataset,
      run.split.pretrain_until,
      config.downstream_length,
      run.experiment.finetune.history_block,
      action_bits(config, run.dataset.info.actions),
      evaluate.retrieval_users,
    )
    figures = evaluate_retrieval(task, run.model, state.params['pinfm'], state.tables.rows_GE, evaluate.ks)
    write_json(directory / 'results.json', {f'retrieval/{name}': value for name, value in figures.items()})


def finetune_stage(run: Run) -> None:
  """Fine-tunes every arm with every seed and saves its predictions on the evaluation split."""
  for seed in run.experiment.seeds:
    for arm in run.experiment.arms:
      experiment, directory = run.arm_experiment(arm), run.arm_directory(seed, arm)
      claim(directory, _finetune_settings(run, experiment, seed))
      if is_done(directory):
        print(f'{directory}: finished earlier')
        continue
      requests = run.requests(experiment, 'finetune')
      task = run.task(experiment, training_steps(experiment.finetune, len(requests)))
      pretrained = run.pretrain_directory(seed) if _needs_pretraining(experiment) else None
      state = finetune(task, requests, run.mesh, directory, seed, pretrained)
      with jax.set_mesh(run.mesh):
        rows_GE = state.tables.rows_GE if state.tables else None
        part = run.requests(experiment, experiment.evaluate.split)
        predictions = predict(task, state.params, rows_GE, state.constants, part, f'{directory.name}: predict')
      predictions.save(directory / 'predictions.npz')
      write_json(directory / 'results.json', {'steps': task.steps, 'requests': len(requests)})


def evaluate_stage(run: Run) -> None:
  """Compares the arms over all seeds; writes and prints the tables."""
  experiment = run.experiment
  arms = {
    arm.name: [_predictions(run.arm_directory(seed, arm)) for seed in experiment.seeds] for arm in experiment.arms
  }
  comparison = compare(arms, experiment.baseline, experiment.evaluate.utility, experiment.evaluate.labels)
  figures = comparison.figures()
  lines = [f'# {experiment.name}', '', _about(run), '', comparison.markdown()]
  retrieval = _retrieval_figures(run)
  if retrieval:
    figures |= retrieval
    lines += ['', _retrieval_table(retrieval, experiment.evaluate.ks)]
  write_json(run.workdir / 'results.json', figures)
  write_text(run.workdir / 'results.md', '\n'.join(lines) + '\n')
  print(_about(run))
  print(comparison.text())
  if retrieval:
    print(_retrieval_table(retrieval, experiment.evaluate.ks))


def export_stage(run: Run) -> None:
  """Exports the first seed's PinFM ranker as a bundle and checks its scores against the evaluation's."""
  arms = [arm for arm in run.experiment.arms if run.arm_experiment(arm).ranker.sequence == 'pinfm']
  if not arms:
    print('no arm has PinFM: nothing to export')
    return
  seed, arm = run.experiment.seeds[0], arms[-1]
  figures, text = export_and_check(run, seed, arm)
  results = read_results(run.workdir) if is_done(run.workdir) else {}
  write_json(run.workdir / 'results.json', results | figures)
  print(text)


def report_stage(run: Run) -> None:
  """Writes the HTML page."""
  print(f'report: {write_report(run.workdir)}')


def _needs_pretraining(experiment: Experiment) -> bool:
  return experiment.ranker.sequence == 'pinfm' and experiment.finetune.init == 'pretrained'


def _data_settings(run: Run) -> dict[str, Any]:
  data = run.experiment.data
  return {'data': {'source': data.source, 'path': data.path, 'simulator': dict(data.simulator)}}


def _pretrain_settings(run: Run, seed: int) -> dict[str, Any]:
  return {
    'data': dataclasses.asdict(run.experiment.data) | {'checksum': run.dataset.info.checksum},
    'model': dataclasses.asdict(run.model),
    'pretrain': dataclasses.asdict(run.experiment.pretrain),
    'seed': seed,
  }


def _finetune_settings(run: Run, experiment: Experiment, seed: int) -> dict[str, Any]:
  upstream = _pretrain_settings(run, seed)
  if not _needs_pretraining(experiment):
    del upstream['pretrain']
  settings = {'ranker': experiment.ranker, 'finetune': experiment.finetune}
  return upstream | {k: dataclasses.asdict(v) for k, v in settings.items()} | {'split': experiment.evaluate.split}


def _predictions(directory: Path) -> RankingPredictions:
  if not is_done(directory):
    raise UserError(f'{directory} is not fine-tuned yet; run the finetune stage first (pinfm run FILE)')
  return RankingPredictions.load(directory / 'predictions.npz')


def _retrieval_figures(run: Run) -> dict[str, float]:
  """Mean over the seeds of the pretrained towers' retrieval figures."""
  directories = [run.pretrain_directory(seed) for seed in run.experiment.seeds]
  results = [read_results(directory) for directory in directories if is_done(directory)]
  return {name: sum(r[name] for r in results) / len(results) for name in results[0]} if results else {}


def _retrieval_table(figures: Mapping[str, float], ks: tuple[int, ...]) -> str:
  names = [f'{metric}@{k}' for k in ks for metric in ('hr', 'ndcg')] + ['mrr']
  lines = [
    f'Whole-catalogue next item, {figures["retrieval/catalogue"]:.0f} items, {figures["retrieval/users"]:.0f} users '
    f'({100 * figures["retrieval/unseen_share"]:.1f} % left out: their item is newer than the catalogue)',
    '',
    '| model | ' + ' | '.join(name.upper() for name in names) + ' |',
    '|' + ' --- |' * (len(names) + 1),
  ]
  for row, label in (('tower', 'pretrained tower'), ('popularity', 'popularity')):
    lines.append(f'| {label} | ' + ' | '.join(f'{figures[f"retrieval/{row}/{n}"]:.4f}' for n in names) + ' |')
  return '\n'.join(lines)


def _about(run: Run) -> str:
  info, part = run.dataset.info, run.experiment.evaluate.split
  licence = f' Terms of the data: {info.licence}.' if info.licence else ''
  return f'Data: {info.source}; {part} split; {len(run.experiment.seeds)} seed(s).{licence}'
