"""MovieLens-1M (sequential edition): the pretrained tower as a sequential recommender, leave-one-out, all films ranked.

Command:   PINFM_DATA=DIR pinfm run experiments/sequential/ml1m.py   (DIR holds ml1m/)
           pinfm sweep experiments/sequential/ml1m.py --arms experiments/sequential/baselines.py --split test
Hardware:  2 CPU cores, 3 GB of memory
Time:      not measured yet
Expected:  not measured yet

The protocol and the settings are those of `pinfm_jax.sequential`; the choice of the settings is told in
experiments/README.md. Stars are not read: the published models do not have them. Terms of the data: GroupLens, research
use, no redistribution.
"""

import os

from pinfm_jax.config import DataConfig
from pinfm_jax.sequential import SequenceData, sequential_experiment

experiment = sequential_experiment(
  'sequential_ml1m',
  DataConfig(
    source='movielens',
    path=os.path.join(os.environ['PINFM_DATA'], 'ml1m') if 'PINFM_DATA' in os.environ else '',
    options={'actions': 'none'},
  ),
  SequenceData(items=3416, events=987531, length=200, rows=32),
  epochs=80,
  changes={f'model.tower.{kind}': 0.2 for kind in ('dropout', 'embedding_dropout', 'attention_dropout')},
)
