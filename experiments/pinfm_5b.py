"""Tables of 5.12 B parameters (8 x 20 M rows x 32, bfloat16) on one machine: train, save, restore, export.

Command:   pinfm run experiments/pinfm_5b.py --stages prepare,pretrain,finetune
           pinfm export runs/pinfm_5b --out bundles/pinfm_5b
Hardware:  2 CPU cores, 24 GB of memory, 30 GB of disk
Time:      see experiments/README.md
Expected:  the loss falls; memory stays near the 10.9 GB of rows and accumulators. The simulated feed has 4,000 items, so
           nearly all rows are never touched: this shows what size costs, not what it gives.
"""

from pinfm_jax.config import (
  Arm,
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
  name='pinfm_5b',
  data=DataConfig(source='simulator', test_days=2, validation_days=1, finetune_days=4),
  model=PinFMConfig(
    tables=TableConfig(sub_tables=8, rows=20_000_000, width=32, init_scale=0.1, dtype='bfloat16'),
    tower=TowerConfig(layers=2, width=64, heads=4, output_width=64, max_positions=72),
  ),
  pretrain=PretrainConfig(
    steps=200,
    checkpoint_every=100,
    keep_last=1,
    log_every=10,
    batch_segments=64,
    segment_length=64,
    downstream_length=48,
    window=8,
    pairs=3,
    positive_actions=('click', 'closeup', 'save', 'share'),
    max_columns=1024,
    update=UpdateConfig(learning_rate=2e-3, table_learning_rate=0.05, warmup_steps=50),
  ),
  ranker=RankerConfig(cross_layers=2, mlp=(128, 64), module_width=32, item_buckets=8192),
  finetune=FinetuneConfig(
    epochs=0.2,
    checkpoint_every=1000,
    batch_requests=64,
    candidates=13,
    history_length=48,
    history_block=16,
    ntl_columns=512,
    update=UpdateConfig(learning_rate=2e-3, table_learning_rate=0.05, warmup_steps=10, pretrained_ratio=0.1),
  ),
  evaluate=EvaluateConfig(main_label='save', utility={'click': 0.3, 'save': 1.0, 'hide': -1.0}),
  arms=(Arm('with PinFM'),),
  baseline='with PinFM',
)
