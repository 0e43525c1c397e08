"""Scaling law: what more table rows and a larger tower are worth, on a simulated feed.

Command:   pinfm bench scaling experiments/scaling_law.py
           (the middle point alone, with its retrieval figures: pinfm run experiments/scaling_law.py)
Hardware:  2 CPU cores, 10 GB of memory, 4 GB of disk
Time:      6 points of about 2 minutes, and a minute for the data; resumable
Expected:  see experiments/README.md

Rows matter when items collide. Two cores can learn some 20,000 items in minutes, so besides 1 M, 8 M and 64 M rows in
all (8 x 125,000 and more) there is a point of 64,000 (8 x 8,000), where a row stands for several items. Requests hold
one impression, since only the events are used. The held-out loss is measured on users who never train. One thing is
varied at a time: rows with the middle tower, towers with the middle number of rows.
"""

from pinfm_jax.bench.scaling import Scaling
from pinfm_jax.config import (
  DataConfig,
  Experiment,
  FinetuneConfig,
  PinFMConfig,
  PretrainConfig,
  TableConfig,
  TowerConfig,
  UpdateConfig,
)

FEED = {
  'users': 3_000,
  'items': 24_000,
  'days': 10,
  'topics': 64,
  'sessions_a_day': 1.0,
  'organic_events': 40.0,
  'min_candidates': 1,
  'max_candidates': 1,
  'content_width': 1,
}

experiment = Experiment(
  name='scaling_law',
  data=DataConfig(source='simulator', simulator=FEED, test_days=1, validation_days=1, finetune_days=1),
  model=PinFMConfig(
    tables=TableConfig(sub_tables=8, rows=1_000_000, width=8, init_scale=0.1),
    tower=TowerConfig(layers=2, width=64, heads=4, output_width=64, max_positions=64),
  ),
  pretrain=PretrainConfig(
    steps=300,
    checkpoint_every=150,
    eval_every=150,
    eval_share=0.05,
    batch_segments=64,
    segment_length=64,
    downstream_length=48,
    window=8,
    pairs=3,
    max_columns=2048,
    update=UpdateConfig(learning_rate=2e-3, table_learning_rate=0.05, warmup_steps=50),
  ),
  finetune=FinetuneConfig(history_length=48, history_block=16),
  arms=(),
)

scaling = Scaling(
  rows=(8_000, 125_000, 1_000_000, 8_000_000),
  towers=(
    {'layers': 1, 'width': 16, 'heads': 2, 'output_width': 64},
    {},
    {'layers': 4, 'width': 128, 'heads': 8, 'output_width': 64},
  ),
  quick={
    'data.simulator': {**FEED, 'users': 300, 'items': 400, 'days': 5, 'organic_events': 10.0, 'topics': 8},
    'model.tables.rows': 1_000,
    'pretrain.steps': 4,
    'pretrain.checkpoint_every': 2,
    'pretrain.eval_every': 2,
    'pretrain.eval_share': 0.3,
    'pretrain.batch_segments': 8,
    'pretrain.max_columns': 64,
  },
  quick_rows=(50, 1_000),
)
