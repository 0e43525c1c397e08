"""A tiny simulated data set and experiment, shared by the tests of training and of whole runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

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
from pinfm_jax.model.tables import Tables, init_rows, table_rows
from pinfm_jax.train.alone import newest, reading_alone

SIMULATOR = {'users': 120, 'items': 150, 'days': 6, 'topics': 6, 'content_width': 8, 'sessions_a_day': 1.0}
UPDATE = UpdateConfig(learning_rate=3e-3, warmup_steps=2)
EXPERIMENT = Experiment(
  name='toy',
  data=DataConfig(simulator=SIMULATOR, test_days=1, validation_days=1, finetune_days=2),
  model=PinFMConfig(
    TableConfig(sub_tables=2, rows=500, width=8),
    TowerConfig(layers=2, width=16, heads=2, output_width=8, max_positions=20),
  ),
  pretrain=PretrainConfig(
    steps=6, batch_segments=8, segment_length=16, downstream_length=8, window=4, pairs=2, max_columns=64,
    positive_actions=('click', 'save'), checkpoint_every=3, log_every=1, update=UPDATE,
  ),
  ranker=RankerConfig(cross_layers=1, mlp=(16,), module_width=8, item_buckets=64, embedding_width=8),
  finetune=FinetuneConfig(
    epochs=0.3, batch_requests=8, candidates=10, history_length=8, history_block=4, ntl_columns=32,
    checkpoint_every=4, log_every=1, update=replace(UPDATE, pretrained_ratio=0.1),
  ),
  evaluate=EvaluateConfig(
    main_label='save', labels=('click', 'save', 'hide'), utility={'save': 1.0, 'hide': -1.0}, ks=(5,),
  ),
  arms=(Arm('without PinFM', {'ranker.sequence': 'none'}), Arm('with PinFM')),
)  # fmt: skip


def tables(config: TableConfig, seed: int = 1) -> Tables:
  """Fresh tables with Adagrad accumulators, on one device."""
  rows = table_rows(config, 1)
  return Tables(init_rows(config, rows, jnp.uint32(seed)), jnp.zeros(rows))


def load_arrays(directory: Path) -> dict[str, Any]:
  """The newest checkpoint's state as a nested dict of NumPy arrays. One process may call it alone (`reading_alone`)."""
  path = newest(directory)
  with reading_alone():
    layout = ocp.checkpointables_metadata(path).metadata['state']
    # Abstract NumPy arrays ask Orbax for host memory, whatever devices wrote the checkpoint; `empty` touches no page.
    abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), layout)
    return ocp.load_checkpointables(path, {'state': abstract})['state']
