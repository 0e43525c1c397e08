"""The main job on the embedded feed: simulated log -> prepared data -> pretraining -> two rankers -> bundle -> scores.

Command:   pinfm run experiments/quickstart.py
Hardware:  2 CPU cores, 4 GB of memory
Time:      under 4 minutes
Expected:  on the simulated test days the ranker with PinFM beats the same ranker without it, in AUC and HIT@3 of save
           and click, and stays below the best attainable values, which are known because the log is simulated.
"""

from pinfm_jax.config import (
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
  name='quickstart',
  data=DataConfig(source='simulator', test_days=2, validation_days=1, finetune_days=4),
  model=PinFMConfig(
    tables=TableConfig(sub_tables=8, rows=20_000, width=8, init_scale=0.1),
    tower=TowerConfig(layers=2, width=64, heads=4, output_width=64, max_positions=72),
  ),
  pretrain=PretrainConfig(
    steps=300,
    checkpoint_every=100,
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
    epochs=2.0,
    checkpoint_every=100,
    batch_requests=64,
    candidates=13,
    history_length=48,
    history_block=16,
    ntl_columns=512,
    update=UpdateConfig(learning_rate=2e-3, table_learning_rate=0.05, warmup_steps=50, pretrained_ratio=0.1),
  ),
  evaluate=EvaluateConfig(
    main_label='save',
    labels=('click', 'save', 'hide'),
    utility={'click': 0.3, 'save': 1.0, 'hide': -1.0},
  ),
)
