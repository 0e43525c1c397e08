"""Stage `pretrain`: one tower a seed, measured by whole-catalogue retrieval."""

from functools import partial
from pathlib import Path

import jax

from pinfm_jax.data.pipeline import action_bits
from pinfm_jax.data.tokens import TokenInputs
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.retrieval import Retrieval, RetrievalProtocol, retrieval_task
from pinfm_jax.serve.warm_start import open_start
from pinfm_jax.stages.context import Run, needs_pretraining
from pinfm_jax.stages.evaluate import measured_figure, unmeasured
from pinfm_jax.train.distributed import on_first
from pinfm_jax.train.loop import Evaluate
from pinfm_jax.train.pretrain import pretrain
from pinfm_jax.train.pretrain_settings import EVAL_METRICS
from pinfm_jax.train.step import TrainState, evaluated
from pinfm_jax.workdir import RESULTS, claim, has_work, is_done, read_results, write_json


def pretrain_stage(run: Run) -> None:
  """Pretrains every seed's towers that have not finished: arms with the same settings share one."""
  runs = needed_towers(run)
  if not runs:
    print('no arm starts from a pretrained tower: nothing to do')
  for seed in run.experiment.seeds:
    for own in runs:
      directory = own.pretrain_directory(seed)
      if on_first('pretrain: settings', partial(_finished, own, seed)):
        print(f'{directory}: finished earlier')
      else:
        _pretrain(own, seed)


def needed_towers(run: Run) -> list[Run]:
  """One run for each tower that the arms start from, that of the launch file first; itself without arms."""
  if not run.experiment.arms:
    return [run]
  own = [run.of_arm(arm) for arm in run.experiment.arms]
  seed = run.experiment.seeds[0]
  towers = {arm.pretrain_directory(seed): arm for arm in own if needs_pretraining(arm.experiment)}
  return [towers[directory] for directory in sorted(towers)]


def _finished(run: Run, seed: int) -> bool:
  directory = run.pretrain_directory(seed)
  claim(directory, run.pretrain_settings(seed), has_work(directory))
  return is_measured(run, seed)


def is_measured(run: Run, seed: int) -> bool:
  """Whether a seed's tower has all figures that are asked for; if it has others, they are dropped."""
  directory = run.tower_results(seed)
  if is_done(directory) and unmeasured(run, read_results(directory)):
    (directory / RESULTS).unlink()  # measuring again needs no training
  return is_done(directory)


def _pretrain(run: Run, seed: int) -> None:
  config, split, evaluate = run.experiment.pretrain, run.split, run.experiment.evaluate
  start = None
  if config.start_from:
    start = open_start(
      config.start_from, 'pretrain.start_from', run.model.tables, run.dataset.info, tower=run.model.tower
    )
  state = pretrain(
    run.dataset, split.pretrain_until, run.model, config, run.mesh, run.pretrain_directory(seed), seed,
    run.experiment.mesh, run.profile, start, split.until_by_user(run.dataset.num_users), split.held_out, _ranking(run),
  )  # fmt: skip
  state, measure = evaluated(state), retrieval_of(run, evaluate.split, evaluate.ks)
  with jax.set_mesh(run.mesh):
    figures = measure(state.params['pinfm'], state.tables.rows_GE)
  results = {f'retrieval/{name}': value for name, value in figures.items()}
  results |= {measured_figure(key): value for key, value in run.retrieval_settings().items()}
  on_first('pretrain: results', partial(_write, run.tower_results(seed), results))


def _write(directory: Path, results: dict[str, float]) -> None:
  directory.mkdir(parents=True, exist_ok=True)
  write_json(directory / RESULTS, results)


def retrieval_of(run: Run, split: str, ks: tuple[int, ...]) -> Retrieval:
  """The whole-catalogue evaluation of a run's towers on a split."""
  experiment, evaluate = run.experiment, run.experiment.evaluate
  settings, events_back = run.retrieval_settings(), run.split.events_back(split)
  task = retrieval_task(
    run.dataset,
    run.split.pretrain_until,
    experiment.pretrain.downstream_length,
    settings['finetune.history_block'],
    action_bits((run.base or run).experiment.pretrain, run.dataset.info.actions),  # all arms are asked for the same
    settings['evaluate.retrieval_users'],
    tokens=TokenInputs.of(run.model, run.dataset),
    protocol=RetrievalProtocol(run.split.held_out, events_back, evaluate.filter_seen, evaluate.whole_catalogue),
    until_U=run.split.until_by_user(run.dataset.num_users),
  )
  return Retrieval(task, run.model, ks, layout=experiment.mesh)


def _ranking(run: Run) -> Evaluate | None:
  """Measures a state on the validation events, for the choice of the checkpoint; None where a loss is measured.

  Raises:
    UserError: the log has no such events.
  """
  if not run.experiment.pretrain.eval_ranking:
    return None
  if run.split.pretrain_until is not None:
    raise UserError(
      'pretrain.eval_ranking ranks the event before the last of each history, but this log has impressions and is '
      'split by time; set pretrain.eval_ranking=false'
    )
  measure = retrieval_of(run, 'validation', (10,))

  def rank(state: TrainState) -> dict[str, float]:
    figures = measure(state.params['pinfm'], state.tables.rows_GE)
    return {name: figures[f'tower/{name}'] for name in EVAL_METRICS}

  return rank
