"""Random pretraining batches: what the pipeline gives, with ids of which every step brings fresh ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from pinfm_jax.config import MeshConfig
from pinfm_jax.model.hashing import key_words
from pinfm_jax.train.sharding import put_batch
from pinfm_jax.train.step import Task, fitted_layout, init_state, make_step

Batch = dict[str, np.ndarray]


def random_segments(
  rng: np.random.Generator, users: int, length: int, items: int, actions: int, surfaces: int
) -> Batch:
  """A batch of full segments of distinct users; items are uniform over 1 to `items`, so few rows are shared."""
  shape = (users, length)
  user_U = rng.permutation(users).astype(np.uint32)
  return {
    'item': key_words(rng.integers(1, items + 1, shape, dtype=np.uint64)),
    'surface': rng.integers(0, surfaces, shape, dtype=np.int32),
    'actions': (np.uint32(1) << rng.integers(0, actions, shape, dtype=np.uint32)),
    'mask': np.ones(shape, bool),
    'user': np.broadcast_to(user_U[:, None], shape).copy(),
  }


class Stepper:
  """A training run whose steps are called one by one; the state is donated from step to step.

  Attributes:
    temporary_bytes: temporary memory of the compiled step.
    steps: how many steps were done.
  """

  def __init__(self, task: Task, mesh: Mesh, batches: Sequence[Batch]):
    """Makes the fresh state and compiles the step.

    Args:
      task: what is trained.
      mesh: where.
      batches: on the host; step i copies batch i modulo their number to the device.
    """
    self._mesh, self._batches, self.steps = mesh, batches, 0
    self._state = init_state(task, mesh, 0)()
    batch = put_batch(batches[0], mesh)
    layout = fitted_layout(task, self._state, MeshConfig(), batch)  # as the training loop does
    self._step = make_step(task, layout).lower(self._state, batch).compile()
    self.temporary_bytes = self._step.memory_analysis().temp_size_in_bytes

  def __call__(self, number: int) -> Any:
    """One step; returns what to wait for."""
    batch = put_batch(self._batches[number % len(self._batches)], self._mesh)
    self._state, figures = self._step(self._state, batch)
    self.steps += 1
    return self._state, figures
