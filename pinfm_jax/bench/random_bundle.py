"""A bundle with random parameters, and requests for it: serving costs what it costs whatever the values are."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.core import meta

from pinfm_jax.config import FinetuneConfig, MeshConfig, PinFMConfig, RankerConfig, TableConfig, TowerConfig
from pinfm_jax.data.featurize import FeatureSchema
from pinfm_jax.data.info import Features, IdTypes, SparseFeature
from pinfm_jax.model.ranker import DenseStats
from pinfm_jax.serve.bundle import TrainedRanker, export_bundle
from pinfm_jax.train.finetune import FinetuneTask, feature_spec
from pinfm_jax.train.sharding import make_mesh

_ACTIONS, _SURFACES, _COUNTRIES = ('click', 'save', 'hide'), ('home', 'search'), ('de', 'fr', 'jp')
_BLOCK, _ITEMS, _NOW_MS = 32, 100_000, 1_700_000_000_000


def random_bundle(out: Path, tower: TowerConfig, history_length: int) -> Path:
  """Exports a ranker that was never trained.

  Args:
    out: directory to make.
    tower: of PinFM; its positions are set to what the history needs.
    history_length: L_d.
  """
  positions = TowerConfig(**{**vars(tower), 'max_positions': history_length + 1})
  tables = TableConfig(sub_tables=8, rows=20_000, width=8)
  model = PinFMConfig(tables, positions, num_actions=len(_ACTIONS), num_surfaces=len(_SURFACES))
  ranker = RankerConfig(cross_layers=2, mlp=(128, 64), module_width=32, item_buckets=8192)
  features = Features(dense=('price',), sparse=(SparseFeature('country', 'vocabulary', 4, _COUNTRIES),))
  schema = FeatureSchema(features, 0, len(_SURFACES), ranker.item_buckets, history_length, ('click', 'save'))
  task = FinetuneTask(model, ranker, FinetuneConfig(candidates=2), schema, steps=1)
  with jax.set_mesh(make_mesh(MeshConfig())):
    params = meta.unbox(jax.jit(task.init)(jax.random.key(0)))
    ones = np.ones(len(schema.dense_names), np.float32)
    rng = np.random.default_rng(0)
    trained = TrainedRanker(
      model_config=model,
      ranker_config=ranker,
      schema=schema,
      spec=feature_spec(schema),
      params={name: value for name, value in params.items() if name != 'log_temperature'},
      rows_GE=(rng.normal(0, 0.3, (tables.rows, tables.width)).astype(np.float32) for _ in range(tables.sub_tables)),
      stats=DenseStats(0 * ones, 1e4 * ones, ones, ones),
      actions=_ACTIONS,
      surfaces=_SURFACES,
      id_type=IdTypes('integer', 'integer'),
      history_block=_BLOCK,
      utility={'click': 0.3, 'save': 1.0},
      run={'name': 'random'},
    )
    return export_bundle(out, trained, overwrite=True)


def random_documents(count: int, events: int, candidates: int, seed: int = 0) -> list[dict[str, Any]]:
  """Ranking requests of as many users, each with `events` events and `candidates` candidates."""
  return [_document(u, events, candidates, np.random.default_rng([seed, u])) for u in range(count)]


def _document(user: int, events: int, candidates: int, rng: np.random.Generator) -> dict[str, Any]:
  times = _NOW_MS - np.cumsum(rng.integers(1_000, 600_000, events))[::-1]
  history = [
    {'timestamp': int(time), 'item_id': int(item), 'surface': _SURFACES[item % 2], 'actions': [_ACTIONS[item % 3]]}
    for time, item in zip(times, rng.integers(0, _ITEMS, events), strict=True)
  ]
  listed = [
    {
      'item_id': int(item),
      'item_created_at': _NOW_MS - int(age),
      'price': float(price),
      'country': _COUNTRIES[item % 3],
    }
    for item, age, price in zip(
      rng.integers(0, _ITEMS, candidates),
      rng.integers(0, 10**9, candidates),
      rng.uniform(0, 99, candidates),
      strict=True,
    )
  ]
  return {
    'request_id': f'user {user}', 'timestamp': _NOW_MS, 'surface': 'home', 'history': history, 'candidates': listed
  }  # fmt: skip
