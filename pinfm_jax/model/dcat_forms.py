"""The other forms of a candidate pass, for parity and comparison: `pinfm bench dcat` times them, tests compare them.

  dense           the history is run again for every candidate: what DCAT must equal
  gather          the paper's crossing pass: K/V are copied to each candidate's row and its own concatenated
  rotate-replace  the paper's variant at a fixed length (section 6): in a full window the candidate's K/V overwrite the
                  oldest event's

Gather equals dense. Rotate-replace equals it while the window has room. In a full window the candidate does not attend
to the oldest event itself; later events' keys and values still carry it, since they were computed with it in sight.
"""

import jax
import jax.numpy as jnp

from pinfm_jax.model.dcat import LayerKV, RowKeys, View
from pinfm_jax.model.pinfm import EventBatch, PinFM, insert, key_mask

Array = jax.Array


def dense(
  module: PinFM,
  vectors_ULV: Array,
  events: EventBatch,
  vectors_BV: Array,
  user_B: Array,
  token_V: Array | None = None,
  gap_B: Array | None = None,
  every_output: bool = True,
) -> Array:
  """Runs [history, candidate] once for each candidate; call it by `model.apply(params, ..., method=dense)`.

  Args:
    module: bound PinFM.
    vectors_ULV: E of the events.
    events: histories.
    vectors_BV: E of the candidates.
    user_B: whose candidate each row is.
    token_V: the token between history and candidate; None = none.
    gap_B: time gap of each candidate, for a model with time gaps.
    every_output: False skips what the candidate's output does not need of the last layer.

  Returns:
    Unit-length output at the candidates' positions, [B, O].
  """
  history = jax.tree.map(lambda x: x[user_B], events)
  x_BLD, mask_BL = module.embed_history(vectors_ULV[user_B], history, token_V=token_V)
  count_B = jnp.sum(mask_BL, axis=1)
  gap_B1 = None if gap_B is None else gap_B[:, None]
  candidate_B1D = module.embed_candidates(vectors_BV[:, None], count_B, gap_B1)
  x_BXD = insert(x_BLD, candidate_B1D[:, 0], count_B).astype(module.config.tower.dtype)
  mask_BX = key_mask(count_B, x_BXD.shape[1], 1)
  output_BXD, _ = module.decoder.context(x_BXD, mask_BX, output_at_U=None if every_output else count_B)
  if every_output:
    output_BXD = jnp.take_along_axis(output_BXD, count_B[:, None, None], axis=1)
  return module.phi_out(output_BXD)[:, 0]


def gather(view: View, context: LayerKV, own: LayerKV) -> RowKeys:
  """A `View.layout`: every row gets a copy of its user's keys and values, and its own behind them."""
  mask_BL, distance_BL = _history(view)

  def joined(history_ULHK: Array, own_B1HK: Array) -> Array:
    history_BHLK = history_ULHK.swapaxes(1, 2)[view.user_M]
    joined_BHXK = jnp.concatenate([history_BHLK, own_B1HK.swapaxes(1, 2)], axis=2)
    return joined_BHXK.reshape(-1, *joined_BHXK.shape[2:])

  visible_BX = jnp.pad(mask_BL, ((0, 0), (0, 1)), constant_values=True)
  return RowKeys(jax.tree.map(joined, context, own), visible_BX, jnp.pad(distance_BL, ((0, 0), (0, 1))))


def rotate_replace(view: View, context: LayerKV, own: LayerKV) -> RowKeys:
  """A `View.layout` of the history's length: its own key stands behind the last event, or in place of the oldest."""
  mask_BL, distance_BL = _history(view)
  length = mask_BL.shape[1]
  count_B = jnp.sum(mask_BL, axis=1)
  slot_B = jnp.where(count_B < length, count_B, 0)  # the softmax does not mind the order of slots
  here_BL = jnp.arange(length) == slot_B[:, None]

  def replaced(history_ULHK: Array, own_B1HK: Array) -> Array:
    history_BHLK = history_ULHK.swapaxes(1, 2)[view.user_M]
    replaced_BHLK = jnp.where(here_BL[:, None, :, None], own_B1HK.swapaxes(1, 2), history_BHLK)
    return replaced_BHLK.reshape(-1, *replaced_BHLK.shape[2:])

  return RowKeys(jax.tree.map(replaced, context, own), mask_BL | here_BL, jnp.where(here_BL, 0, distance_BL))


def _history(view: View) -> tuple[Array, Array]:
  """Which of its user's events each row sees, and how far before the candidate they stand."""
  mask_BL = view.mask_UL[view.user_M]
  return mask_BL, jnp.sum(mask_BL, axis=1, keepdims=True) - jnp.arange(mask_BL.shape[1])
