"""One update rule for tower and tables: schedule, ratios and clipping apply to both alike."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pinfm_jax.config import UpdateConfig
from pinfm_jax.model.tables import RowPlan, Tables, update_rows

Array = jax.Array


@dataclass(frozen=True)
class Update:
  """AdamW for the parameters, row-wise Adagrad for the table rows, under one schedule and one clipping norm.

  Attributes:
    config: rates, schedule, decay, clipping.
    steps: length of the schedule.
    pretrained: top-level parameter groups that, like the tables, learn at `config.pretrained_ratio`.
  """

  config: UpdateConfig
  steps: int
  pretrained: tuple[str, ...] = ()

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
    self, params: Any, opt_state: optax.OptState, grads: Any, tables: Tables | None, plan: RowPlan | None,
    row_grad_KE: Array | None, step: Array,
  ) -> tuple[Any, optax.OptState, Tables | None, Array]:  # fmt: skip
    """One step of everything.

    Args:
      params: the parameter tree.
      opt_state: from `init`.
      grads: gradients of the parameters.
      tables: item tables, or None for a model without.
      plan: the rows the batch touched.
      row_grad_KE: gradients of those rows.
      step: int32.

    Returns:
      New parameters, optimizer state and tables, and the gradients' global norm before clipping.
    """
    norm = optax.tree.norm((grads, row_grad_KE))
    clip = jnp.minimum(1.0, self.config.clip_norm / (norm + 1e-9)) if self.config.clip_norm else 1.0
    shape = self.schedule(step)
    grads = jax.tree.map(lambda g: g * clip, grads)
    updates, opt_state = self._adam().update(grads, opt_state, params)
    rate = self.config.learning_rate * shape
    params = jax.tree_util.tree_map_with_path(lambda path, p, u: self._move(path, p, u, rate), params, updates)
    if tables is not None:
      rate = self.config.table_learning_rate * self.config.pretrained_ratio * shape
      tables = update_rows(tables, plan, row_grad_KE * clip, rate)
    return params, opt_state, tables, norm

  def _adam(self) -> optax.GradientTransformation:
    return optax.scale_by_adam(self.config.beta1, self.config.beta2)

  def _move(self, path: tuple[Any, ...], param: Array, direction: Array, rate: Array) -> Array:
    """Decoupled weight decay on kernels alone, and the lower rate of the pretrained groups."""
    names = [key.key for key in path]
    if names[-1] == 'kernel':
      direction = direction + self.config.weight_decay * param
    if next(name for name in names if name != 'params') in self.pretrained:
      rate = rate * self.config.pretrained_ratio
    return param - rate * direction
