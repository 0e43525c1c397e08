"""A tiny ranking model with data, shared by the tests of serving."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from flax.core import meta

from pinfm_jax.config import PinFMConfig, RankerConfig, TableConfig, TowerConfig
from pinfm_jax.data.events import id_key
from pinfm_jax.data.featurize import FeatureSchema, candidate_inputs, history_inputs, recent_inputs
from pinfm_jax.data.info import EmbeddingFeature, Features, IdTypes, SparseFeature
from pinfm_jax.data.records import History, Request
from pinfm_jax.data.tokens import PLAIN, ItemContent, TokenInputs, unit_half
from pinfm_jax.model.hashing import hash_rows
from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.model.ranker import CandidateBatch, DenseStats, FeatureSpec, RankingBatch, RankingModel
from pinfm_jax.model.transact import RecentEvents
from pinfm_jax.serve.bundle import TrainedRanker, export_bundle

ACTIONS, SURFACES = ('click', 'save', 'hide'), ('feed', 'search')
LENGTH, BLOCK = 20, 4
FEATURES = Features(
  dense=('price', 'rating'),
  sparse=(SparseFeature('country', 'vocabulary', 4, ('de', 'fr', 'jp')), SparseFeature('campaign', 'hashed', 17)),
  embedding=(EmbeddingFeature('picture', 3),),
)
SCHEMA = FeatureSchema(
  FEATURES, content_width=2, num_surfaces=2, item_buckets=30, history_length=LENGTH, labels=('click', 'hide')
)
SPEC = FeatureSpec(len(SCHEMA.dense_names), SCHEMA.sparse_sizes, SCHEMA.embedding_widths, 2, SCHEMA.content_width)
MODEL = PinFMConfig(
  TableConfig(sub_tables=2, rows=50, width=8, hash_seed=3),
  TowerConfig(layers=2, width=16, heads=2, mlp_ratio=2, output_width=8, max_positions=LENGTH + 1),
  num_actions=3,
  num_surfaces=2,
)
UTILITY = {'click': 1.0, 'hide': -3.0}


@dataclass(frozen=True)
class Toy:
  """A ranker with random parameters."""

  ranker: RankerConfig
  params: Any
  rows_GE: np.ndarray | None  # noqa: N815
  stats: DenseStats
  model: PinFMConfig = MODEL

  @property
  def module(self) -> RankingModel:
    return RankingModel(self.model, self.ranker, SPEC)

  @property
  def schema(self) -> FeatureSchema:
    transact = self.ranker.transact
    return replace(
      SCHEMA, recent_length=transact.length, recent_buckets=transact.item_buckets if transact.length else 0
    )

  @property
  def tokens(self) -> TokenInputs:
    return TokenInputs(self.model.tower.time_gap_buckets, catalogue(self.model) if self.model.content else None)

  def export(self, out: Any, storage: str = 'int4', overwrite: bool = False, **changes: Any) -> Any:
    """Writes its bundle, some parts changed."""
    return export_bundle(out, self.trained(**changes), storage, overwrite)

  def trained(self, **changes: Any) -> TrainedRanker:
    """What its bundle is made of, some parts changed."""
    parts = {
      'model_config': self.model,
      'ranker_config': self.ranker,
      'schema': self.schema,
      'spec': SPEC,
      'params': self.params,
      'rows_GE': self.rows_GE,
      'stats': self.stats,
      'actions': ACTIONS,
      'surfaces': SURFACES,
      'id_type': IdTypes('integer', 'string'),
      'history_block': BLOCK,
      'utility': UTILITY,
      'run': {'name': 'toy'},
      'items': self.tokens.items,
    }
    return TrainedRanker(**{**parts, **changes})


def make_toy(sequence: str = 'pinfm', model: PinFMConfig = MODEL, **options: Any) -> Toy:
  """The model with weights large enough that every input changes the scores; `options` are settings of the ranker."""
  ranker = RankerConfig(sequence=sequence, cross_layers=1, mlp=(16,), module_width=8, embedding_width=4, **options)
  stats = DenseStats(*(jnp.array(v, jnp.float32) for v in ([0] * 4, [9, 9, 99, 50], [1] * 4, [0.5] * 4)))
  bare = Toy(ranker, None, None, stats, model)
  examples = [(make_history(0, 0), make_request(0, 0, 0), make_content(0))]
  batch = ranking_batch(examples, bare.tokens, bare.schema)
  rows_GE = np.random.default_rng(1).normal(size=(100, 8)).astype(np.float32) if sequence == 'pinfm' else None
  init = partial(RankingModel(model, ranker, SPEC).init, need_history_output=True)
  shapes = meta.unbox(jax.eval_shape(init, jax.random.key(0), *vectors(rows_GE, batch), batch, stats))['params']
  rng = np.random.default_rng(2)
  params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
  return Toy(ranker, params, rows_GE, stats, model)


def catalogue(model: PinFMConfig) -> ItemContent:
  """Content of the items; every third one is new to a model with hidden ids."""
  names = sorted((item_name(i) for i in range(40)), key=lambda name: id_key(name, 'string'))
  keys = np.array([id_key(name, 'string') for name in names], np.uint64)
  return ItemContent(keys, unit_half(content_of(keys)), keys % np.uint64(3) > 0 if model.id_mask else None)


def vectors(rows_GE: np.ndarray | None, batch: RankingBatch) -> tuple[np.ndarray | None, np.ndarray | None]:
  """Item vectors of histories and candidates, straight from the table."""
  if rows_GE is None:
    return None, None
  words = (batch.events.item_UL2, batch.candidates.item_UC2)
  return tuple(rows_GE[hash_rows(w, 2, 50, 3)].reshape(*w.shape[:2], 16) for w in words)


def item_name(i: int) -> str:
  return f'item/{i}'


def make_history(seed: int, events: int) -> History:
  rng = np.random.default_rng(100 + seed)
  return History(
    np.cumsum(rng.integers(1, 10**6, events)) + 1_700_000_000_000,
    np.array([id_key(item_name(i), 'string') for i in rng.integers(0, 40, events)], np.uint64),
    rng.integers(0, 2, events).astype(np.uint16),
    rng.integers(0, 8, events).astype(np.uint32),
  )


def make_request(seed: int, history_end: int, user_row: int, candidates: int = 5) -> Request:
  rng = np.random.default_rng(200 + seed)
  dense = rng.uniform(0, 10, (candidates, 2)).astype(np.float32)
  dense[rng.random(dense.shape) < 0.3] = np.nan
  created = 1_700_100_000_000 - rng.integers(0, 10**9, candidates)
  created[::3] = -1
  return Request(
    user_row=user_row,
    history_end=history_end,
    timestamp=1_700_100_000_000 + rng.integers(0, 10**6, candidates),
    item=np.array([id_key(item_name(i), 'string') for i in rng.permutation(40)[:candidates]], np.uint64),
    created_at=created,
    surface=rng.integers(0, 2, candidates).astype(np.uint16),
    labels=np.zeros((candidates, 2), np.uint8),
    dense=dense,
    sparse=np.stack([rng.integers(0, 4, candidates), rng.integers(0, 17, candidates)], axis=1).astype(np.int32),
    embedding=rng.normal(size=(candidates, 3)).astype(np.float32),
    reference=None,
  )


def make_content(row: int, candidates: int = 5) -> np.ndarray:
  """Contents of the request's candidates: a function of the item, as in an item table."""
  return content_of(make_request(row, 0, 0, candidates).item)


