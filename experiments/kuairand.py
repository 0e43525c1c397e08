"""KuaiRand-Pure, end to end on the real log: does a pretrained PinFM help a short-video ranker?

Command:   PINFM_DATA=DIR pinfm run experiments/kuairand.py      (DIR holds kuairand_pure/; or --set data.path=DIR)
Hardware:  2 CPU cores, 6 GB of memory
Time:      see experiments/README.md
Expected:  see experiments/README.md

Protocol. Split and metrics were fixed before the test days were looked at, settings were chosen on the validation day.
The histories before 25 April 2022 pretrain the tower. The log from 25 April to 8 May gives the impressions: a request
is a user's UTC day. The last 3 days test, the day before validates, the 10 days before that train the rankers. Main
metrics: AUC of long_view over all impressions, and HIT@3 over the requests of at least 4 distinct items; requests of at
least 2 train. like, click, hate and follow are reported as AUC with interval and positives; hate has 190 positives in
the whole log and supports no claim. Histories have an order but no time of each event.

Pretraining asks for the next video that was watched long, with shown ones that were not among the negatives.
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
  TransActConfig,
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
    min_candidates=1,
  ),
  model=PinFMConfig(
    tables=TableConfig(sub_tables=8, rows=20_000, width=8, init_scale=0.1),
    tower=TowerConfig(layers=2, width=64, heads=4, output_width=64, max_positions=56),
  ),
  pretrain=PretrainConfig(
    steps=800,
    checkpoint_every=200,
    batch_segments=64,
    segment_length=50,  # the watch lists hold at most 50
    downstream_length=40,
    window=8,
    pairs=3,
    positive_actions=('long_view',),
    impression_negatives=4,
    max_columns=1024,
    update=UpdateConfig(learning_rate=2e-3, table_learning_rate=0.05, warmup_steps=50),
  ),
  ranker=RankerConfig(
    # Off; ablations/fusion.py has rows with it (length=16).
    transact=TransActConfig(length=0, width=16, outputs=5, item_buckets=16_384),
    cross_layers=2,
    mlp=(128, 64),
    module_width=32,
    similarity_width=32,
    item_buckets=8192,
  ),
  finetune=FinetuneConfig(
    epochs=1.0,
    checkpoint_every=100,
    batch_requests=128,
    candidates=6,
    min_candidates=2,
    history_length=48,
    history_block=16,
    ntl_columns=512,
    module_weight=0.0,  # on the validation day the module's own losses cost AUC
    tie_weight=0.0,
    cold_start=ColdStartConfig(age_dropout=(0.0, 0.0)),  # all items here are 14 to 29 days old
    update=UpdateConfig(learning_rate=2e-3, table_learning_rate=0.05, warmup_steps=50, pretrained_ratio=1.0),
  ),
  evaluate=EvaluateConfig(
    main_label='long_view',
    labels=('long_view', 'click', 'like', 'follow', 'hate'),
    utility={'long_view': 1.0, 'click': 0.5, 'like': 0.5, 'hate': -1.0},
  ),
  seeds=(0, 1, 2),
)
