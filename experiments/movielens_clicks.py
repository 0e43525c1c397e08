"""MovieLens-1M as click-through, by the DCNv2 paper's protocol as far as it is known.

Command:   PINFM_DATA=DIR pinfm clicks experiments/movielens_clicks.py       (DIR holds ml1m/; or --set data.path=DIR)
           the same with --split test, once the settings are chosen
           --set data.source=criteo data.path=DIR 'data.options={"split":"time","min_count":10}'   (or avazu)
Hardware:  2 CPU cores, 3 GB of memory
Time:      see experiments/README.md
Expected:  DCNv2 in its paper: AUC .8950 +- .0003, logloss .3170 +- .0004; see experiments/README.md

4 and 5 stars are clicks, 1 and 2 none, 3 are left out. 80 % of the rows train, 10 % choose settings and stop the
training, 10 % test, divided at random. Fields: user, item, gender, age, occupation, zip code, genres. What differs from
the paper: its random split is not published, this edition lacks users and movies with fewer than 5 ratings, a movie's
genres are one category.
"""

import os

from pinfm_jax.clicks.config import ClickData, ClickExperiment, ClickTraining
from pinfm_jax.config import Arm, RankerConfig

_FINAL = {
  'ranker.interaction': 'final',
  'ranker.block.blocks': 3,
  'ranker.block.width': 64,
  'ranker.block.concat': False,
  'ranker.mlp': (64,),
}

clicks = ClickExperiment(
  name='movielens_clicks',
  data=ClickData(
    source='movielens',
    path=os.path.join(os.environ['PINFM_DATA'], 'ml1m') if 'PINFM_DATA' in os.environ else '',
  ),
  ranker=RankerConfig(
    sequence='none',
    interaction='dcnv2',
    cross_layers=2,
    mlp=(256, 128),
    dropout=0.3,
    sparse_width=16,
    raw_embeddings=True,
  ),
  training=ClickTraining(
    epochs=20,
    batch=4096,
    learning_rate=2e-3,
    embedding_l2=1e-4,
    evaluate_every=0.5,
    patience=3,
    decay=0.3,
  ),
  arms=(
    Arm('DCNv2', {}, '.8950 / .3170'),
    Arm('no interaction', {'ranker.interaction': 'none'}),
    Arm('low-rank DCNv2 with tanh', {'ranker.interaction': 'dcnv2_low_rank', 'ranker.block.activation': 'tanh'}),
    Arm('MaskNet, parallel', {'ranker.interaction': 'masknet_parallel', 'ranker.block.width': 64}),
    Arm('MaskNet under DCNv2', _FINAL),
  ),
  baseline='DCNv2',
)
