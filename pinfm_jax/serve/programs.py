"""Lowers what serving computes to `jax.export` programs that need no model source to run.

Sizes are symbolic, so one program serves every batch: P slots of the pool (`serve.pool`), U users, K events (at most
the history length), M tiles of T candidates of one user each, n items. Parameters are arguments; item vectors enter as
packed table rows (`serve.quantize`) and are unpacked inside.

  context(params, pool, slot_U, events [U, K]) -> pool: the context pass of whole windows, written to the slots
  extend(params, pool, slot_U, events [U, K]) -> pool: events (real ones first) that follow what the slots hold; not of
    a bidirectional model, whose earlier events see the new ones, nor of padded windows, where places move
  crossing(params, stats, pool, slot_M, candidates [M, T]) -> probabilities float32 [M, T, labels]
  pairs(params, pool, slot_M, candidates [M, T]) -> unit-length output at the candidate's position, float32 [M, T, O]
  items(params, {'rows'}) -> {'target': z [n, O], 'vector': E [n, V]}
    events: rows uint8 [U, K, S, row_bytes], surface int32, actions uint32, mask bool
    candidates: rows uint8 [M, T, S, row_bytes], item uint32 [M, T, 2], mask bool, age_hours float32,
    dense float32 [M, T, F], sparse int32 [M, T, F], embedding float32 [M, T, F]
    Events, candidates and items of a model with these options also have (`data.tokens`): gap int32 with time gaps (not
    of items), content float16 [.., W] with content, new bool with hidden ids.
  With TransAct, candidates also have recent_item int32 [M, T] and of each tile's user, newest event first and padded to
    the module's length L, recent_events int32 [M, L], recent_actions uint32 [M, L], and with content recent_content
    float16 [M, L, W]. They come with each call, not from the pool: 8 bytes an event, and appending stays exact.
  A ranker without PinFM has crossing(params, stats, candidates) alone, whose candidates have no rows; a tower without
  a ranker, which predicts no labels, has context, extend and items alone.

Slots are padding where their number is P or more: nothing is written for them, and what is read means nothing. The
pool is meant to be donated (`jax.jit(program.call, donate_argnums=1)`): it is then updated in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from pinfm_jax.config import PinFMConfig, RankerConfig
from pinfm_jax.model.dcat import LayerKV
from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.model.ranker import CandidateBatch, DenseStats, FeatureSpec, RankingBatch, RankingModel, UserContext
from pinfm_jax.model.transact import RecentEvents
from pinfm_jax.serve.manifest import TableLayout
from pinfm_jax.serve.pool import Pool, pool_shapes
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

  def context(self, params: Tree, pool: Pool, slot_U: Array, events: dict[str, Array]) -> Pool:
    """The context pass of whole windows: each user's keys, values and representation, written to its slot."""
    new = self._context(params, events)
    return _written(pool, slot_U, (slot_U, slice(new.kv.key.shape[2])), new)

  def extend(self, params: Tree, pool: Pool, slot_U: Array, events: dict[str, Array]) -> Pool:
    """The context pass of events that follow what the slots hold; a learnable token moves behind them."""
    kept = _users_of(pool, slot_U)
    vectors, batch = self._vectors(events['rows']), _events(events)
    new = self.module.apply({'params': params}, vectors, batch, kept, method='extend')
    # Padding is written nowhere: it goes to a place behind the last one.
    place_K = jnp.arange(new.kv.key.shape[2])
    written_U1 = (new.events_U + int(self.ranker.learnable_token))[:, None]
    place_UK = jnp.where(place_K < written_U1, kept.events_U[:, None] + place_K, pool['key'].shape[2])
    return _written(pool, slot_U, (slot_U[:, None], place_UK), new.replace(events_U=kept.events_U + new.events_U))

  def crossing(
    self, params: Tree, stats: dict[str, Array], pool: Pool, slot_M: Array, candidates: dict[str, Array]
  ) -> Array:
    """The crossing pass of tiles over their users' slots, and the ranker: probabilities [M, T, labels]."""
    return self._score(params, stats, _users_of(pool, slot_M), candidates)

  def pairs(self, params: Tree, pool: Pool, slot_M: Array, candidates: dict[str, Array]) -> Array:
    """The crossing pass alone: the output at the candidates' positions, [M, T, O]."""
    return self._pairs(params, _users_of(pool, slot_M), candidates)

  def items(self, params: Tree, items: dict[str, Array]) -> dict[str, Array]:
    """z, which the user's representation is compared with, and E of items."""
    arguments = (self._vectors(items['rows']), items.get('content'), items.get('new'))
    target, vector = self.module.apply({'params': params}, *arguments, method='item_vectors')
    return {'target': target, 'vector': vector}

  def ranker_alone(self, params: Tree, stats: dict[str, Array], candidates: dict[str, Array]) -> Array:
    """The ranker without PinFM: probabilities [U, C, T]."""
    batch = RankingBatch(None, _candidates(candidates), None, None, _recent_events(candidates))
    return jax.nn.sigmoid(self.module.apply({'params': params}, None, None, batch, DenseStats(**stats)).logits_UCT)

  def _context(self, params: Tree, events: dict[str, Array]) -> UserContext:
    return self.module.apply({'params': params}, self._vectors(events['rows']), _events(events), method='context')

  def _score(self, params: Tree, stats: dict[str, Array], kept: UserContext, candidates: dict[str, Array]) -> Array:
    arguments = (self._vectors(candidates['rows']), kept, _candidates(candidates), DenseStats(**stats))
    return self.module.apply({'params': params}, *arguments, recent=_recent_events(candidates), method='score')

  def _pairs(self, params: Tree, kept: UserContext, candidates: dict[str, Array]) -> Array:
    arguments = (self._vectors(candidates['rows']), kept, _candidates(candidates))
    return self.module.apply({'params': params}, *arguments, method='pairs')

  def _vectors(self, packed: Array) -> Array:
    rows = dequantise_on_device(packed, self.layout.width, self.layout.storage)
    return rows.reshape(*rows.shape[:-2], self.layout.sub_tables * self.layout.width)


