"""The small bundle that `pinfm demo` scores with: the embedded feed, a tower and tables of a few MB.

Command:   pinfm run experiments/demo.py
Hardware:  2 CPU cores, 3 GB of memory
Time:      under 4 minutes
Expected:  a bundle of under 2 MB in runs/demo/bundle; the ranker with PinFM beats the one without it in AUC of save.
           `.ci/release` runs this and puts the bundle into the wheel.
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
  name='demo',
  data=DataConfig(source='simulator', test_days=2, validation_days=1, finetune_days=4),
  model=PinFMConfig(
    tables=TableConfig(sub_tables=8, rows=8_000, width=8, init_scale=0.1),
    tower=TowerConfig(layers=2, width=48, heads=4, output_width=48, max_positions=56),
  ),
  pretrain=PretrainConfig(
    steps=250,
    checkpoint_every=250,
    batch_segments=64,
    segment_length=48,
    downstream_length=32,
    window=8,
    pairs=3,
    positive_actions=('click', 'closeup', 'save', 'share'),
    max_columns=1024,
    update=UpdateConfig(learning_rate=2e-3, table_learning_rate=0.05, warmup_steps=50),
  ),
  # No hashed item ids of the ranker's own: at this size they would be most of the bundle.
  ranker=RankerConfig(cross_layers=2, mlp=(64, 32), module_width=32, item_buckets=0),
  finetune=FinetuneConfig(
    epochs=2.0,
    checkpoint_every=500,
    batch_requests=64,
    candidates=13,
    history_length=32,
    history_block=8,
    ntl_columns=512,
    update=UpdateConfig(learning_rate=2e-3, table_learning_rate=0.05, warmup_steps=50, pretrained_ratio=0.1),
  ),
  evaluate=EvaluateConfig(
    main_label='save',
    labels=('click', 'save', 'hide'),
    utility={'click': 0.3, 'save': 1.0, 'hide': -1.0},
  ),
)
