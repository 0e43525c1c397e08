"""Stage `finetune`: every arm's ranker with every seed, and its predictions on the evaluation split."""

from functools import partial

import jax

from pinfm_jax.config import Arm
from pinfm_jax.evaluate.predict import predict
from pinfm_jax.serve.warm_start import open_start
from pinfm_jax.stages.context import Run, needs_pretraining
from pinfm_jax.train.distributed import on_first
from pinfm_jax.train.finetune import finetune, training_steps
from pinfm_jax.train.restore import WarmStart
from pinfm_jax.workdir import claim, has_work, is_done, write_json


def finetune_stage(run: Run) -> None:
  """Fine-tunes every arm and seed, and measures it on the evaluation split, where that has not been done."""
  for seed in run.experiment.seeds:
    for arm in run.experiment.arms:
      directory = run.arm_directory(seed, arm)
      if on_first('finetune: settings', partial(_finished, run, seed, arm)):
        print(f'{directory}: finished earlier')
      else:
        _finetune(run, seed, arm)


def _finished(run: Run, seed: int, arm: Arm) -> bool:
  directory, measured = run.arm_directory(seed, arm), run.measured_directory(seed, arm)
  claim(directory, run.of_arm(arm).finetune_settings(seed), has_work(directory))
  claim(measured, run.measured_settings(), is_done(measured))
  return is_done(measured)


def _finetune(run: Run, seed: int, arm: Arm) -> None:
  own, directory = run.of_arm(arm), run.arm_directory(seed, arm)
  experiment, requests = own.experiment, own.requests('finetune')
  part = own.requests(experiment.evaluate.split)  # before training: it may turn out to be empty
  task = own.task(training_steps(experiment.finetune, len(requests)))
  pretrained = None
  if needs_pretraining(experiment):
    pretrained = WarmStart(own.pretrain_directory(seed), experiment.pretrain.use_checkpoint)
  elif experiment.finetune.start_from and task.tables:
    setting, info = 'finetune.start_from', run.dataset.info
    pretrained = open_start(
      experiment.finetune.start_from, setting, own.model.tables, info, task.schema, own.model.tower
    )
  state = finetune(task, requests, run.mesh, directory, seed, pretrained, experiment.mesh, run.profile)
  with jax.set_mesh(run.mesh):
    rows_GE = state.tables.rows_GE if state.tables else None
    label = f'{directory.name}: predict'
    seen = own.pretrained_items
    predictions = predict(task, state.params, rows_GE, state.constants, part, label, experiment.mesh, seen)

  def write() -> None:
    measured = run.measured_directory(seed, arm)
    predictions.save(measured / 'predictions.npz')
    write_json(directory / 'results.json', {'steps': task.steps, 'requests': len(requests)})
    write_json(measured / 'results.json', {'requests': len(part)})  # the last: it says that all is there

  on_first('finetune: results', write)
