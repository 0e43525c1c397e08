"""What the stages of a run share: the experiment, its directory, the data set, the split, the mesh."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from pinfm_jax.checks import check_labels
from pinfm_jax.config import Arm, Experiment, InteractionConfig, PinFMConfig, PretrainConfig
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.featurize import FeatureSchema
from pinfm_jax.data.kept_examples import kept_or_made
from pinfm_jax.data.pipeline import Requests, action_bits
from pinfm_jax.data.splits import Split, pretrained_items, split_by_time
from pinfm_jax.data.tokens import PLAIN, TokenInputs, check_hidden_actions, check_tokens
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.train.finetune import FinetuneTask
from pinfm_jax.train.profiling import Window
from pinfm_jax.train.sharding import make_mesh

KEPT = 'examples'  # folder of a workdir with the examples that many rankers share (`pinfm study`)


@dataclass(frozen=True)
class Run:
  """An experiment in its directory, with what the stages share.

  Attributes:
    experiment: the launch file's, or an arm's (`of_arm`).
    workdir: where everything is written.
    profile: steps of each training run to trace.
    base: the launch file's run, if this is that of an arm.
  """

  experiment: Experiment
  workdir: Path
  profile: Window | None = None
  base: 'Run | None' = None

  def of_arm(self, arm: Arm) -> 'Run':
    """The run of an arm's experiment, which shares data set and mesh with this one."""
    return replace(self, experiment=apply_overrides(self.experiment, arm.overrides), base=self)

  @property
  def data_directory(self) -> Path:
    """Where the prepared data set is."""
    data = self.experiment.data
    return Path(data.path) if data.source == 'prepared' else self.workdir / 'data'

  @cached_property
  def dataset(self) -> PreparedDataset:
    """The prepared data set.

    Raises:
      UserError: it is not prepared yet, or damaged.
    """
    if self.base:
      dataset = self.base.dataset
    elif self.experiment.data.source != 'prepared' and not self.data_directory.exists():
      raise UserError(f'{self.data_directory} is not prepared yet; run the prepare stage first (pinfm run FILE)')
    else:
      dataset = PreparedDataset.open(self.data_directory)
    check_tokens(self.experiment.model, dataset.info)
    check_hidden_actions(self.experiment.pretrain.action_mask, dataset.info)
    if self.experiment.arms:
      check_labels(self.experiment, dataset.info.labels)
    return dataset

  @cached_property
  def split(self) -> Split:
    """The time split."""
    return self.base.split if self.base else split_by_time(self.dataset, self.experiment.data)

  @cached_property
  def pretrained_items(self) -> np.ndarray:
    """Keys of the items that pretraining may read an event of, ascending."""
    if self.base:
      return self.base.pretrained_items
    until_U = self.split.until_by_user(self.dataset.num_users)
    return pretrained_items(self.dataset, self.split.pretrain_until, until_U, self.split.held_out)

  @cached_property
  def mesh(self) -> Mesh:
    """The device mesh."""
    return self.base.mesh if self.base else make_mesh(self.experiment.mesh)

  @cached_property
  def model(self) -> PinFMConfig:
    """The model's configuration with the data set's vocabulary sizes and content width."""
    info, model = self.dataset.info, self.experiment.model
    content_width = info.content_width if model.content else 0
    return replace(model, num_actions=len(info.actions), num_surfaces=len(info.surfaces), content_width=content_width)

  @cached_property
  def tokens(self) -> TokenInputs:
    """What the model reads besides item, surface and actions; new items are those first seen after fine-tuning."""
    return TokenInputs.of(self.model, self.dataset, self.split.finetune[1])

  def pretrain_directory(self, seed: int) -> Path:
    """Directory of a seed's tower: the launch file's own, or that of all arms which pretrain in another way."""
    name = 'pretrain'
    if self.base:
      own, launch = (run.pretrain_settings(seed) for run in (self, self.base))
      if own != launch:
        name += f'_{_digest(own)}'
    return self.workdir / f'seed{seed}' / name

  def tower_results(self, seed: int) -> Path:
    """Directory of the figures of a seed's tower; trained once, it may be measured on both splits if there are two."""
    directory = self.pretrain_directory(seed)
    return directory / self.experiment.evaluate.split if self.split.held_out > 1 else directory

  def arm_directory(self, seed: int, arm: Arm) -> Path:
    """Directory of a seed's fine-tuned arm."""
    return self.workdir / f'seed{seed}' / arm.directory

  def measured_directory(self, seed: int, arm: Arm) -> Path:
    """Directory of an arm's predictions on the evaluation split: trained once, it may be measured on both."""
    return self.arm_directory(seed, arm) / self.experiment.evaluate.split

  @cached_property
  def schema(self) -> FeatureSchema:
    """The ranker's inputs.

    Raises:
      UserError: an arm reads content vectors, and the data set has neither those nor an embedding feature.
    """
    ranker, length = self.experiment.ranker, self.experiment.finetune.history_length
    schema = FeatureSchema.of(self.dataset.info, ranker.item_buckets, length, ranker.transact)
    if ranker.candidate_content and not schema.candidate_width:
      raise UserError(
        'ranker.candidate_content is true, but this data set has no content vectors of items and no embedding feature; '
        'set it to false, or prepare the data with an item file that has a content column (--items FILE)'
      )
    return schema

  def requests(self, part: str) -> Requests:
    """The requests of 'finetune', 'validation' or 'test'.

    Raises:
      UserError: there is none.
    """
    experiment = self.experiment
    least = experiment.finetune.min_candidates if part == 'finetune' else experiment.data.min_candidates
    times = getattr(self.split, part)
    if times[0] == times[1] and self.dataset.num_requests:
      raise UserError(
        f'data.{part}_days is 0, so there is no {part} part; set it, or evaluate another part (evaluate.split)'
      )
    if experiment.ranker.sequence == 'pinfm':
      tokens = self.tokens
    else:  # of a ranker without PinFM just TransAct reads any of it
      tokens = TokenInputs(items=self.tokens.items) if experiment.ranker.transact.length else PLAIN
    requests = Requests.between(self.dataset, self.schema, experiment.finetune, times, least, tokens)
    return kept_or_made(requests, self.workdir / KEPT)

  def task(self, steps: int) -> FinetuneTask:
    """The fine-tuning task."""
    experiment = self.experiment
    pretrain = experiment.pretrain
    bits = action_bits(pretrain, self.dataset.info.actions)
    return FinetuneTask(
      self.model, experiment.ranker, experiment.finetune, self.schema, steps, bits, pretrained=pretrain
    )

  def pretrain_settings(self, seed: int) -> dict[str, Any]:
    """Everything that a seed's pretraining depends on."""
    data, pretrain = self.experiment.data, dataclasses.asdict(self.experiment.pretrain)
    for name in ('item_dropout', 'eval_metric'):  # as in work that was made without them: its towers are found again
      if pretrain[name] == getattr(PretrainConfig, name):
        del pretrain[name]
    return {
      'data': {
        'checksum': self.dataset.info.checksum,
        'days': [data.finetune_days, data.validation_days, data.test_days],
      }
      | {'pretrain_overlap': data.pretrain_overlap}
      | ({} if data.pretrain_overlap_users == 'all' else {'pretrain_overlap_users': data.pretrain_overlap_users})
      | ({} if data.held_out_events == 1 else {'held_out_events': data.held_out_events}),
      'model': dataclasses.asdict(self.model),
      'pretrain': pretrain,
      'seed': seed,
    } | self._ranking_settings()

  def _ranking_settings(self) -> dict[str, Any]:
    """How towers are measured, as far as it is not as it always was."""
    evaluate = self.experiment.evaluate
    settings = {name: True for name in ('filter_seen', 'whole_catalogue') if getattr(evaluate, name)}
    if self.experiment.pretrain.eval_ranking:  # then it chooses the checkpoint
      settings['retrieval_users'] = evaluate.retrieval_users
    return {'ranking': settings} if settings else {}

  def finetune_settings(self, seed: int) -> dict[str, Any]:
    """Everything that fine-tuning depends on."""
    experiment, settings = self.experiment, self.pretrain_settings(seed)
    if not needs_pretraining(experiment):
      settings['pretrain'] = {'positive_actions': experiment.pretrain.positive_actions} | self._temperature_settings()
    settings.pop('ranking', None)
    own = {'ranker': experiment.ranker, 'finetune': experiment.finetune}
    settings |= {k: dataclasses.asdict(v) for k, v in own.items()}
    if experiment.ranker.block == InteractionConfig():  # as in work that was made when there was no other
      del settings['ranker']['block']
    return settings

  def _temperature_settings(self) -> dict[str, Any]:
    """Of a ranker's sequence losses, if it has them and no pretrained tower, and as far as it is not the default."""
    pretrain, finetune = self.experiment.pretrain, self.experiment.finetune
    if self.experiment.ranker.sequence != 'pinfm' or not (finetune.ntl_weight or finetune.mtl_weight):
      return {}
    values = {name: getattr(pretrain, name) for name in ('temperature', 'fixed_temperature')}
    return {name: value for name, value in values.items() if value != getattr(PretrainConfig, name)}

  def retrieval_settings(self) -> dict[str, int]:
    """What a tower's retrieval figures depend on besides `evaluate.ks`; all arms are asked for the same."""
    launch = (self.base or self).experiment
    return {  # a shorter window slides in shorter blocks
      'finetune.history_block': min(launch.finetune.history_block, self.experiment.pretrain.downstream_length),
      'evaluate.retrieval_users': launch.evaluate.retrieval_users,
    }

  def measured_settings(self) -> dict[str, Any]:
    """What predictions depend on besides the ranker and the split."""
    return {'min_candidates': self.experiment.data.min_candidates}


def needs_pretraining(experiment: Experiment) -> bool:
  """Whether an arm starts from a pretrained tower."""
  finetune = experiment.finetune
  return experiment.ranker.sequence == 'pinfm' and finetune.init == 'pretrained' and not finetune.start_from


def _digest(settings: Any) -> str:
  """A name of settings; 1 and 1.0 are the same number, whichever of them a launch file or a saved experiment has."""
  plain = json.loads(json.dumps(settings), parse_int=float)
  return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:10]
