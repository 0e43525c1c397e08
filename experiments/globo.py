"""Globo's news clicks, end to end: does a pretrained PinFM help to rank news, where most articles are hours old?

Command:   PINFM_DATA=DIR pinfm run experiments/globo.py      (DIR holds globo/; or --set data.path=DIR)
Hardware:  2 CPU cores, 8 GB of memory
Time:      see experiments/README.md
Expected:  see experiments/README.md

Protocol, fixed before the test split was looked at. A request is one click of a user against 9 other articles, drawn
from the clicks of the hour before it as often as each was clicked; the user had read none of the 10 before. Main
metric: HIT@3 of click. Articles live for hours (about half of the clicks go to articles under 24 hours old, and a model
that is a day old knows little of it), so the parts are hours (UTC): 19:30 to 21:00 of Friday, 13 October 2017, tests,
the 24 hours before that train the rankers, and all clicks before them pretrain the tower, with the clicks of these 24
hours by the users that the rankers do not train on (pretrain_overlap_users: a tower that has seen what a ranker trains
on makes it trust the tower too much). Later clicks are not used. Settings were chosen on the same hours of Tuesday, 10
October, which are the validation part of

  --set data.validation_days=0.0625 data.test_days=0.125 evaluate.split=validation 'data.options={"requests": True,
  "max_requests": 50000, "impressions_from": "2017-10-09T19:30", "impressions_until": "2017-10-11"}'

Every ranker sees, known strictly before the request: clicks on the article in the last hour, the last 24 hours and so
far, the time since its last one, its age, the user's and the session's clicks so far, device, place and referrer, and
the article's reader vector: the mean of the vectors (SVD of the clicks before the first request) of those who had read
it before the current hour. All of them have TransAct, small as the histories are short.
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
  name='globo',
  data=DataConfig(
    source='globo',
    path=os.path.join(os.environ['PINFM_DATA'], 'globo') if 'PINFM_DATA' in os.environ else '',
    options={
      'requests': True,
      'candidates': 10,
      'max_requests': 50_000,
      'impressions_from': '2017-10-12T19:30',
      'impressions_until': '2017-10-13T21:00',
    },
    test_days=0.1875,  # counted from midnight, so from 19:30
    validation_days=0.0,
    finetune_days=1.0,
    pretrain_overlap=True,
    pretrain_overlap_users='others',
  ),
  model=PinFMConfig(
    tables=TableConfig(sub_tables=8, rows=20_000, width=8, init_scale=0.1),
    tower=TowerConfig(layers=2, width=64, heads=4, output_width=64, max_positions=32),
  ),
  pretrain=PretrainConfig(
    steps=1200,
    checkpoint_every=600,
    batch_segments=64,
    segment_length=32,
    pack=True,
    downstream_length=24,
    window=8,
    pairs=1,
    mtl_weight=0.5,
    ftl_weight=0.0,
    max_columns=1024,
    update=UpdateConfig(learning_rate=2e-3, table_learning_rate=0.1, warmup_steps=50),
  ),
  ranker=RankerConfig(
    similarity_width=32,
    transact=TransActConfig(length=8, width=16, outputs=2, item_buckets=16_384),
    cross_layers=2,
    mlp=(128, 64),
    module_width=32,
    item_buckets=8192,
    candidate_content=True,  # the readers' vector of the candidate
    learnable_token=True,
  ),
  finetune=FinetuneConfig(
    epochs=1.0,
    checkpoint_every=500,
    batch_requests=128,
    candidates=10,
    min_candidates=10,
    history_length=24,
    history_block=8,
    ntl_columns=512,
    cold_start=ColdStartConfig(randomise=0.3, age_edges_hours=(6.0, 24.0), age_dropout=(0.3, 0.1)),
    update=UpdateConfig(learning_rate=2e-3, table_learning_rate=0.05, warmup_steps=50, pretrained_ratio=0.5),
  ),
  evaluate=EvaluateConfig(main_label='click', utility={'click': 1.0}, age_edges_hours=(1.0, 6.0, 24.0)),
  seeds=(0, 1, 2),
)
