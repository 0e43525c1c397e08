"""Lowers the context pass and the crossing pass to `jax.export` programs that need no model source to run.

Sizes U (users), C (candidates) and L (events, at most the history length) are symbolic, so one program serves every
batch. Parameters are arguments; item vectors enter as packed table rows (`serve.quantize`) and are unpacked inside.

  context(params, events) -> {'key', 'value'}, each [N, U, L, H, K], and 'user' [U, O]
    events: rows uint8 [U, L, S, row_bytes], surface int32 [U, L], actions uint32 [U, L], mask bool [U, L]
  crossing(params, stats, context, mask [U, L], candidates) -> probabilities float32 [U, C, T]
    candidates: rows uint8 [U, C, S, row_bytes], item uint32 [U, C, 2], mask bool [U, C], age_hours float32 [U, C],
    dense float32 [U, C, F], sparse int32 [U, C, F], embedding float32 [U, C, F]
    Events and candidates of a model with these options also have (`data.tokens`): gap int32 [U, L or C] with time
    gaps, content float16 [U, L or C, W] with content, new bool [U, L or C] with hidden ids.
  A ranker without PinFM has crossing(params, stats, candidates) alone, whose candidates have no rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from pinfm_jax.config import PinFMConfig, RankerConfig
from pinfm_jax.model.dcat import LayerKV
from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.model.ranker import CandidateBatch, DenseStats, FeatureSpec, RankingBatch, RankingModel, UserContext
from pinfm_jax.serve.manifest import TableLayout
from pinfm_jax.serve.quantize import dequantise_on_device

Array = jax.Array
Tree = Any
PLATFORMS = ('cpu', 'cuda', 'tpu')


@dataclass(frozen=True)
class ServingModel:
  """A ranking model as functions of plain dictionaries: what is lowered, and what the tests compare with."""

  model: PinFMConfig
  ranker: RankerConfig
  spec: FeatureSpec
  layout: TableLayout | None  # None for a ranker without PinFM

  @property
  def module(self) -> RankingModel:
    """The Flax module, with plain attention: a program serves all platforms and any sizes, a flash kernel does not."""
    tower = replace(self.model.tower, attention='xla', remat='none')
    return RankingModel(replace(self.model, tower=tower), self.ranker, self.spec)

  def context(self, params: Tree, events: dict[str, Array]) -> dict[str, Array]:
    """The context pass: every layer's keys and values, and the user's representation."""
    columns = (events['surface'], events['actions'], events['mask'])
    options = {'gap_UL': events.get('gap'), 'content_ULW': events.get('content'), 'hidden_id_UL': events.get('new')}
    batch = EventBatch(None, *columns, **options)
    kept = self.module.apply({'params': params}, self._vectors(events['rows']), batch, method='context')
    return {'key': kept.kv.key, 'value': kept.kv.value, 'user': kept.user_UO}

  def crossing(
    self, params: Tree, stats: dict[str, Array], context: dict[str, Array], mask_UL: Array, candidates: dict[str, Array]
  ) -> Array:
    """The crossing pass and the ranker: probabilities [U, C, T]."""
    kept = UserContext(LayerKV(context['key'], context['value']), context['user'], jnp.sum(mask_UL, axis=1))
    arguments = (self._vectors(candidates['rows']), kept, _candidates(candidates))
    return self.module.apply({'params': params}, *arguments, DenseStats(**stats), method='score')

  def ranker_alone(self, params: Tree, stats: dict[str, Array], candidates: dict[str, Array]) -> Array:
    """The ranker without PinFM: probabilities [U, C, T]."""
    batch = RankingBatch(None, _candidates(candidates), None, None)
    return jax.nn.sigmoid(self.module.apply({'params': params}, None, None, batch, DenseStats(**stats)).logits_UCT)

  def _vectors(self, packed: Array) -> Array:
    rows = dequantise_on_device(packed, self.layout.width, self.layout.storage)
    return rows.reshape(*rows.shape[:-2], self.layout.sub_tables * self.layout.width)


def export_programs(model: ServingModel, params: Tree, stats: Tree, history_length: int) -> dict[str, bytes]:
  """Lowers the programs for every platform.

  Args:
    model: what to lower.
    params: parameters (their shapes and types count).
    stats: {'low', 'high', 'mean', 'scale'} of the dense features.
    history_length: the largest L.

  Returns:
    Serialised programs: 'crossing', and 'context' for a ranker with PinFM.
  """
  params, stats = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, stats))
  if model.layout is None:
    inputs = _candidate_shapes(model, *export.symbolic_shape('U, C'))
    return {'crossing': _lower(model.ranker_alone, params, stats, inputs).serialize()}
  users, candidates, length = export.symbolic_shape('U, C, L', constraints=[f'L <= {history_length}'])
  inputs = _candidate_shapes(model, users, candidates)
  shape = (users, length)
  mask = jax.ShapeDtypeStruct(shape, jnp.bool_)
  events = {
    'rows': _packed_shape(model.layout, shape),
    'surface': jax.ShapeDtypeStruct(shape, jnp.int32),
    'actions': jax.ShapeDtypeStruct(shape, jnp.uint32),
    'mask': mask,
    **_token_shapes(model, shape),
  }
  context = _lower(model.context, params, events)
  kept = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in context.out_avals)
  kept = jax.tree.unflatten(context.out_tree, kept)
  crossing = _lower(model.crossing, params, stats, kept, mask, inputs)
  return {'context': context.serialize(), 'crossing': crossing.serialize()}


def _lower(function: Callable, *shapes: Tree) -> export.Exported:
  return export.export(jax.jit(function), platforms=PLATFORMS)(*shapes)


def _candidate_shapes(model: ServingModel, users: Any, candidates: Any) -> dict[str, jax.ShapeDtypeStruct]:
  shape, spec = (users, candidates), model.spec
  columns = {
    'item': ((*shape, 2), jnp.uint32),
    'mask': (shape, jnp.bool_),
    'age_hours': (shape, jnp.float32),
    'dense': ((*shape, spec.num_dense), jnp.float32),
    'sparse': ((*shape, len(spec.sparse_sizes)), jnp.int32),
    'embedding': ((*shape, sum(spec.embedding_widths)), jnp.float32),
  }
  shapes = {name: jax.ShapeDtypeStruct(*column) for name, column in columns.items()}
  if model.layout is None:
    return shapes
  return {**shapes, 'rows': _packed_shape(model.layout, shape), **_token_shapes(model, shape)}


def _token_shapes(model: ServingModel, shape: tuple) -> dict[str, jax.ShapeDtypeStruct]:
  """The columns that the model's options add (`data.tokens.TokenInputs`)."""
  config, shapes = model.model, {}
  if config.tower.time_gap_buckets:
    shapes['gap'] = jax.ShapeDtypeStruct(shape, jnp.int32)
  if config.content:
    shapes['content'] = jax.ShapeDtypeStruct((*shape, config.content_width), jnp.float16)
  if config.id_mask:
    shapes['new'] = jax.ShapeDtypeStruct(shape, jnp.bool_)
  return shapes


def _packed_shape(layout: TableLayout, shape: tuple) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((*shape, layout.sub_tables, layout.row_bytes), jnp.uint8)


def _candidates(columns: dict[str, Array]) -> CandidateBatch:
  names = ('item', 'mask', 'age_hours', 'dense', 'sparse', 'embedding', 'gap', 'content', 'new')
  return CandidateBatch(*(columns.get(name) for name in names))
