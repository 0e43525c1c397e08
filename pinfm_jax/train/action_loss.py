"""Masked-action conditioning: some events' actions are hidden from the model, which must predict them.

A token is normally given its event's actions. Hidden, it carries the mark that a candidate carries in fine-tuning
(`PinFM.action_embedding[-1]`), so its output stands where the ranker's question stands: what will this user do with
this item? UniPinRec trains ranking so, with p = 0.2 (arXiv:2606.00422).

The prediction is made from H, behind phi_out, and not from the decoder's output before it: in fine-tuning the ranker
and the module's own head read phi_out at the candidate's position, so this is the vector that should know the actions.
The price is that H, whose direction retrieval uses, serves both; `action_weight` balances them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pinfm_jax.model.masking import HIDE_ACTIONS, batch_places, draw
from pinfm_jax.model.pinfm import unpack_bits

Array = jax.Array


def init_action_head(key: Array, width: int, num_actions: int) -> dict[str, Array]:
  """A linear head of one logit an action, for H of `width` values."""
  kernel_OA = jax.nn.initializers.lecun_normal()(jax.random.fold_in(key, 1), (width, num_actions), jnp.float32)
  return {'kernel': kernel_OA, 'bias': jnp.zeros(num_actions)}


def hidden_actions(mask_UL: Array, share: float, seed: int, step: Array) -> Array | None:
  """Which real events of the global batch hide their actions in this step; None if none ever does."""
  return mask_UL & draw(batch_places(mask_UL.shape), share, seed, step, HIDE_ACTIONS) if share else None


def action_loss(head: Any, h_ULO: Array, actions_UL: Array, hidden_UL: Array) -> Array:
  """Binary cross-entropy of the hidden events' actions, summed over actions, averaged over hidden events.

  Args:
    head: see `init_action_head`.
    h_ULO: H of every position, computed without the hidden actions.
    actions_UL: the true actions, as bits.
    hidden_UL: True where they were hidden; 0 is returned if that is nowhere.
  """
  logits_ULA = h_ULO.astype(jnp.float32) @ head['kernel'] + head['bias']
  taken_ULA = unpack_bits(actions_UL, head['bias'].shape[0])
  loss_UL = jnp.sum(jnp.logaddexp(0.0, logits_ULA) - jnp.where(taken_ULA, logits_ULA, 0.0), axis=-1)
  return jnp.sum(jnp.where(hidden_UL, loss_UL, 0.0)) / jnp.maximum(jnp.sum(hidden_UL), 1)
