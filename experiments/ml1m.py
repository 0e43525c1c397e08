"""MovieLens-1M: what the pretrained tower alone is worth in whole-catalogue retrieval; no rankers are trained.

Command:   PINFM_DATA=DIR pinfm run experiments/ml1m.py      (DIR holds ml1m/; or --set data.path=DIR)
Hardware:  2 CPU cores, 4 GB of memory
Time:      8 minutes on one core
Expected:  HR@10 of the next film .116, popularity .014 (2,000 users; experiments/README.md)

Each user's last film is held out and all films are ranked. The log has an order but no times and no impressions; stars
stand for actions. It serves experiments/ablations/sequence_length.py: half of the users have 96 films or more. The
settings are PinFM's, short and not tuned; what a tuned tower reaches is in experiments/sequential/ml1m.py.
"""

import os

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

experiment = Experiment(
  name='ml1m',
  data=DataConfig(
    source='movielens',
    path=os.path.join(os.environ['PINFM_DATA'], 'ml1m') if 'PINFM_DATA' in os.environ else '',
  ),
  model=PinFMConfig(
    tables=TableConfig(sub_tables=8, rows=10_000, width=8, init_scale=0.1),
    tower=TowerConfig(layers=2, width=64, heads=4, output_width=64, max_positions=136),
  ),
  pretrain=PretrainConfig(
    steps=2_000,
    checkpoint_every=500,
    batch_segments=32,
    segment_length=136,
    downstream_length=128,
    window=8,
    pairs=3,
    max_columns=2048,
    update=UpdateConfig(learning_rate=2e-3, table_learning_rate=0.05, warmup_steps=100),
  ),
  finetune=FinetuneConfig(history_length=128, history_block=32),  # the windows of the retrieval
  arms=(),
)
