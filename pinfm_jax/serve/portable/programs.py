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
from pinfm_jax.model.ranker import RankingModel, UserContext
from pinfm_jax.serve.pool import ARRAYS
from pinfm_jax.serve.programs import ServingModel, candidate_shapes, event_shapes, item_shapes

Array = jax.Array
Arrays = dict[str, Array]
Program = Callable[[Any, Arrays], Arrays]
_UNREAD = ('item', 'mask', 'age_hours')  # of the candidates of a bundle's own programs


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
    return {'context': self._keep, 'crossing': self._cross, 'pairs': self._pair, 'items': self._item}

  def inputs(self, history_length: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes and types of the programs' inputs, sizes symbolic; L is at most `history_length`."""
    sizes = export.symbolic_shape('U, C, L, places, n', constraints=[f'L <= {history_length}'])
    users, candidates, length, places, items = sizes
    of_candidates = {name: x for name, x in candidate_shapes(self, users, candidates).items() if name not in _UNREAD}
    if self.layout is None:
      return {'crossing': of_candidates}
    tower = self.model.tower
    kv = (tower.layers, users, places, tower.heads, tower.width // tower.heads)
    kept = {
      'key': jax.ShapeDtypeStruct(kv, jnp.float32),
      'value': jax.ShapeDtypeStruct(kv, jnp.float32),
      'user': jax.ShapeDtypeStruct((users, tower.output_width), jnp.float32),
      'length': jax.ShapeDtypeStruct((users,), jnp.int32),
    }
    crossing, of_items = kept | of_candidates, item_shapes(self, (items,))
    of_items.pop('gap', None)
    return {
      'context': event_shapes(self, (users, length)),
      'crossing': crossing,
      'pairs': {name: x for name, x in crossing.items() if self._pairs_read(name)},
      'items': of_items,
    }

  def _pairs_read(self, name: str) -> bool:
    if name.startswith('recent_'):
      return False
    return name not in ('dense', 'sparse', 'embedding') or (name == 'embedding' and self.ranker.candidate_content)

  def _keep(self, weights: Any, inputs: Arrays) -> Arrays:
    kept = self._context(weights['params'], inputs)
    return {'key': kept.kv.key, 'value': kept.kv.value, 'user': kept.user_UO, 'length': kept.events_U}

  def _cross(self, weights: Any, inputs: Arrays) -> Arrays:
    return {'probabilities': self._score(weights['params'], weights['stats'], _kept(inputs), inputs)}

  def _pair(self, weights: Any, inputs: Arrays) -> Arrays:
    return {'output': self._pairs(weights['params'], _kept(inputs), inputs)}

  def _item(self, weights: Any, inputs: Arrays) -> Arrays:
    return self.items(weights['params'], inputs)

  def _alone(self, weights: Any, inputs: Arrays) -> Arrays:
    return {'probabilities': self.ranker_alone(weights['params'], weights['stats'], inputs)}


def _kept(inputs: Arrays) -> UserContext:
  key, value, user, length = (inputs[name] for name in ARRAYS)
  return UserContext(LayerKV(key, value), user, length)