def export_programs(model: ServingModel, params: Tree, stats: Tree, history_length: int) -> dict[str, bytes]:
  """Lowers the programs for every platform and serialises them; see `lower_programs`."""
  programs = lower_programs(model, params, stats, history_length)
  return {name: program.serialize() for name, program in programs.items()}


def lower_programs(
  model: ServingModel, params: Tree, stats: Tree, history_length: int, platforms: Sequence[str] = PLATFORMS
) -> dict[str, export.Exported]:
  """Lowers the programs.

  Args:
    model: what to lower.
    params: parameters (their shapes and types count).
    stats: {'low', 'high', 'mean', 'scale'} of the dense features.
    history_length: the largest K.
    platforms: of JAX, to lower for.

  Returns:
    Of a ranker 'crossing' and, with PinFM, 'pairs'; with PinFM also 'context' and 'items', and unless it is
    bidirectional or has padded windows 'extend'.
  """

  def lower(function: Callable, *shapes: Tree) -> export.Exported:
    return export.export(jax.jit(function), platforms=platforms)(*shapes)

  params, stats = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, stats))
  tiles, candidates, slots, items = export.symbolic_shape('M, T, P, n')
  inputs = candidate_shapes(model, tiles, candidates)
  if model.layout is None:
    return {'crossing': lower(model.ranker_alone, params, stats, inputs)}

  def pool(size: Any) -> Tree:
    shapes = pool_shapes(model.model, model.ranker, history_length, size)
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}

  slot_M, kept = jax.ShapeDtypeStruct((tiles,), jnp.int32), pool(slots)
  rows = item_shapes(model, (items,))
  rows.pop('gap', None)
  # Sizes of their own: a constraint holds for all sizes that are made with it, used or not.
  slots, *shape = export.symbolic_shape('P, U, K', constraints=[f'K <= {history_length}'])
  new = (params, pool(slots), jax.ShapeDtypeStruct(shape[:1], jnp.int32), event_shapes(model, tuple(shape)))
  whole = model.ranker.bidirectional or model.model.tower.padded  # a new event changes all others
  programs = {} if whole else {'extend': lower(model.extend, *new)}
  programs |= {'context': lower(model.context, *new), 'items': lower(model.items, params, rows)}
  if not model.spec.num_labels:  # a tower without a ranker
    return programs
  return programs | {
    'crossing': lower(model.crossing, params, stats, kept, slot_M, inputs),
    'pairs': lower(model.pairs, params, kept, slot_M, inputs),
  }


def _users_of(pool: Pool, slot: Array) -> UserContext:
  """What the slots hold, copied once for each; padding reads some slot, so that nothing becomes NaN."""
  # Of all layers at once: a slice of the pool's layers, as the scan over layers takes, would copy every slot.
  key, value = (jnp.take(pool[name], slot, axis=1, mode='clip') for name in ('key', 'value'))
  user, length = (jnp.take(pool[name], slot, axis=0, mode='clip') for name in ('user', 'length'))
  return UserContext(LayerKV(key, value), user, length)


