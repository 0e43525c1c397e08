"""The subjects of a finished run (`pinfm run`): its fine-tuned ranker with PinFM, and its pretrained tower."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from pinfm_jax.config import Arm
from pinfm_jax.data.pipeline import Requests, action_bits
from pinfm_jax.data.tokens import TokenInputs
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.ranking import HIT_K
from pinfm_jax.evaluate.retrieval import item_targets, retrieval_task
from pinfm_jax.model.ranker import DenseStats
from pinfm_jax.robustness.subjects import NextItemSubject, RankingSubject, Weights, bank_of
from pinfm_jax.stages.context import Run
from pinfm_jax.train.finetune import without_randomness
from pinfm_jax.train.restore import stored_state


def pinfm_arm(run: Run, name: str = '') -> Arm:
  """The arm of a name; '' = the last one whose ranker reads PinFM.

  Raises:
    UserError: there is none, its ranker reads no PinFM, or its events see later ones.
  """
  arms = [arm for arm in run.experiment.arms if arm.name == name or not name]
  with_pinfm = [arm for arm in arms if run.of_arm(arm).experiment.ranker.sequence == 'pinfm']
  if not with_pinfm:
    known = ', '.join(arm.name for arm in run.experiment.arms) or 'none'
    raise UserError(f"no arm '{name}' whose ranker reads PinFM; the arms of {run.workdir} are: {known}")
  if run.of_arm(with_pinfm[-1]).experiment.ranker.bidirectional:
    raise UserError(
      f"the events of arm '{with_pinfm[-1].name}' see later ones, so its sequence losses say nothing; "
      'name an arm with ranker.bidirectional=false'
    )
  return with_pinfm[-1]


def ranking_subject(run: Run, arm: Arm, seed: int, bank: int, requests: int = 0) -> tuple[RankingSubject, Weights]:
  """The evaluation split's requests with more candidates than HIT@3 looks at, and the fine-tuned ranker.

  Args:
    run: a finished run.
    arm: see `pinfm_arm`.
    seed: of its training.
    bank: items in the bank of negatives.
    requests: at most so many, drawn; 0 = all.

  Raises:
    UserError: it is not fine-tuned, or no request has so many candidates.
  """
  own = run.of_arm(arm)
  experiment, stored = own.experiment, stored_state(run.arm_directory(seed, arm))
  every = Requests.between(
    run.dataset, own.schema, experiment.finetune, getattr(own.split, experiment.evaluate.split), HIT_K + 1, own.tokens
  )
  row = np.unique(every.request_row)
  if requests and requests < len(row):
    row = np.sort(np.random.default_rng(0).permutation(row)[:requests])
  # A request is one example: whoever attacks or repairs its history does so once.
  most = int(run.dataset.requests['candidates'].to_numpy()[row].max())
  finetune = replace(without_randomness(experiment.finetune), candidates=most)
  task = replace(own.task(1), config=finetune)
  state = stored.parts('params', 'constants')
  params = {name: value for name, value in state['params'].items() if name != 'log_temperature'}
  rows_GE = jnp.asarray(stored.table(task.model.tables))
  weights = {
    'ranker': params,
    'stats': DenseStats(**state['constants']),
    'bank': bank_of(own.pretrained_items, bank, task.model, params['pinfm'], rows_GE, own.tokens),
    **_tower(params['pinfm'], rows_GE, state['params']['log_temperature']),
  }
  chosen = replace(every, config=finetune, request_row=row, first=np.zeros(len(row), np.int64))
  label = own.dataset.info.labels.index(experiment.evaluate.main_label)
  return RankingSubject(task, chosen, experiment.pretrain, label), weights


def next_item_subject(run: Run, arm: Arm, seed: int, bank: int, users: int = 0) -> tuple[NextItemSubject, Weights]:
  """Users' next items in the catalogue, and the pretrained tower that the arm starts from.

  Args:
    run: a finished run.
    arm: see `pinfm_arm`.
    seed: of its training.
    bank: items in the bank of negatives.
    users: at most so many, drawn; 0 = as the run's evaluation.
  """
  own = run.of_arm(arm)
  stored = stored_state(own.pretrain_directory(seed), own.experiment.pretrain.use_checkpoint)
  model, experiment, tokens = own.model, own.experiment, TokenInputs.of(own.model, run.dataset)
  window = (experiment.pretrain.downstream_length, experiment.finetune.history_block)
  bits = action_bits(run.experiment.pretrain, run.dataset.info.actions)
  until_ms, until_U = run.split.pretrain_until, run.split.until_by_user(run.dataset.num_users)
  users = users or experiment.evaluate.retrieval_users
  collect = partial(retrieval_task, run.dataset, until_ms, *window, bits, users, 0, tokens, until_U=until_U)
  subject = NextItemSubject(model, experiment.pretrain, collect, until_ms, run.dataset, tokens, window, bits)
  params = stored.parts('params')['params']
  rows_GE, clean = jnp.asarray(stored.table(model.tables)), subject.clean
  weights = {
    'z_VO': item_targets(clean.catalogue_V, clean.content_VW, model, params['pinfm'], rows_GE),
    'bank': bank_of(clean.catalogue_V, bank, model, params['pinfm'], rows_GE, tokens),
    **_tower(params['pinfm'], rows_GE, params['log_temperature']),
  }
  return subject, weights


def _tower(params: Any, rows_GE: Any, log_temperature: Any) -> dict[str, Any]:
  return {'pinfm': params, 'rows': rows_GE, 'log_temperature': log_temperature}
