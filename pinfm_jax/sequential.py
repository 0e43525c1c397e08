"""Settings that the sequential recommenders of experiments/sequential share: the protocol, our model, the baselines.

The protocol is the published one: each user's last event tests, the one before validates, all others train. The whole
catalogue is ranked without the user's earlier items, ties count against the target, and the checkpoint is chosen by
NDCG@10 of the validation events (SASRec+SS: HR@10, as published). Two holdouts are printed: the users whose target was
seen in training, ranked among the items seen in training (nearly that of SASRec+SS and eSASRec, who drop the users
whose target is in neither training nor validation events), and all users and items (that of S3-Rec, TIGER and others).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pinfm_jax.config import (
  Arm,
  DataConfig,
  EvaluateConfig,
  Experiment,
  FinetuneConfig,
  PinFMConfig,
  PretrainConfig,
  TableConfig,
  TowerConfig,
  UpdateConfig,
)
from pinfm_jax.model.hashing import EXACT_ROWS
from pinfm_jax.overrides import apply_overrides


@dataclass(frozen=True)
class SequenceData:
  """What the settings need to know of a data set.

  Attributes:
    items: the largest item id.
    events: training events: all but two a user.
    length: events that the model reads.
    rows: packed rows of `length` events a step.
  """

  items: int
  events: int
  length: int
  rows: int

  @property
  def epoch(self) -> int:
    """Steps of an epoch, if the rows were full."""
    return max(1, round(self.events / (self.length * self.rows)))


def sequential_experiment(
  name: str, data: DataConfig, facts: SequenceData, epochs: int, changes: Mapping[str, Any] | None = None
) -> Experiment:
  """The experiment of a data set with our model.

  Args:
    name: of the experiment.
    data: source and path.
    facts: about the data set.
    epochs: at most.
    changes: dotted settings that differ from the shared ones.
  """
  width = 256
  tower = TowerConfig(
    backbone='sasrec', layers=1, width=width, heads=1, output_width=width, max_positions=facts.length + 1, dropout=0.5,
    embedding_dropout=0.5, attention_dropout=0.5, bare_tokens=True, bare_targets=True, dot_product=True,
  )  # fmt: skip
  tables = TableConfig(sub_tables=1, rows=facts.items + 2, width=width, hash_seed=EXACT_ROWS, init_scale=0.02)
  pretrain = PretrainConfig(
    steps=epochs * facts.epoch,
    batch_segments=facts.rows,
    segment_length=facts.length,
    downstream_length=facts.length,
    pack=True,
    mtl_weight=1.0,
    window=6,
    pairs=3,
    ftl_weight=0.0,
    max_columns=0,
    uniform_negatives=2048,
    log_q='counts',
    temperature=1.0,
    fixed_temperature=True,
    keep_positives=True,
    checkpoint_every=facts.epoch,
    eval_every=facts.epoch,
    log_every=facts.epoch,
    eval_ranking=True,
    patience=10,
    keep_last=1,
    keep_best=1,
    use_checkpoint='best',
    ema_decay=0.998,
    ema_tables=True,
    update=UpdateConfig(
      learning_rate=1e-3, table_learning_rate=1e-3, table_rule='adam', warmup_steps=100, beta2=0.98, clip_norm=5.0,
    ),
  )  # fmt: skip
  experiment = Experiment(
    name=name,
    data=replace(data, held_out_events=2),
    model=PinFMConfig(tables=tables, tower=tower),
    pretrain=pretrain,
    finetune=FinetuneConfig(history_length=facts.length, history_block=1),  # the windows of the retrieval
    evaluate=EvaluateConfig(retrieval_users=1_000_000, ks=(10, 5, 20, 50), filter_seen=True, whole_catalogue=True),
    arms=(),
    seeds=(0, 1, 2),
  )
  return apply_overrides(experiment, changes or {})


def sasrec(experiment: Experiment) -> Mapping[str, Any]:
  """SASRec+SS as a configuration of the tower: item vectors in and out, inner products, Adam at a constant rate.

  200 epochs at most, patience 50, the best epoch by HR@10 (their recall@10), as published. What the launch files and
  `search.py` change is set here again, so that the baseline stays the same.

  Differences from the published code: all segments of a long history train (not its newest events alone), in packed
  rows, of up to `length` events the last of which is a target alone (there `length + 1`), in windows with a place more;
  the positions of a step share 2,048 negatives that weigh as 256 (there each has 256 of its own); and the dropout of
  attention's weights spares that of the padding.
  """
  rows, segments = experiment.model.tables.rows, experiment.pretrain.batch_segments
  return {
    **{f'model.{name}': 64 for name in ('tower.width', 'tower.output_width', 'tables.width')},
    'model.tables.init_scale': round((2 / (rows + 64)) ** 0.5, 4),  # Xavier
    'model.tower.backbone': 'padded_sasrec',
    **{f'model.tower.{name}': False for name in ('rotary', 'rms_norm', 'swiglu')},
    'model.tower.token_dropout': 0.0,
    'pretrain.mtl_weight': 0.0,
    'pretrain.window': 1,
    'pretrain.pairs': 1,
    'pretrain.log_q': 'none',
    'pretrain.negative_power': 0.0,
    'model.tower.layers': 1,
    'model.tower.heads': 1,
    'model.tower.mlp_ratio': 1,
    'model.tower.dropout': 0.2,
    'model.tower.embedding_dropout': 0.2,
    'model.tower.attention_dropout': 0.2,
    'model.tower.dot_product': True,
    'pretrain.temperature': 1.0,
    'pretrain.fixed_temperature': True,
    'pretrain.keep_positives': True,
    'pretrain.full_catalogue': False,
    'pretrain.count_as': 256,
    'pretrain.uniform_negatives': 2048 // segments * segments,
    'pretrain.item_dropout': 0.2,
    'pretrain.ema_decay': 0.0,
    'pretrain.ema_tables': False,
    'pretrain.steps': 200 * experiment.pretrain.eval_every,
    'pretrain.patience': 50,
    'pretrain.eval_metric': 'hr@10',
    'pretrain.update.learning_rate': 1e-3,
    'pretrain.update.table_learning_rate': 1e-3,
    'pretrain.update.weight_decay': 0.0,
    'pretrain.update.warmup_steps': 0,
    'pretrain.update.final_ratio': 1.0,
    'pretrain.update.beta2': 0.98,
    'pretrain.update.clip_norm': 0.0,
  }


_TWO_BLOCKS = {
  'model.tower.layers': 2,
  **{f'model.tower.{kind}': 0.1 for kind in ('dropout', 'embedding_dropout', 'attention_dropout')},
  'pretrain.item_dropout': 0.1,
}


def baselines(experiment: Experiment) -> tuple[Arm, ...]:
  """Our model and the published losses on the same tower, as arms of a sweep.

  Published with these settings: SASRec+SS on the Amazon sets, and with the sizes of its second arm on ml1m; SASRec and
  gSASRec on ml1m (the gSASRec authors' sizes).
  """
  shared = sasrec(experiment)
  larger = shared | {'model.tower.layers': 2, 'pretrain.update.beta2': 0.999, 'pretrain.item_dropout': 0.0}
  segments = experiment.pretrain.batch_segments
  larger |= {'pretrain.count_as': 0, 'pretrain.uniform_negatives': 256 // segments * segments}
  larger |= {'model.tower.backbone': 'sasrec'}  # their code keeps attention from reading the padding
  larger |= {'model.tables.init_scale': 0.02, 'pretrain.eval_metric': 'ndcg@10'}
  larger |= {f'model.{name}': 128 for name in ('tower.width', 'tower.output_width', 'tables.width')}
  larger |= {f'model.tower.{kind}': 0.5 for kind in ('dropout', 'embedding_dropout', 'attention_dropout')}
  return (
    Arm('PinFM', {}),
    Arm('SASRec+SS', shared),
    Arm('SASRec+SS, 2 blocks', {**shared, **_TWO_BLOCKS, 'pretrain.steps': 100 * experiment.pretrain.eval_every}),
    Arm('SASRec', {**larger, 'pretrain.bce_negatives': 1}),
    Arm('gSASRec', {**larger, 'pretrain.bce_negatives': 256, 'pretrain.bce_calibration': 0.75}),
  )
