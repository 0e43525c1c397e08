"""The pool of users' keys and values: one preallocated array of P slots, so that serving's memory is bounded.

  key, value [N, P, L, H, K] in the tower's dtype, user [P, O] float32 (H of the last event), length [P] int32

L is the longest history (and one more place for a learnable token, which stands behind the last event). Nothing is
restacked for a batch: programs read and write slots by their numbers, and a number of P or more is padding.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.config import PinFMConfig, RankerConfig

Pool = dict[str, jax.Array]
ARRAYS = ('key', 'value', 'user', 'length')


def pool_shapes(model: PinFMConfig, ranker: RankerConfig, history_length: int, slots: int) -> dict[str, tuple]:
  """Shape and dtype of the pool's arrays; `slots` may be symbolic."""
  tower = model.tower
  places = history_length + int(ranker.learnable_token)
  kept = (tower.layers, slots, places, tower.heads, tower.width // tower.heads)
  return {
    'key': (kept, jnp.dtype(tower.dtype)),
    'value': (kept, jnp.dtype(tower.dtype)),
    'user': ((slots, tower.output_width), jnp.dtype(jnp.float32)),
    'length': ((slots,), jnp.dtype(jnp.int32)),
  }


def slot_bytes(model: PinFMConfig, ranker: RankerConfig, history_length: int) -> int:
  """Bytes that one user takes."""
  shapes = pool_shapes(model, ranker, history_length, 1)
  return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values())


def empty_pool(model: PinFMConfig, ranker: RankerConfig, history_length: int, slots: int) -> Pool:
  """A pool of zeros on the device."""
  return {name: jnp.zeros(*shape) for name, shape in pool_shapes(model, ranker, history_length, slots).items()}
