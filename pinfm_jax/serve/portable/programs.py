"""The programs of a ranking model in stacked form, for runtimes that are not JAX: plain arrays in, plain arrays out.

A bundle's own programs work on a pool of users in the device's memory, which only JAX updates in place. Here what is
kept of users travels through the client: the outputs of `context` are inputs of `crossing` and `pairs`.

  context: rows uint8 [U, L, S, row_bytes], surface int32 [U, L], actions uint32 [U, L], mask bool [U, L], real first
    -> key, value float32 [N, U, places, H, K], user float32 [U, O], length int32 [U] (real events)
  crossing: key, value, user, length, and of the candidates rows uint8 [U, C, S, row_bytes], dense float32 [U, C, F],
    sparse int32 [U, C, F], embedding float32 [U, C, F] -> probabilities float32 [U, C, labels]
  pairs: what crossing takes, without features -> output float32 [U, C, O] at the candidate's position
  items: rows uint8 [n, S, row_bytes] -> target float32 [n, O], vector float32 [n, V]

For a ranker with TransAct, crossing also takes recent_item int32 [U, C] and the users' newest events, recent_events
int32 [U, L'], recent_actions uint32 [U, L'], with content recent_content float16 [U, L', W] (`serve.programs`).
With options of the model, events, candidates and items also have gap int32 (not items), content float16 [.., W], new
bool (`data.tokens`). A ranker without PinFM has crossing alone, on the candidates' features. An input that a model does
not read is left out where the form allows it (ONNX). Activations are float32, whatever the tower's dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from pinfm_jax.model.dcat import LayerKV
from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.model.ranker import CandidateBatch, DenseStats, RankingModel, UserContext
from pinfm_jax.serve.programs import ServingModel, recent_events, recent_shapes

Array = jax.Array
Arrays = dict[str, Array]
Program = Callable[[Any, Arrays], Arrays]
_KEPT = ('key', 'value', 'user', 'length')
_CANDIDATES = ('item', 'mask', 'age_hours', 'dense', 'sparse', 'embedding', 'gap', 'content', 'new', 'recent_item')


@dataclass(frozen=True)
class PortableModel(ServingModel):
  """A ranking model as functions (parameters, inputs by name) -> outputs by name.

  The parameters are {'params': .., 'stats': ..}.
  """

  @property
  def module(self) -> RankingModel:
    """The Flax module in float32: few runtimes compute in bfloat16 on a CPU."""
    tower = replace(self.model.tower, attention='xla', remat='none', dtype='float32')
    return RankingModel(replace(self.model, tower=tower), self.ranker, self.spec)

  def programs(self) -> dict[str, Program]:
    """The functions by name."""
    if self.layout is None:
      return {'crossing': self._alone}
    return {'context': self._keep, 'crossing': self._score, 'pairs': self._pair, 'items': self._item}

  def inputs(self, history_length: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes and types of the programs' inputs, sizes symbolic; L is at most `history_length`."""
    sizes = export.symbolic_shape('U, C, L, places, n', constraints=[f'L <= {history_length}'])
    users, candidates, length, places, items = sizes
    features = self._features((users, candidates)) | recent_shapes(self, (users, candidates))
    if self.layout is None:
      return {'crossing': features}
    tower, shape = self.model.tower, (users, length)
    kv = (tower.layers, users, places, tower.heads, tower.width // tower.heads)
    kept = {
      'key': jax.ShapeDtypeStruct(kv, jnp.float32),
      'value': jax.ShapeDtypeStruct(kv, jnp.float32),
      'user': jax.ShapeDtypeStruct((users, tower.output_width), jnp.float32),
      'length': jax.ShapeDtypeStruct((users,), jnp.int32),
    }
    events = {
      'surface': jax.ShapeDtypeStruct(shape, jnp.int32),
      'actions': jax.ShapeDtypeStruct(shape, jnp.uint32),
      'mask': jax.ShapeDtypeStruct(shape, jnp.bool_),
    }
    crossing = {**kept, **features, **self._item_columns((users, candidates))}
    of_items = self._item_columns((items,))
    of_items.pop('gap', None)
    return {
      'context': {**events, **self._item_columns(shape)},
      'crossing': crossing,
      'pairs': {name: x for name, x in crossing.items() if self._pairs_read(name)},
      'items': of_items,
    }

  def _pairs_read(self, name: str) -> bool:
    if name.startswith('recent_'):
      return False
    return name not in ('dense', 'sparse', 'embedding') or (name == 'embedding' and self.ranker.candidate_content)

  def _keep(self, weights: Any, inputs: Arrays) -> Arrays:
    columns = (inputs['surface'], inputs['actions'], inputs['mask'])
    options = {'gap_UL': inputs.get('gap'), 'content_ULW': inputs.get('content'), 'hidden_id_UL': inputs.get('new')}
    batch, vectors = EventBatch(None, *columns, **options), self._vectors(inputs['rows'])
    kept = self.module.apply({'params': weights['params']}, vectors, batch, method='context')
    return {'key': kept.kv.key, 'value': kept.kv.value, 'user': kept.user_UO, 'length': kept.events_U}

  def _score(self, weights: Any, inputs: Arrays) -> Arrays:
    stats = DenseStats(**weights['stats'])
    arguments = (self._vectors(inputs['rows']), _kept(inputs), _candidates(inputs), stats)
    params, recent = {'params': weights['params']}, recent_events(inputs)
    return {'probabilities': self.module.apply(params, *arguments, recent=recent, method='score')}

  def _pair(self, weights: Any, inputs: Arrays) -> Arrays:
    arguments = (self._vectors(inputs['rows']), _kept(inputs), _candidates(inputs))
    return {'output': self.module.apply({'params': weights['params']}, *arguments, method='pairs')}

  def _item(self, weights: Any, inputs: Arrays) -> Arrays:
    arguments = (self._vectors(inputs['rows']), inputs.get('content'), inputs.get('new'))
    target, vector = self.module.apply({'params': weights['params']}, *arguments, method='item_vectors')
    return {'target': target, 'vector': vector}

  def _alone(self, weights: Any, inputs: Arrays) -> Arrays:
    return {'probabilities': self.ranker_alone(weights['params'], weights['stats'], inputs)}

  def _features(self, shape: tuple) -> dict[str, jax.ShapeDtypeStruct]:
    spec = self.spec
    return {
      'dense': jax.ShapeDtypeStruct((*shape, spec.num_dense), jnp.float32),
      'sparse': jax.ShapeDtypeStruct((*shape, len(spec.sparse_sizes)), jnp.int32),
      'embedding': jax.ShapeDtypeStruct((*shape, sum(spec.embedding_widths)), jnp.float32),
    }

  def _item_columns(self, shape: tuple) -> dict[str, jax.ShapeDtypeStruct]:
    """Packed rows, and what the model's options add."""
    config, layout = self.model, self.layout
    columns = {'rows': jax.ShapeDtypeStruct((*shape, layout.sub_tables, layout.row_bytes), jnp.uint8)}
    if config.tower.time_gap_buckets:
      columns['gap'] = jax.ShapeDtypeStruct(shape, jnp.int32)
    if config.content:
      columns['content'] = jax.ShapeDtypeStruct((*shape, config.content_width), jnp.float16)
    if config.id_mask:
      columns['new'] = jax.ShapeDtypeStruct(shape, jnp.bool_)
    return columns


def _kept(inputs: Arrays) -> UserContext:
  key, value, user, length = (inputs[name] for name in _KEPT)
  return UserContext(LayerKV(key, value), user, length)


def _candidates(inputs: Arrays) -> CandidateBatch:
  return CandidateBatch(*(inputs.get(name) for name in _CANDIDATES))
