"""KuaiRand-Pure, end to end on the real log: does a pretrained PinFM help a short-video ranker?

Command:   PINFM_DATA=DIR pinfm run experiments/kuairand.py      (DIR holds kuairand_pure/; or --set data.path=DIR)
Hardware:  2 CPU cores, 6 GB of memory
Time:      under 15 minutes for 3 seeds
Expected:  see experiments/README.md

Protocol, fixed before the test split was looked at. The histories before 25 April 2022 pretrain the tower. The log
from 25 April to 8 May gives the impressions: a request is a user's UTC day. The last 3 days test, the day before
validates, the 10 days before that train the rankers. Requests of at least 4 distinct items are evaluated; those of at
least 2 train. Main metrics: AUC and HIT@3 of long_view. like, click, hate and follow are reported as AUC with interval
and positives; hate has 190 positives in the whole log and supports no claim. Histories have an order but no time of
each event.
"""

import os

from pinfm_jax.config import (
  ColdStartConfig,
  DataConfig,
  EvaluateConfig,
  Experiment,
  FinetuneConfig,
  PinFMConfig,
  PretrainConfig,
  RankerConfig,
  TableConfig,
  TowerConfig,
  UpdateConfig,
)

experiment = Experiment(
  name='kuairand',
  data=DataConfig(
    source='kuairand',
    path=os.path.join(os.environ['PINFM_DATA'], 'kuairand_pure') if 'PINFM_DATA' in os.environ else '',
    test_days=3,
    validation_days=1,
    finetune_days=10,
  ),
  model=PinFMConfig(
    tables=TableConfig(sub_tables=8, rows=20_000, width=8, init_scale=0.1),
    tower=TowerConfig(layers=2, width=64, heads=4, output_width=64, max_positions=56),
  ),
  pretrain=PretrainConfig(
    steps=400,
    checkpoint_every=100,
    batch_segments=64,
    segment_length=50,  # the watch lists hold at most 50
    downstream_length=40,
    window=8,
    pairs=3,
    max_columns=1024,
    update=UpdateConfig(learning_rate=2e-3, table_learning_rate=0.05, warmup_steps=50),
  ),
  ranker=RankerConfig(cross_layers=2, mlp=(128, 64), module_width=32, item_buckets=8192),
  finetune=FinetuneConfig(
    epochs=1.0,
    checkpoint_every=100,
    batch_requests=128,
    candidates=6,
    min_candidates=2,
    history_length=48,
    history_block=16,
    ntl_columns=512,
    cold_start=ColdStartConfig(age_dropout=(0.0, 0.0)),  # all items here are 14 to 29 days old
    update=UpdateConfig(learning_rate=2e-3, table_learning_rate=0.05, warmup_steps=50, pretrained_ratio=0.1),
  ),
  evaluate=EvaluateConfig(
    main_label='long_view',
    labels=('long_view', 'click', 'like', 'follow', 'hate'),
    utility={'long_view': 1.0, 'click': 0.5, 'like': 0.5, 'hate': -1.0},
  ),
  seeds=(0, 1, 2),
)