def content_of(keys: np.ndarray) -> np.ndarray:
  return np.stack([np.cos(keys % np.uint64(97)), np.sin(keys % np.uint64(89))], axis=1).astype(np.float32)


def stack(parts: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
  return np.stack([part[name] for part in parts])


def ranking_batch(
  examples: list[tuple[History, Request, np.ndarray]], tokens: TokenInputs = PLAIN, schema: FeatureSchema = SCHEMA
) -> RankingBatch:
  """The training path's input for whole requests of equally many candidates."""
  events = [history_inputs(history, request.history_end, LENGTH, BLOCK, tokens) for history, request, _ in examples]
  count = len(examples[0][1])
  candidates = [
    candidate_inputs(r, slice(0, count), count, schema, content, tokens, last_event(history, r.history_end))
    for history, r, content in examples
  ]
  more = [n for n in ('gap', 'content', 'new') if n in events[0]]
  names = {'gap': 'gap_U', 'content': 'content_U', 'new': 'hidden_id_U'}
  ends = {'gap': ('L', 'C'), 'content': ('LW', 'CW'), 'new': ('L', 'C')}
  own, recent = {}, None
  if schema.recent_length:
    inputs = [
      recent_inputs(history, r.history_end, schema, tokens, int(r.timestamp.min())) for history, r, _ in examples
    ]
    own['recent_item_UC'] = stack(candidates, 'recent_item')
    content = stack(inputs, 'content') if tokens.items else None
    recent = RecentEvents(*(stack(inputs, n) for n in ('item', 'actions', 'hours')), content)
  return RankingBatch(
    EventBatch(
      *(stack(events, n) for n in ('item', 'surface', 'actions', 'mask')),
      **{names[n] + ends[n][0]: stack(events, n) for n in more},
    ),
    CandidateBatch(
      *(stack(candidates, n) for n in ('item', 'mask', 'age_hours', 'dense', 'sparse', 'embedding')),
      **{names[n] + ends[n][1]: stack(candidates, n) for n in more},
      **own,
    ),
    stack(candidates, 'labels'),
    np.arange(len(examples), dtype=np.int32),
    recent,
  )


def last_event(history: History, end: int) -> int | None:
  return int(history.timestamp[end - 1]) if end else None


class ToyDataset:
  """What `dataset_requests` needs of a prepared data set, in memory: request i of user i with lengths[i] events."""

  def __init__(self, lengths: list[int]):
    self._histories = [make_history(i, length + 2) for i, length in enumerate(lengths)]  # two events lie after it
    self._requests = [make_request(i, length, i) for i, length in enumerate(lengths)]
    self.num_requests = len(lengths)
    self.info = ToyInfo()
    self.requests = pl.DataFrame({'request_id': [f'r{i}' for i in range(len(lengths))]})
    names = sorted((item_name(i) for i in range(40)), key=lambda name: id_key(name, 'string'))
    keys = np.array([id_key(name, 'string') for name in names], np.uint64)
    content = pl.Series('content', content_of(keys), dtype=pl.Array(pl.Float32, 2))
    self.items = pl.DataFrame({'item_key': keys, 'item_id': names, 'content': content})

  def history(self, row: int) -> History:
    return self._histories[row]

  def request(self, row: int) -> Request:
    return self._requests[row]

  def expected(self, toy: Toy) -> np.ndarray:
    """[U, C, T] probabilities of the training path."""
    examples = [(h, r, content_of(r.item)) for h, r in zip(self._histories, self._requests, strict=True)]
    batch = ranking_batch(examples, toy.tokens, toy.schema)
    output = jax.jit(toy.module.apply)({'params': toy.params}, *vectors(toy.rows_GE, batch), batch, toy.stats)
    return np.asarray(jax.nn.sigmoid(output.logits_UCT))


@dataclass(frozen=True)
class ToyInfo:
  actions: tuple[str, ...] = ACTIONS
  surfaces: tuple[str, ...] = SURFACES
  features: Features = FEATURES
  content_width: int = 2
