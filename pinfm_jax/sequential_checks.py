"""Checks of the settings that the sequential recommenders brought: tower, losses, tables and measurements."""

from pinfm_jax.config import Experiment, PinFMConfig, PretrainConfig
from pinfm_jax.errors import UserError


def check_sequential(experiment: Experiment) -> None:
  """Checks them.

  Raises:
    UserError: names the first setting that cannot work, its value, and what is expected.
  """
  _check_tower(experiment.model)
  _check_columns(experiment.pretrain)
  _check_tables(experiment)
  _check_measuring(experiment)


def _check_tower(model: PinFMConfig) -> None:
  tower, item_width = model.tower, model.tables.item_width
  for name in ('dropout', 'embedding_dropout', 'token_dropout', 'attention_dropout'):
    rate = getattr(tower, name)
    if rate >= 1:
      raise UserError(f'model.tower.{name} is {rate}; expected a share below 1')
  for name in ('rotary', 'rms_norm', 'swiglu', 'attention_dropout'):
    if tower.backbone == 'hstu' and getattr(tower, name):
      raise UserError(
        f'model.tower.{name} is {getattr(tower, name)}, but it is of the gpt2 backbone and model.tower.backbone is '
        "'hstu'; set one of both"
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


def _check_columns(config: PretrainConfig) -> None:
  drawn = bool(config.uniform_negatives)
  if drawn and config.full_catalogue:
    raise UserError(
      f'pretrain.uniform_negatives is {config.uniform_negatives} and pretrain.full_catalogue is true: all items are '
      'columns already; set one of both'
    )
  if not config.max_columns and not drawn and not config.full_catalogue:
    raise UserError(
      'pretrain.max_columns is 0, and there are no other negatives; set pretrain.uniform_negatives, '
      'pretrain.full_catalogue=true, or max_columns'
    )
  if config.max_columns and config.full_catalogue:
    raise UserError(
      f'pretrain.max_columns is {config.max_columns} and pretrain.full_catalogue is true: all items are columns '
      'already; set pretrain.max_columns=0'
    )
  if config.full_catalogue and config.log_q != 'none':
    raise UserError(
      f"pretrain.log_q is '{config.log_q}', which corrects a sample of columns, but pretrain.full_catalogue takes all; "
      'set pretrain.log_q=none'
    )
  if config.negative_power and not drawn:
    raise UserError(
      f'pretrain.negative_power is {config.negative_power}, but nothing is drawn (pretrain.uniform_negatives=0); '
      'set one of both'
    )
  if config.negative_power and config.log_q == 'sketch':
    raise UserError(
      "pretrain.negative_power draws by exact counts, and pretrain.log_q is 'sketch'; set pretrain.log_q=counts"
    )
  if config.keep_positives and config.max_columns:
    raise UserError(
      f'pretrain.keep_positives makes every target of the batch its own negative while pretrain.max_columns is '
      f'{config.max_columns}; set pretrain.max_columns=0 and draw negatives, or take the full catalogue'
    )
  if config.bce_calibration > 1:
    raise UserError(f'pretrain.bce_calibration is {config.bce_calibration}; expected at most 1')
  if config.bce_calibration and not config.bce_negatives:
    raise UserError(
      f'pretrain.bce_calibration is {config.bce_calibration}, but the loss is a softmax (pretrain.bce_negatives=0); '
      'set one of both'
    )
  if config.bce_negatives and (config.log_q != 'none' or config.impression_negatives):
    raise UserError(
      f'pretrain.bce_negatives is {config.bce_negatives}: log_q and impression_negatives are of the softmax; set '
      'pretrain.log_q=none and pretrain.impression_negatives=0'
    )


def _check_tables(experiment: Experiment) -> None:
  tables, pretrain = experiment.model.tables, experiment.pretrain
  if pretrain.update.table_rule == 'adam' and tables.dtype != 'float32':
    raise UserError(
      f"pretrain.update.table_rule is 'adam', which keeps and moves all rows in float32, but model.tables.dtype is "
      f"'{tables.dtype}'; use 'adagrad', or float32 tables"
    )
  if not pretrain.ema_decay < 1:
    raise UserError(f'pretrain.ema_decay is {pretrain.ema_decay}; expected below 1')
  if pretrain.ema_tables and not pretrain.ema_decay:
    raise UserError('pretrain.ema_tables is true, but nothing is averaged (pretrain.ema_decay=0); set ema_decay')
  if pretrain.ema_tables and tables.dtype != 'float32':
    raise UserError(f"pretrain.ema_tables averages float32 tables, and model.tables.dtype is '{tables.dtype}'")


def _check_measuring(experiment: Experiment) -> None:
  data, pretrain = experiment.data, experiment.pretrain
  if data.held_out_events > 2:
    raise UserError(f'data.held_out_events is {data.held_out_events}; expected 1 (test) or 2 (validation and test)')
  if pretrain.continue_from and data.held_out_events != 1:
    raise UserError('pretrain.continue_from goes on behind the last event alone; set data.held_out_events=1')
  if pretrain.eval_ranking and data.held_out_events < 2:
    raise UserError(
      'pretrain.eval_ranking ranks a validation event of each user, and data.held_out_events is 1: only the test '
      'event is held out; set data.held_out_events=2'
    )
  for name in ('eval_ranking', 'patience'):
    if getattr(pretrain, name) and not pretrain.eval_every:
      raise UserError(
        f'pretrain.{name} is set, but nothing is measured (pretrain.eval_every=0); set eval_every to a number of steps'
      )
