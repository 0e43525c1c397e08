"""PinFM's own losses as tasks of a repair: L_ntl, L_mtl and L_ftl of each history alone, over its event embeddings.

They are the losses of pretraining (PinFM section 3.1) but for what would tie a history to its batch or to chance: the
negatives are a fixed bank of items, L_mtl takes every offset of the window where training samples some, and a history
that is too short for the anchor of L_ftl has it so early that the window lies behind it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pinfm_jax.config import PretrainConfig
from pinfm_jax.model.dcat import MASKED
from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.robustness.repair import LossTerm
from pinfm_jax.train.negatives import positive_mask
from pinfm_jax.train.pairs import following, window_products

NAMES = ('ntl', 'mtl', 'ftl')


class Bank(NamedTuple):
  """The negatives of every history: id words [K, 2] of distinct items, and their targets z [K, O]."""

  item_K2: jax.Array
  z_KO: jax.Array


class Histories(NamedTuple):
  """What the losses read of U histories beside H.

  Attributes:
    z_ULO: targets of the events' items; they stay as they are while the embeddings move.
    mask_UL: True on real events.
    positive_UL: events that may be targets.
    negative_UL: events that are shown negatives (`pretrain.impression_negatives`).
    allowed_UK: columns of the bank whose item is not among the history's positives.
  """

  z_ULO: jax.Array
  mask_UL: jax.Array
  positive_UL: jax.Array
  negative_UL: jax.Array
  allowed_UK: jax.Array


def histories_of(events: EventBatch, z_ULO: jax.Array, bank: Bank, action_bits: int) -> Histories:
  """Finds targets and negatives of histories; `action_bits` is A_pos, 0 = every event."""
  positive_UL = positive_mask(events, action_bits)

  def liked(items_X2: jax.Array, item_L2: jax.Array, positive_L: jax.Array) -> jax.Array:
    same_XL = jnp.all(items_X2[:, None] == item_L2[None], axis=-1)
    return jnp.any(same_XL & positive_L, axis=1)

  allowed_UK = ~jax.vmap(liked, (None, 0, 0))(bank.item_K2, events.item_UL2, positive_UL)
  disliked_UL = ~jax.vmap(liked)(events.item_UL2, events.item_UL2, positive_UL)
  return Histories(z_ULO, events.mask_UL, positive_UL, events.mask_UL & disliked_UL, allowed_UK)


def sequence_losses_each(
  h_ULO: jax.Array, histories: Histories, bank: Bank, log_temperature: jax.Array, config: PretrainConfig
) -> dict[str, jax.Array]:
  """Each loss of each history, averaged over its own valid pairs; 0 for a history without one.

  Args:
    h_ULO: H of every event.
    histories: the rest of them.
    bank: the negatives.
    log_temperature: learned by pretraining.
    config: window, anchor and number of shown negatives.

  Returns:
    [U] by name, see NAMES.
  """
  scale, length = jnp.exp(-log_temperature), h_ULO.shape[1]
  window = max(1, min(config.window, length - 1))
  bank_ULK = scale * jnp.einsum('ulo,ko->ulk', h_ULO, bank.z_KO, preferred_element_type=jnp.float32)
  log_bank_UL = jax.nn.logsumexp(jnp.where(histories.allowed_UK[:, None], bank_ULK, MASKED), axis=-1)
  logits_ULW = scale * window_products(h_ULO, histories.z_ULO, window)
  inside_ULW = following(histories.mask_UL, window, False) & histories.mask_UL[..., None]
  pair_ULW = inside_ULW & following(histories.positive_UL, window, False)
  loss_ULW = _info_nce(logits_ULW, log_bank_UL[..., None])
  log_all_UL = log_bank_UL
  if config.impression_negatives:
    shown_ULW = inside_ULW & following(histories.negative_UL, window, False)
    shown_ULW &= jnp.cumsum(shown_ULW, axis=-1) <= config.impression_negatives
    log_all_UL = jnp.logaddexp(log_bank_UL, jax.nn.logsumexp(jnp.where(shown_ULW, logits_ULW, MASKED), axis=-1))
  events_U = jnp.sum(histories.mask_UL, axis=1)
  anchor_U = jnp.clip(jnp.minimum(config.downstream_length, events_U - window) - 1, 0)
  anchor_UL1 = (jnp.arange(length) == anchor_U[:, None])[..., None]
  return {
    'ntl': _mean(_info_nce(logits_ULW[..., 0], log_all_UL)[..., None], pair_ULW[..., :1]),
    'mtl': _mean(loss_ULW, pair_ULW),
    'ftl': _mean(loss_ULW, pair_ULW & anchor_UL1),
  }


def sequence_terms(
  hidden: Callable[[jax.Array], jax.Array],
  histories: Histories,
  bank: Bank,
  log_temperature: jax.Array,
  config: PretrainConfig,
  weight_K: jax.Array | Sequence[float],
) -> tuple[LossTerm, ...]:
  """The losses as terms of a repair of these very histories' event embeddings.

  Terms that are summed share forward and backward pass, so all together they cost one pass of the tower.

  Args:
    hidden: event embeddings [U, L, D] -> H of every event [U, L, O].
    histories: of the same users.
    bank: the negatives.
    log_temperature: learned by pretraining.
    config: of the pretraining.
    weight_K: of each loss, in the order of NAMES; 0 leaves it out. It may be traced.
  """
  all_losses = shared(lambda x: sequence_losses_each(hidden(x), histories, bank, log_temperature, config))
  return tuple(
    LossTerm(name, lambda x, seed_B, name=name: all_losses(x)[name], weight_K[k], 1 / len(NAMES))
    for k, name in enumerate(NAMES)
  )


def shared(function: Callable[[jax.Array], dict]) -> Callable[[jax.Array], dict]:
  """The function, traced once for one and the same argument: terms that add up then have one backward pass."""
  last: list = [None, None]

  def once(x: jax.Array) -> dict:
    if last[0] is not x:
      last[:] = x, function(x)
    return last[1]

  return once


def _info_nce(logit: jax.Array, log_negatives: jax.Array) -> jax.Array:
  """PinFM Eq. 2, whatever form of it the tower was pretrained with."""
  return jnp.logaddexp(logit, log_negatives) - logit


def _mean(loss_ULW: jax.Array, pair_ULW: jax.Array) -> jax.Array:
  """[U]: the mean over each history's pairs."""
  total_U = jnp.sum(jnp.where(pair_ULW, loss_ULW, 0.0), axis=(1, 2))
  return total_U / jnp.maximum(jnp.sum(pair_ULW, axis=(1, 2)), 1)
