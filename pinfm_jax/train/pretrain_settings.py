"""Checks of the settings of pretraining: negatives and losses, state of the tables, what is measured and held out."""

from pinfm_jax.config import Experiment, PretrainConfig
from pinfm_jax.errors import UserError

EVAL_METRICS = ('ndcg@10', 'hr@10', 'mrr')  # that `pretrain.eval_ranking` measures, the default first


def check_pretraining(experiment: Experiment) -> None:
  """Checks them.

  Raises:
    UserError: names the first setting that cannot work, its value, and what is expected.
  """
  pretrain = experiment.pretrain
  if pretrain.item_dropout >= 1:
    raise UserError(f'pretrain.item_dropout is {pretrain.item_dropout}; expected a share below 1')
  _check_drawn(pretrain)
  _check_impressions(pretrain)
  _check_columns(pretrain)
  _check_cross_entropy(experiment)
  _check_tables(experiment)
  _check_measuring(pretrain)
  _check_held_out_events(experiment)


def _check_drawn(config: PretrainConfig) -> None:
  if config.uniform_negatives % config.batch_segments:
    raise UserError(
      f'pretrain.uniform_negatives is {config.uniform_negatives}; expected a multiple of pretrain.batch_segments '
      f'{config.batch_segments}: every segment carries as many'
    )
  if config.negative_power and not config.uniform_negatives:
    raise UserError(
      f'pretrain.negative_power is {config.negative_power}, but nothing is drawn (pretrain.uniform_negatives=0); '
      'set one of both'
    )
  if config.negative_power and config.log_q == 'sketch':
    raise UserError(
      "pretrain.negative_power draws by exact counts, and pretrain.log_q is 'sketch'; set pretrain.log_q=counts"
    )
  if not 0 < config.sketch_decay <= 1:
    raise UserError(f'pretrain.sketch_decay is {config.sketch_decay}; expected above 0 and at most 1 (1 = never fades)')
  if 4 * config.sketch_width >= 2**31:
    raise UserError(f'pretrain.sketch_width is {config.sketch_width}; expected fewer than {2**29} counters')


def _check_impressions(config: PretrainConfig) -> None:
  if config.impression_negatives and not config.positive_actions:
    raise UserError(
      f'pretrain.impression_negatives is {config.impression_negatives}, but pretrain.positive_actions is empty, so '
      'that every event is positive; name the positive actions, or set pretrain.impression_negatives=0'
    )
  if config.impression_negatives and not config.ntl_weight:
    raise UserError(
      f'pretrain.impression_negatives is {config.impression_negatives}, but only the next-token loss uses them and '
      'pretrain.ntl_weight is 0; set one of both'
    )
  if config.impression_negatives > config.window:
    raise UserError(
      f'pretrain.impression_negatives {config.impression_negatives} exceeds pretrain.window {config.window}, the '
      'events after an anchor that are looked at; make the window larger'
    )


def _check_columns(config: PretrainConfig) -> None:
  if config.full_catalogue and config.uniform_negatives:
    raise UserError(
      f'pretrain.uniform_negatives is {config.uniform_negatives} and pretrain.full_catalogue is true: all items are '
      'columns already; set one of both'
    )
  if not (config.max_columns or config.uniform_negatives or config.full_catalogue):
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
  if config.count_as and (config.max_columns or config.log_q != 'none' or config.bce_negatives):
    raise UserError(
      f'pretrain.count_as is {config.count_as}: it weighs random columns of a softmax; set pretrain.max_columns=0, '
      'pretrain.log_q=none and pretrain.bce_negatives=0'
    )
  if config.count_as and config.full_catalogue and config.keep_positives:
    raise UserError(
      f'pretrain.count_as is {config.count_as}: in the cross-entropy of the catalogue the target is one of the columns '
      'that would weigh less; set pretrain.keep_positives=false, or draw negatives'
    )
  if config.keep_positives and config.max_columns:
    raise UserError(
      f'pretrain.keep_positives makes every target of the batch its own negative while pretrain.max_columns is '
      f'{config.max_columns}; set pretrain.max_columns=0 and draw negatives, or take the full catalogue'
    )


def _check_cross_entropy(experiment: Experiment) -> None:
  config, model = experiment.pretrain, experiment.model
  if config.keep_positives and config.full_catalogue and model.id_mask:
    raise UserError(
      f'pretrain.keep_positives with pretrain.full_catalogue is the cross-entropy of the catalogue, where a target '
      f'whose id is hidden (model.id_mask={model.id_mask}) has no place; set model.id_mask=0'
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
  if pretrain.ema_decay >= 1:
    raise UserError(f'pretrain.ema_decay is {pretrain.ema_decay}; expected below 1')
  if pretrain.ema_tables and not pretrain.ema_decay:
    raise UserError('pretrain.ema_tables is true, but nothing is averaged (pretrain.ema_decay=0); set ema_decay')
  if pretrain.ema_tables and tables.dtype != 'float32':
    raise UserError(
      f"pretrain.ema_tables averages float32 tables, and model.tables.dtype is '{tables.dtype}'; set one of both"
    )


def _check_measuring(pretrain: PretrainConfig) -> None:
  if not 0 < pretrain.eval_share < 1:
    raise UserError(f'pretrain.eval_share is {pretrain.eval_share}; expected a share between 0 and 1')
  for name in ('keep_best', 'patience', 'eval_ranking'):
    value = getattr(pretrain, name)
    if value and not pretrain.eval_every:
      raise UserError(
        f'pretrain.{name} is {value}, but nothing is measured (pretrain.eval_every=0); set eval_every to a number of '
        f'steps, or {name} to {type(value)()}'
      )
  if pretrain.eval_metric not in EVAL_METRICS:
    raise UserError(f"pretrain.eval_metric is '{pretrain.eval_metric}'; expected one of: {', '.join(EVAL_METRICS)}")
  if pretrain.eval_metric != EVAL_METRICS[0] and not pretrain.eval_ranking:
    raise UserError(
      f"pretrain.eval_metric is '{pretrain.eval_metric}', but no ranking is measured; set pretrain.eval_ranking=true"
    )
  if pretrain.use_checkpoint == 'best' and not pretrain.keep_best:
    raise UserError(
      "pretrain.use_checkpoint is 'best', but no best checkpoint is kept (pretrain.keep_best=0); set keep_best to 1"
    )


def _check_held_out_events(experiment: Experiment) -> None:
  held_out, pretrain = experiment.data.held_out_events, experiment.pretrain
  if held_out > 2:
    raise UserError(f'data.held_out_events is {held_out}; expected 1 (test) or 2 (validation and test)')
  if pretrain.continue_from and held_out != 1:
    raise UserError('pretrain.continue_from goes on behind the last event alone; set data.held_out_events=1')
  if pretrain.eval_ranking and held_out != 2:
    raise UserError(
      f'pretrain.eval_ranking ranks a validation event of each user, and data.held_out_events is {held_out}: only the '
      'test event is held out; set data.held_out_events=2'
    )
