"""What the files of experiments/ablations share: the arms that they start from, and matched training budgets."""

from collections.abc import Mapping
from typing import Any

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.errors import UserError
from pinfm_jax.sweep.arms_file import DataFacts

WITHOUT, WITH = 'without PinFM', 'with PinFM'
WITHOUT_PINFM = Arm(WITHOUT, {'ranker.sequence': 'none'})  # its TransAct stays, as in the paper's baseline
WITH_PINFM = Arm(WITH)  # as the launch file sets it
PLAIN_CANDIDATE = {'ranker.candidate_content': False, 'ranker.learnable_token': False}
# Nothing is pretrained that a low rate would protect: a tenth of the rate would make a weak control.
SCRATCH = {'finetune.init': 'scratch', 'finetune.update.pretrained_ratio': 1.0}


def equal_compute_epochs(experiment: Experiment, requests: int) -> float:
  """Epochs of fine-tuning that cost what pretraining and fine-tuning cost together.

  Counted are the positions that pass through the tower, forward and backward: a step of pretraining has
  batch_segments x segment_length of them, an epoch of fine-tuning requests x (history_length + candidates), because
  DCAT runs a history once and each candidate once. So

    epochs' = epochs + steps x batch_segments x segment_length / (requests x (history_length + candidates)).

  Attention's share that grows with the square of the length, the losses and the ranker's own layers are left out; all
  but the first favour the arm from scratch, which runs the ranker in the extra epochs too.

  Args:
    experiment: the launch file's.
    requests: training requests of an epoch.

  Raises:
    UserError: there are no training requests.
  """
  if requests < 1:
    raise UserError('the fine-tuning days have no training requests; change data.finetune_days')
  pretrain, finetune = experiment.pretrain, experiment.finetune
  pretrained = pretrain.steps * pretrain.batch_segments * pretrain.segment_length
  return round(finetune.epochs + pretrained / (requests * (finetune.history_length + finetune.candidates)), 2)


def content_arms(arms: Mapping[str, tuple[Mapping[str, Any], str]], facts: DataFacts) -> tuple[Arm, ...]:
  """Arms that need content vectors, given as name -> (overrides, paper's figure); none where the data has none."""
  return tuple(Arm(name, overrides, paper) for name, (overrides, paper) in arms.items()) if facts.content else ()
