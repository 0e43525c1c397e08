"""MovieLens-1M (sequential edition): the pretrained tower as a sequential recommender, all films ranked for each user.

Command:   PINFM_DATA=DIR pinfm run experiments/sequential/ml1m.py   (DIR holds ml1m/)
           pinfm sweep experiments/sequential/ml1m.py --arms experiments/sequential/baselines.py --split test
Hardware:  2 CPU cores, 3 GB of memory
Time:      see experiments/README.md
Expected:  see experiments/README.md

Protocol and shared settings: `pinfm_jax.sequential`. Each user's last event tests, the one before chooses the epoch;
films that the user has rated are not ranked; both holdouts and a popularity row are printed. The settings were
chosen by hand on the validation events (experiments/README.md); search.py does it with equal budgets.
Stars are not read: the published models do not have them. With the file as published (ratings.dat, ids up to 3,952)
instead of that edition: --set model.tables.rows=3954 'data.options={"actions": "none", "core": 5}'.
Terms of the data: GroupLens, research use, no redistribution.
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
  epochs=27,
  changes={
    'model.tower.backbone': 'gpt2',
    'model.tower.layers': 2,
    **{f'model.{name}': 128 for name in ('tower.width', 'tower.output_width', 'tables.width')},
    'model.tables.init_scale': 0.1,
    **{f'model.tower.{kind}': 0.2 for kind in ('dropout', 'embedding_dropout', 'attention_dropout')},
    **{f'model.tower.{part}': True for part in ('rotary', 'rms_norm', 'swiglu')},
    'pretrain.mtl_weight': 0.0,
    'pretrain.full_catalogue': True,  # the catalogue is small enough
    'pretrain.uniform_negatives': 0,
    'pretrain.log_q': 'none',
    'pretrain.ema_decay': 0.99,
    'pretrain.update.final_ratio': 0.4,  # the rate ends high: the average of the weights smooths
  },
)
