"""Amazon Sports and Outdoors: the pretrained tower as a sequential recommender, all items ranked for each user.

Command:   PINFM_DATA=DIR pinfm run experiments/sequential/sports.py   (DIR holds amazon/)
           pinfm sweep experiments/sequential/sports.py --arms experiments/sequential/baselines.py --split test
Hardware:  2 CPU cores, 3 GB of memory
Time:      see experiments/README.md
Expected:  see experiments/README.md

Protocol and shared settings: `pinfm_jax.sequential`. Each user's last event tests, the one before chooses the epoch;
items that the user has had are not ranked; both holdouts and a popularity row are printed. The settings are
Beauty's but for what is changed here, chosen by hand on the validation events (experiments/README.md); search.py
searches.
Terms of the data: none stated by the source, research use only.
"""

import os

from pinfm_jax.config import DataConfig
from pinfm_jax.sequential import SequenceData, sequential_experiment

experiment = sequential_experiment(
  'sequential_sports',
  DataConfig(
    source='amazon',
    path=os.path.join(os.environ['PINFM_DATA'], 'amazon') if 'PINFM_DATA' in os.environ else '',
    options={'category': 'Sports_and_Outdoors'},
  ),
  SequenceData(items=18357, events=225141, length=50, rows=16),
  epochs=20,
  changes={
    'pretrain.mtl_weight': 2.0,
    'pretrain.window': 8,
    'pretrain.pairs': 4,
    'pretrain.ema_decay': 0.999,
    'pretrain.update.final_ratio': 0.4,
  },
)
