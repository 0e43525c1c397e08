"""One update rule for tower and tables: schedule, ratios and clipping apply to both alike."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pinfm_jax.config import UpdateConfig
from pinfm_jax.model.tables import AdamStep

Array = jax.Array


class RowStep(NamedTuple):
  """What the table rows take from a step: the factor of their gradients, their learning rate, and Adam's numbers."""

  clip: Array
  learning_rate: Array
  adam: AdamStep | None = None


@dataclass(frozen=True)
class Update:
  """AdamW for the parameters and `table_rule` for the table rows, under one schedule and one clipping norm.

  Attributes:
    config: rates, schedule, decay, clipping.
    steps: length of the schedule.
    pretrained: top-level parameter groups that, like the tables, learn at `config.pretrained_ratio`, or not at all
      where `config.frozen` has 'tower'.
    ema_decay: of the running average of the parameters; 0 = there is none.
    ema_tables: the table rows are averaged too.
  """

  config: UpdateConfig
  steps: int
  pretrained: tuple[str, ...] = ()
  ema_decay: float = 0.0
  ema_tables: bool = False

  def schedule(self, step: Array) -> Array:
    """Multiplier of the peak learning rates at a step: linear warm-up, then cosine to `final_ratio`."""
    warmup = min(self.config.warmup_steps, max(self.steps // 2, 1))
    begin = 1 / max(warmup, 1)  # step 0 moves already; warmup_steps=0 starts at the peak
    shape = optax.warmup_cosine_decay_schedule(begin, 1.0, warmup, max(self.steps, 2), self.config.final_ratio)
    return shape(step)

  def init(self, params: Any) -> optax.OptState:
    """The optimizer's state for the parameters."""
    return self._adam().init(params)

  def apply(
    self, params: Any, opt_state: optax.OptState, grads: Any, row_squares: Array | float, step: Array
  ) -> tuple[Any, optax.OptState, RowStep, Array]:
    """One step of the parameters, and what the rows' step must be (`train.exchange` carries it out).

    Args:
      params: the parameter tree.
      opt_state: from `init`.
      grads: gradients of the parameters.
      row_squares: sum of squares of the rows' gradients, which count in the global norm; 0 without tables.
      step: int32.

    Returns:
      New parameters and optimizer state, the rows' step, and the gradients' global norm before clipping.
    """
    grads = jax.tree_util.tree_map_with_path(lambda path, g: jnp.zeros_like(g) if self._frozen(path) else g, grads)
    norm = jnp.sqrt(optax.tree.norm(grads, squared=True) + row_squares)
    clip = jnp.minimum(1.0, self.config.clip_norm / (norm + 1e-9)) if self.config.clip_norm else jnp.ones(())
    shape = self.schedule(step)
    grads = jax.tree.map(lambda g: g * clip, grads)
    updates, opt_state = self._adam().update(grads, opt_state, params)
    rate = self.config.learning_rate * shape
    params = jax.tree_util.tree_map_with_path(lambda path, p, u: self._move(path, p, u, rate), params, updates)
    rate = self.config.table_learning_rate * self.config.pretrained_ratio * shape
    return params, opt_state, RowStep(clip, rate, self._rows_adam(opt_state.count)), norm

  def averaged(self, average: Any, weights: Any, steps: Array) -> Any:
    """The running average of the weights after a step.

    In the first steps the decay is n / (n + 9): the average forgets the initial weights, which are no result.

    Args:
      average: before the step.
      weights: of the same structure, after it.
      steps: int32 n, the steps that were done.
    """
    decay = jnp.minimum(self.ema_decay, steps / (steps + 9.0))
    return jax.tree.map(lambda a, x: a + (1 - decay) * (x - a), average, weights)

  def _rows_adam(self, count: Array) -> AdamStep | None:
    """Adam's numbers for the rows, whose moments are as old as the parameters': `count` updates with this one."""
    if self.config.table_rule != 'adam':
      return None
    betas = [jnp.float32(beta) for beta in (self.config.beta1, self.config.beta2)]
    return AdamStep(*betas, *(1 - beta ** count.astype(jnp.float32) for beta in betas))

  def _adam(self) -> optax.GradientTransformation:
    return optax.scale_by_adam(self.config.beta1, self.config.beta2)

  def _move(self, path: tuple[Any, ...], param: Array, direction: Array, rate: Array) -> Array:
    """Decoupled weight decay on kernels alone, and the lower rate of the pretrained groups."""
    if self._frozen(path):
      return param
    if path[-1].key == 'kernel':
      direction = direction + self.config.weight_decay * param
    if self._pretrained(path):
      rate = rate * self.config.pretrained_ratio
    return param - rate * direction

  def _frozen(self, path: tuple[Any, ...]) -> bool:
    return 'tower' in self.config.frozen and self._pretrained(path)

  def _pretrained(self, path: tuple[Any, ...]) -> bool:
    return next(key.key for key in path if key.key != 'params') in self.pretrained
