"""Stage `pretrain`: one tower a seed, measured by whole-catalogue retrieval."""

from functools import partial

import jax

from pinfm_jax.data.pipeline import action_bits
from pinfm_jax.data.tokens import TokenInputs
from pinfm_jax.evaluate.retrieval import evaluate_retrieval, retrieval_task
from pinfm_jax.serve.warm_start import open_start
from pinfm_jax.stages.context import Run, needs_pretraining
from pinfm_jax.train.distributed import on_first
from pinfm_jax.train.pretrain import pretrain
from pinfm_jax.workdir import claim, has_work, is_done, write_json


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
  return is_done(directory)


def _pretrain(run: Run, seed: int) -> None:
  config, evaluate, directory = run.experiment.pretrain, run.experiment.evaluate, run.pretrain_directory(seed)
  until, start = run.split.pretrain_until, None
  if config.start_from:
    start = open_start(config.start_from, 'pretrain.start_from', run.model.tables, run.dataset.info)
  until_U = run.split.until_by_user(run.dataset.num_users)
  state = pretrain(
    run.dataset, until, run.model, config, run.mesh, directory, seed, run.experiment.mesh, run.profile, start, until_U
  )
  task = retrieval_task(
    run.dataset,
    until,
    config.downstream_length,
    run.experiment.finetune.history_block,
    action_bits((run.base or run).experiment.pretrain, run.dataset.info.actions),  # all arms are asked for the same
    evaluate.retrieval_users,
    tokens=TokenInputs.of(run.model, run.dataset),
  )
  with jax.set_mesh(run.mesh):
    figures = evaluate_retrieval(
      task, run.model, state.params['pinfm'], state.tables.rows_GE, evaluate.ks, layout=run.experiment.mesh
    )
  results = {f'retrieval/{name}': value for name, value in figures.items()}
  on_first('pretrain: results', lambda: write_json(directory / 'results.json', results))
