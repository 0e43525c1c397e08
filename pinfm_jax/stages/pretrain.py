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
  """Pretrains every seed that has not finished."""
  if run.experiment.arms and not any(needs_pretraining(run.arm_experiment(arm)) for arm in run.experiment.arms):
    print('no arm starts from a pretrained tower: nothing to do')
    return
  for seed in run.experiment.seeds:
    directory = run.pretrain_directory(seed)
    if on_first('pretrain: settings', partial(_finished, run, seed)):
      print(f'{directory}: finished earlier')
    else:
      _pretrain(run, seed)


def _finished(run: Run, seed: int) -> bool:
  directory = run.pretrain_directory(seed)
  claim(directory, run.pretrain_settings(seed), has_work(directory))
  return is_done(directory)


def _pretrain(run: Run, seed: int) -> None:
  config, evaluate, directory = run.experiment.pretrain, run.experiment.evaluate, run.pretrain_directory(seed)
  until, start = run.split.pretrain_until, None
  if config.start_from:
    start = open_start(config.start_from, 'pretrain.start_from', run.model.tables, run.dataset.info)
  state = pretrain(
    run.dataset, until, run.model, config, run.mesh, directory, seed, run.experiment.mesh, run.profile, start
  )
  task = retrieval_task(
    run.dataset,
    until,
    config.downstream_length,
    run.experiment.finetune.history_block,
    action_bits(config, run.dataset.info.actions),
    evaluate.retrieval_users,
    tokens=TokenInputs.of(run.model, run.dataset),
  )
  with jax.set_mesh(run.mesh):
    figures = evaluate_retrieval(
      task, run.model, state.params['pinfm'], state.tables.rows_GE, evaluate.ks, layout=run.experiment.mesh
    )
  results = {f'retrieval/{name}': value for name, value in figures.items()}
  on_first('pretrain: results', lambda: write_json(directory / 'results.json', results))