def _written(pool: Pool, slot_U: Array, places: tuple, new: UserContext) -> Pool:
  """The pool with what is new of users at their slots: keys and values at `places`, (slots, places of a slot)."""
  return {
    'key': pool['key'].at[(slice(None), *places)].set(new.kv.key, mode='drop'),
    'value': pool['value'].at[(slice(None), *places)].set(new.kv.value, mode='drop'),
    'user': pool['user'].at[slot_U].set(new.user_UO, mode='drop'),
    'length': pool['length'].at[slot_U].set(new.events_U, mode='drop'),
  }


def event_shapes(model: ServingModel, shape: tuple) -> dict[str, jax.ShapeDtypeStruct]:
  """The columns of events [users, events]."""
  return {
    'surface': jax.ShapeDtypeStruct(shape, jnp.int32),
    'actions': jax.ShapeDtypeStruct(shape, jnp.uint32),
    'mask': jax.ShapeDtypeStruct(shape, jnp.bool_),
    **item_shapes(model, shape),
  }


def candidate_shapes(model: ServingModel, users: Any, candidates: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """The columns of candidates [users, candidates], and what TransAct reads; features alone without PinFM."""
  shape, spec = (users, candidates), model.spec
  columns = {
    'item': ((*shape, 2), jnp.uint32),
    'mask': (shape, jnp.bool_),
    'age_hours': (shape, jnp.float32),
    'dense': ((*shape, spec.num_dense), jnp.float32),
    'sparse': ((*shape, len(spec.sparse_sizes)), jnp.int32),
    'embedding': ((*shape, sum(spec.embedding_widths)), jnp.float32),
  }
  shapes = {name: jax.ShapeDtypeStruct(*column) for name, column in columns.items()} | _recent_shapes(model, shape)
  return shapes if model.layout is None else {**shapes, **item_shapes(model, shape)}


def _recent_shapes(model: ServingModel, shape: tuple) -> dict[str, jax.ShapeDtypeStruct]:
  """What TransAct reads of candidates [users, candidates] and of the users' newest events; nothing without it."""
  length, config = model.ranker.transact.length, model.model
  if not length:
    return {}
  events = (shape[0], length)
  shapes = {
    'recent_item': jax.ShapeDtypeStruct(shape, jnp.int32),
    'recent_events': jax.ShapeDtypeStruct(events, jnp.int32),
    'recent_actions': jax.ShapeDtypeStruct(events, jnp.uint32),
  }
  if config.content:
    shapes['recent_content'] = jax.ShapeDtypeStruct((*events, config.content_width), jnp.float16)
  return shapes


def _recent_events(columns: dict[str, Array]) -> RecentEvents | None:
  """The newest events of the candidates' users, as they come with the candidates."""
  if 'recent_events' not in columns:
    return None
  return RecentEvents(columns['recent_events'], columns['recent_actions'], None, columns.get('recent_content'))


def item_shapes(model: ServingModel, shape: tuple) -> dict[str, jax.ShapeDtypeStruct]:
  """Packed rows, and the columns that the model's options add (`data.tokens.TokenInputs`)."""
  config, layout = model.model, model.layout
  shapes = {'rows': jax.ShapeDtypeStruct((*shape, layout.sub_tables, layout.row_bytes), jnp.uint8)}
  if config.tower.time_gap_buckets:
    shapes['gap'] = jax.ShapeDtypeStruct(shape, jnp.int32)
  if config.content:
    shapes['content'] = jax.ShapeDtypeStruct((*shape, config.content_width), jnp.float16)
  if config.id_mask:
    shapes['new'] = jax.ShapeDtypeStruct(shape, jnp.bool_)
  return shapes


def _candidates(columns: dict[str, Array]) -> CandidateBatch:
  names = ('item', 'mask', 'age_hours', 'dense', 'sparse', 'embedding', 'gap', 'content', 'new', 'recent_item')
  return CandidateBatch(*(columns.get(name) for name in names))


def _events(columns: dict[str, Array]) -> EventBatch:
  options = {'gap_UL': columns.get('gap'), 'content_ULW': columns.get('content'), 'hidden_id_UL': columns.get('new')}
  return EventBatch(None, columns['surface'], columns['actions'], columns['mask'], **options)
