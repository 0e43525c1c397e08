"""Checks of an experiment's values before anything runs: a setting that cannot work should not cost an hour first."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from pinfm_jax.config import Experiment, MeshConfig, PinFMConfig, RankerConfig
from pinfm_jax.data.simulator import SimulatorConfig
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import EXACT_ROWS
from pinfm_jax.model.interaction.settings import INTERACTIONS, check_interaction
from pinfm_jax.overrides import apply_overrides, from_dict
from pinfm_jax.train.pretrain_settings import check_pretraining

ARM_GROUPS = ('model.', 'pretrain.', 'ranker.', 'finetune.')  # what an arm may change

_MAY_BE_ZERO = (
  'data.validation_days',
  'finetune.ntl_columns',
  'hash_seed',
  'mesh.data',
  'mesh.exchange_capacity',
  'mesh.fsdp',
  'mesh.model',
  'model.content_width',
  'model.num_actions',
  'model.num_surfaces',
  'model.tower.time_gap_buckets',
  'pretrain.count_as',
  'pretrain.eval_every',
  'pretrain.impression_negatives',
  'pretrain.bce_negatives',
  'pretrain.keep_best',
  'pretrain.max_columns',
  'pretrain.patience',
  'pretrain.uniform_negatives',
  'ranker.block.most_field_width',
  'ranker.cross_layers',
  'ranker.item_buckets',
  'ranker.similarity_width',
  'ranker.sparse_width',
  'ranker.transact.length',
  'update.warmup_steps',
)
_CHOICES = {
  'data.pretrain_overlap_users': ('all', 'others'),
  'evaluate.resample': ('users', 'requests'),
  'evaluate.split': ('test', 'validation'),
  'model.tables.dtype': ('float32', 'bfloat16'),
  'pretrain.update.table_rule': ('adagrad', 'sgd', 'adam'),
  'finetune.update.table_rule': ('adagrad', 'sgd'),
  'finetune.init': ('pretrained', 'scratch'),
  'pretrain.use_checkpoint': ('newest', 'best'),
  'pretrain.log_q': ('none', 'counts', 'sketch'),
  'pretrain.continue_on': ('new', 'all'),
  'ranker.sequence': ('pinfm', 'none'),
  'ranker.fusion': ('early', 'mean', 'last'),
  'ranker.interaction': tuple(INTERACTIONS),
  'ranker.block.activation': ('none', 'tanh', 'relu'),
  'ranker.block.expert_gate': ('softmax', 'sigmoid'),
  'serve.storage': ('int4', 'int8', 'float32'),
  'model.tower.attention': ('auto', 'xla', 'flash'),
  'model.tower.backbone': ('gpt2', 'sasrec', 'padded_sasrec', 'hstu'),
  'model.tower.dtype': ('float32', 'bfloat16'),
  'model.tower.remat': ('none', 'full', 'dots'),
}
_LACKS = {  # options that a backbone has not
  'hstu': ('rotary', 'rms_norm', 'swiglu', 'attention_dropout'),
  'padded_sasrec': ('rotary', 'rms_norm', 'swiglu'),
}


def check_experiment(experiment: Experiment, towers_alone: bool = False) -> None:
  """Checks every arm's settings.

  Args:
    experiment: with its arms.
    towers_alone: its arms, if any, are towers: those of a sweep over a launch file that trains no rankers.

  Raises:
    UserError: names the first setting that cannot work, its value, and what is expected.
  """
  names = [arm.name for arm in experiment.arms]
  if names and experiment.baseline not in names:
    raise UserError(f"baseline is '{experiment.baseline}'; expected one of the arms: {', '.join(names)}")
  if experiment.challenger and experiment.challenger not in names:
    raise UserError(f"challenger is '{experiment.challenger}'; expected one of the arms: {', '.join(names)}, or none")
  if len({arm.directory for arm in experiment.arms}) < len(names):
    raise UserError(f'arms need names that differ in letters or digits; got {", ".join(names)}')
  if not experiment.seeds or len(set(experiment.seeds)) < len(experiment.seeds):
    raise UserError(f'seeds are {experiment.seeds}; expected one or more distinct numbers')
  if min(experiment.seeds) < 0:
    raise UserError(f'seeds are {experiment.seeds}; expected numbers that are not negative')
  for arm in experiment.arms:
    for key in arm.overrides:
      if not key.startswith(ARM_GROUPS):
        raise UserError(
          f"arm '{arm.name}' changes {key}; an arm may change {', '.join(f'{group}*' for group in ARM_GROUPS)}, since "
          'all arms share data and evaluation: make another launch file for the rest'
        )
  if experiment.data.source == 'simulator':
    from_dict(SimulatorConfig, experiment.data.simulator)
  for each in (experiment, *(apply_overrides(experiment, arm.overrides) for arm in experiment.arms)):
    _check_values(each)
    _check_model(each.model)
    _check_tower(each.model)
    _check_padded(each, ranks=bool(experiment.arms) and not towers_alone)
    _check_ranker(each.ranker, each.model)
    check_interaction(each.ranker)
    _check_mesh(each.mesh)
    _check_lengths(each)
    _check_ages(each)
    _check_training(each)
    _check_lists(each)
    check_pretraining(each)


def check_labels(experiment: Experiment, labels: tuple[str, ...]) -> None:
  """Checks the labels that the evaluation names against those of the data set.

  Raises:
    UserError: a name that is no label.
  """
  evaluate, finetune = experiment.evaluate, experiment.finetune
  named = {
    'evaluate.main_label': (evaluate.main_label,),
    'evaluate.labels': evaluate.labels,
    'evaluate.utility': tuple(evaluate.utility),
    'finetune.label_weights': tuple(finetune.label_weights),
  }
  for key, values in named.items():
    for value in values:
      if value not in labels:
        raise UserError(f"{key} names '{value}'; the data set's labels are: {', '.join(labels)}")
  if not any(evaluate.utility.values()):
    raise UserError('evaluate.utility is empty: nothing orders a request; for example --set evaluate.utility.save=1')


def _check_values(experiment: Experiment) -> None:
  for key, value in _leaves(experiment, ''):
    if key in _CHOICES and value not in _CHOICES[key]:
      raise UserError(f"{key} is '{value}'; expected one of: {', '.join(_CHOICES[key])}")
    if isinstance(value, bool) or not isinstance(value, int | float):
      continue
    if key == 'model.tables.hash_seed' and value == EXACT_ROWS:
      continue
    if not np.isfinite(value) or value < 0:
      raise UserError(f'{key} is {value}; expected a finite number that is not negative')
    if value == 0 and isinstance(value, int) and not key.endswith(_MAY_BE_ZERO):
      raise UserError(f'{key} is 0; expected at least 1')
    if value == 0 and key in ('data.finetune_days', 'data.test_days'):  # these may be parts of days
      raise UserError(f'{key} is 0; expected a positive number of days')


def _check_lists(experiment: Experiment) -> None:
  for key, values in (('evaluate.ks', experiment.evaluate.ks), ('ranker.mlp', experiment.ranker.mlp)):
    if any(value < 1 for value in values):
      raise UserError(f'{key} is {values}; expected numbers of at least 1')
  if not experiment.evaluate.ks:
    raise UserError(
      'evaluate.ks is empty; expected the places that HR@k and NDCG@k count, for example evaluate.ks=10,5'
    )
  if experiment.ranker.dropout >= 1:
    raise UserError(f'ranker.dropout is {experiment.ranker.dropout}; expected a share below 1')


def _check_model(model: PinFMConfig) -> None:
  tower, tables = model.tower, model.tables
  if tower.width % tower.heads:
    raise UserError(f'model.tower.width {tower.width} is not a multiple of model.tower.heads {tower.heads}')
  if tower.backbone in _LACKS and tower.attention == 'flash':
    raise UserError(
      "model.tower.attention is 'flash', but flash kernels compute a plain softmax over events and "
      f"model.tower.backbone '{tower.backbone}' has none; set model.tower.attention=auto"
    )
  if tables.sub_tables * tables.rows >= 2**31 - 2**28:
    raise UserError(
      f'model.tables: {tables.sub_tables} x {tables.rows} rows; rows are numbered by 31 bits, '
      f'at most {2**31 - 2**28} in all: lower model.tables.rows'
    )
  if tables.width % 2:
    raise UserError(f'model.tables.width is {tables.width}; int4 packs two values a byte: make it even')
  if 0 < tower.time_gap_buckets < 3:
    raise UserError(
      f'model.tower.time_gap_buckets is {tower.time_gap_buckets}; expected 0 (off) or at least 3: '
      'one for no event before, one for gaps below a second, one for longer ones'
    )
  if model.id_mask >= 1:
    raise UserError(f'model.id_mask is {model.id_mask}; expected a share below 1')
  if model.id_mask and not model.content:
    raise UserError(
      f'model.id_mask is {model.id_mask}, which leaves nothing of an item without content: '
      'set model.content=true, or model.id_mask=0'
    )


def _check_tower(model: PinFMConfig) -> None:
  tower, item_width = model.tower, model.tables.item_width
  for name in ('dropout', 'embedding_dropout', 'token_dropout', 'attention_dropout'):
    rate = getattr(tower, name)
    if rate >= 1:
      raise UserError(f'model.tower.{name} is {rate}; expected a share below 1')
  for name in _LACKS.get(tower.backbone, ()):
    if getattr(tower, name):
      raise UserError(
        f"model.tower.{name} is {getattr(tower, name)}, but model.tower.backbone '{tower.backbone}' has none; set one "
        'of both'
      )
  if tower.attention_dropout and tower.attention == 'flash':
    raise UserError(
      f'model.tower.attention_dropout is {tower.attention_dropout}, but flash kernels have none; set '
      'model.tower.attention=auto'
    )
  if tower.rotary and tower.width // tower.heads % 2:
    raise UserError(
      f'model.tower.rotary turns pairs of elements, but a head is {tower.width // tower.heads} wide '
      '(model.tower.width / model.tower.heads); make it even'
    )
  if tower.bare_tokens and tower.width != item_width:
    raise UserError(
      f'model.tower.bare_tokens takes item vectors of {item_width} (model.tables.sub_tables x width) as tokens of '
      f'model.tower.width {tower.width}; make them equal'
    )
  if tower.bare_targets and not tower.width == tower.output_width == item_width:
    raise UserError(
      f'model.tower.bare_targets compares outputs of model.tower.width {tower.width} with item vectors of {item_width} '
      f'(model.tables.sub_tables x width), as model.tower.output_width {tower.output_width}; make the three equal'
    )


def _check_padded(experiment: Experiment, ranks: bool) -> None:
  if not experiment.model.tower.padded:
    return
  if not experiment.pretrain.pack:
    raise UserError("model.tower.backbone 'padded_sasrec' trains on packed rows; set pretrain.pack=true")
  if ranks and experiment.ranker.sequence == 'pinfm':
    raise UserError(
      "model.tower.backbone 'padded_sasrec' has no pass for candidates, as a ranker needs it; set it to sasrec, or "
      'ranker.sequence=none'
    )


def _check_ranker(ranker: RankerConfig, model: PinFMConfig) -> None:
  for option in ('learnable_token', 'candidate_content'):
    if getattr(ranker, option) and ranker.fusion != 'early':
      raise UserError(
        f"ranker.{option} changes what stands at the candidate's place, but ranker.fusion '{ranker.fusion}' has no "
        'candidate in the sequence; set ranker.fusion=early, or the option to false'
      )
  for setting, value, other in (('backbone', 'hstu', 'gpt2'), ('attention', 'flash', 'auto')):
    if ranker.bidirectional and getattr(model.tower, setting) == value:
      raise UserError(
        f"ranker.bidirectional needs plain softmax attention, and model.tower.{setting} is '{value}'; set "
        f'model.tower.{setting}={other}, or ranker.bidirectional=false'
      )
  transact = ranker.transact
  if 3 * transact.width % transact.heads:
    raise UserError(
      f'ranker.transact.width {transact.width}: three vectors of it side by side do not divide by '
      f'ranker.transact.heads {transact.heads}'
    )
  if 0 < transact.length < transact.outputs:
    raise UserError(
      f'ranker.transact.outputs {transact.outputs} exceeds ranker.transact.length {transact.length}: there are not so '
      'many events; lower it'
    )


def _check_mesh(mesh: MeshConfig) -> None:
  axes = tuple(axis for axis in ('data', 'fsdp', 'model') if axis in mesh.table_axes)
  if not axes or axes != mesh.table_axes:
    raise UserError(
      f'mesh.table_axes is {",".join(mesh.table_axes) or "empty"}; expected some of data,fsdp,model, in this order'
    )


def _check_lengths(experiment: Experiment) -> None:
  pretrain, finetune, tower = experiment.pretrain, experiment.finetune, experiment.model.tower
  if finetune.history_block > pretrain.downstream_length:  # the retrieval evaluation's window slides in these blocks
    raise UserError(
      f'finetune.history_block {finetune.history_block} exceeds pretrain.downstream_length {pretrain.downstream_length}'
    )
  if not finetune.epochs > 0:
    raise UserError(f'finetune.epochs is {finetune.epochs}; expected a positive number')
  weights = {'evaluate.utility': experiment.evaluate.utility, 'finetune.label_weights': finetune.label_weights}
  for key, named in weights.items():
    for name, weight in named.items():
      if not np.isfinite(weight):
        raise UserError(f'{key}.{name} is {weight}; expected a finite number')
  behind = 1 + int(experiment.ranker.learnable_token)  # the candidate, and maybe a token before it
  for key, length, positions in (
    ('pretrain.segment_length', pretrain.segment_length, pretrain.segment_length),
    ('pretrain.downstream_length', pretrain.downstream_length, pretrain.downstream_length),  # read at the retrieval
    ('finetune.history_length', finetune.history_length, finetune.history_length + behind),
  ):
    if positions > tower.max_positions:
      raise UserError(
        f'{key} is {length}: model.tower.max_positions {tower.max_positions} must be at least {positions}'
      )
  if pretrain.ftl_weight and pretrain.downstream_length >= pretrain.segment_length:
    raise UserError(
      f'pretrain.downstream_length {pretrain.downstream_length} leaves no future events in segments of '
      f'{pretrain.segment_length}; make segment_length larger, or set pretrain.ftl_weight=0'
    )
  if finetune.history_block > finetune.history_length:
    raise UserError(
      f'finetune.history_block {finetune.history_block} exceeds finetune.history_length {finetune.history_length}'
    )


def _check_ages(experiment: Experiment) -> None:
  cold, edges = experiment.finetune.cold_start, experiment.evaluate.age_edges_hours
  if len(cold.age_edges_hours) != len(cold.age_dropout) or not all(0 <= rate < 1 for rate in cold.age_dropout):
    raise UserError(
      f'finetune.cold_start.age_dropout is {cold.age_dropout}; expected a rate of at least 0 and below 1 for each of '
      f'the {len(cold.age_edges_hours)} age_edges_hours'
    )
  for key, values in (('finetune.cold_start.age_edges_hours', cold.age_edges_hours),
                      ('evaluate.age_edges_hours', edges)):  # fmt: skip
    if list(values) != sorted(set(values)) or any(not np.isfinite(v) or v <= 0 for v in values):
      raise UserError(f'{key} is {values}; expected positive numbers of hours that ascend')
  if not edges:
    raise UserError('evaluate.age_edges_hours is empty; expected at least one number of hours')
  if cold.randomise > 1:
    raise UserError(f'finetune.cold_start.randomise is {cold.randomise}; expected a share of at most 1')


def _check_training(experiment: Experiment) -> None:
  pretrain, finetune = experiment.pretrain, experiment.finetune
  for name, update in (('pretrain', pretrain.update), ('finetune', finetune.update)):
    unknown = set(update.frozen) - {'tower', 'tables'}
    if unknown or (name == 'pretrain' and update.frozen):
      expected = 'nothing: pretraining trains all of it' if name == 'pretrain' else "some of 'tower', 'tables'"
      raise UserError(f'{name}.update.frozen is {",".join(update.frozen)}; expected {expected}')
    if not 0 <= update.beta1 < 1 or not 0 <= update.beta2 < 1:
      raise UserError(f'{name}.update.beta1 and beta2 are {update.beta1}, {update.beta2}; expected values below 1')
  if not (pretrain.ntl_weight or pretrain.mtl_weight or pretrain.ftl_weight):
    raise UserError('pretrain.ntl_weight, mtl_weight and ftl_weight are all 0: nothing would be learned; set one')
  if pretrain.action_mask >= 1:
    raise UserError(f'pretrain.action_mask is {pretrain.action_mask}; expected a share below 1')
  if finetune.init == 'scratch' and finetune.update.frozen:
    raise UserError(
      f"finetune.init is 'scratch', and finetune.update.frozen is {','.join(finetune.update.frozen)}: that would never "
      'learn; set one of both'
    )
  if (finetune.ntl_weight or finetune.mtl_weight) and not finetune.ntl_columns:
    raise UserError(
      'finetune.ntl_columns is 0: the losses of finetune.ntl_weight and mtl_weight have no negatives; set it, or both '
      'weights to 0'
    )
  if pretrain.start_from and pretrain.continue_from:
    raise UserError('pretrain.start_from and pretrain.continue_from are both set: a run starts from one of them')
  if pretrain.temperature <= 0:
    raise UserError(f'pretrain.temperature is {pretrain.temperature}; expected a positive number')


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
  """Dotted names and values of all settings; free mappings, arms and seeds are not looked into."""
  for field in fields(value):
    item, key = getattr(value, field.name), f'{prefix}{field.name}'
    if is_dataclass(item):
      yield from _leaves(item, f'{key}.')
    elif not isinstance(item, tuple):
      yield key, item
