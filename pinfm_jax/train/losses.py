"""PinFM's sequence losses: next-token, multi-token and future-token InfoNCE over shared in-batch negatives (section 3).

All three losses share their negatives: an anchor's negatives depend on its user and not on its target. So the
log-sum-exp over negatives is computed once an anchor, in chunks that are recomputed in the backward pass, and a
(anchor, target) pair costs one inner product. No [tokens x tokens] array exists.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pinfm_jax.config import PretrainConfig
from pinfm_jax.model.dcat import MASKED
from pinfm_jax.model.hashing import hash_uniform
from pinfm_jax.model.pinfm import EventBatch

Array = jax.Array


class Negatives(NamedTuple):
  """The columns of InfoNCE: distinct items of the global batch that are someone's positive target.

  Attributes:
    token_K: int32, a flat token (u * L + l) that holds the column's item.
    valid_K: False on unused columns.
    excluded_GK: True where the column's item is among the positives of user group g.
    group_U: int32, the user group of each segment (segments of one user share a group).
  """

  token_K: Array
  valid_K: Array
  excluded_GK: Array
  group_U: Array


def positive_mask(events: EventBatch, action_bits: int) -> Array:
  """Which events are positive targets: any action of A_pos taken, or every real event when `action_bits` is 0."""
  if action_bits == 0:
    return events.mask_UL
  return events.mask_UL & (events.actions_UL & jnp.uint32(action_bits) > 0)


def choose_negatives(events: EventBatch, positive_UL: Array, max_columns: int, step: Array) -> Negatives:
  """Draws the negative columns: the distinct positive items of the global batch, at most K of them, sampled a step.

  Items are sorted by a hash of (item, step), so taking the first K distinct ones is a uniform sample of the distinct
  items that does not depend on the mesh. A column is excluded for every user who has its item among the positives
  of this batch, whichever segment contributed it (PinFM Eq. 2: same-user positives are no negatives).

  Args:
    events: the global batch.
    positive_UL: positive targets (see `positive_mask`).
    max_columns: K.
    step: int32 training step, which seeds the sample.
  """
  users, length = positive_UL.shape
  tokens = users * length
  low_M, high_M = events.item_UL2.reshape(tokens, 2).T
  positive_M = positive_UL.reshape(tokens)
  random_M = hash_uniform(low_M ^ hash_uniform(high_M, 1), step) >> 1
  random_M = jnp.where(positive_M, random_M, jnp.uint32(0xFFFFFFFF))  # the rest goes to the end
  token_M = jnp.arange(tokens, dtype=jnp.int32)
  random_M, low_M, high_M, token_M = jax.lax.sort((random_M, low_M, high_M, token_M), num_keys=3)
  used_M = random_M != jnp.uint32(0xFFFFFFFF)
  new_M = jnp.concatenate(
    [jnp.ones(1, bool), (low_M[1:] != low_M[:-1]) | (high_M[1:] != high_M[:-1]) | (random_M[1:] != random_M[:-1])]
  )
  column_M = jnp.where(used_M, jnp.cumsum(new_M) - 1, tokens)
  columns = min(max_columns, tokens)
  first_M = jnp.where(new_M & used_M, column_M, tokens)
  token_K = jnp.zeros(columns, jnp.int32).at[first_M].set(token_M, mode='drop')
  valid_K = jnp.zeros(columns, bool).at[first_M].set(True, mode='drop')
  # Segments of one user act as one: group = the first segment that has the same user.
  user_U = events.user_UL[:, 0]
  group_U = jnp.argmax(user_U[:, None] == user_U[None, :], axis=1).astype(jnp.int32)
  excluded_GK = jnp.zeros((users, columns), bool).at[group_U[token_M // length], column_M].set(True, mode='drop')
  return Negatives(token_K, valid_K, excluded_GK, group_U)


def log_sum_negatives(h_ULO: Array, z_ULO: Array, negatives: Negatives, scale: Array, chunk: int = 8) -> Array:
  """log sum_k exp(<H, z_k> / tau) over each anchor's allowed negatives; -1e30 where it has none.

  Args:
    h_ULO: unit-length anchors.
    z_ULO: unit-length targets of every token.
    negatives: the columns.
    scale: 1 / tau.
    chunk: segments a chunk of the computation; the [chunk, L, K] logits are recomputed in the backward pass.

  Returns:
    [U, L] float32.
  """
  columns_KO = z_ULO.reshape(-1, z_ULO.shape[-1])[negatives.token_K]

  @jax.checkpoint
  def one(args: tuple[Array, Array]) -> Array:
    h_LO, group = args
    allowed_K = negatives.valid_K & ~negatives.excluded_GK[group]
    logits_LK = scale * jnp.einsum('lo,ko->lk', h_LO, columns_KO, preferred_element_type=jnp.float32)
    logits_LK = jnp.where(allowed_K, logits_LK, MASKED)
    return jax.nn.logsumexp(logits_LK, axis=-1)

  return jax.lax.map(one, (h_ULO, negatives.group_U), batch_size=min(chunk, h_ULO.shape[0]))


def info_nce(positive_logit: Array, log_negatives: Array) -> Array:
  """-log(exp(s) / (exp(s) + sum of negatives)) for each pair (PinFM Eq. 2)."""
  return jnp.logaddexp(positive_logit, log_negatives) - positive_logit


def sequence_losses(
  h_ULO: Array,
  z_ULO: Array,
  log_temperature: Array,
  events: EventBatch,
  config: PretrainConfig,
  action_bits: int,
  step: Array,
  index_U: Array,
) -> tuple[Array, dict[str, Array]]:
  """The weighted sum of L_ntl, L_mtl and L_ftl (PinFM section 3.1), each averaged over its valid pairs.

  Args:
    h_ULO: H of every position.
    z_ULO: z of every position's item.
    log_temperature: learnable scalar.
    events: the global batch.
    config: weights, window, anchor, columns.
    action_bits: A_pos as bits; 0 = every event.
    step: int32 training step; seeds negatives and pair sampling.
    index_U: int32 place of each segment in the global batch; seeds pair sampling.

  Returns:
    The loss, and the figures 'ntl', 'mtl', 'ftl' (of the losses in use), 'temperature', 'columns'.
  """
  positive_UL = positive_mask(events, action_bits)
  negatives = choose_negatives(events, positive_UL, config.max_columns, step)
  scale = jnp.exp(-log_temperature)
  log_negatives_UL = log_sum_negatives(h_ULO, z_ULO, negatives, scale)
  figures = {'temperature': 1 / scale, 'columns': jnp.sum(negatives.valid_K)}
  total = jnp.zeros(())
  parts = {
    'ntl': (config.ntl_weight, lambda: _next_token(h_ULO, z_ULO, positive_UL, log_negatives_UL, scale)),
    'mtl': (
      config.mtl_weight,
      lambda: _multi_token(h_ULO, z_ULO, positive_UL, events.mask_UL, log_negatives_UL, scale, config, step, index_U),
    ),
    'ftl': (config.ftl_weight, lambda: _future_token(h_ULO, z_ULO, positive_UL, log_negatives_UL, scale, config)),
  }
  for name, (weight, compute) in parts.items():
    if weight:
      figures[name] = compute()
      total += weight * figures[name]
  return total, figures


def _next_token(h_ULO: Array, z_ULO: Array, positive_UL: Array, log_negatives_UL: Array, scale: Array) -> Array:
  logit = scale * jnp.sum(h_ULO[:, :-1] * z_ULO[:, 1:], axis=-1)
  return _mean(info_nce(logit, log_negatives_UL[:, :-1]), positive_UL[:, 1:])


def _multi_token(
  h_ULO: Array,
  z_ULO: Array,
  positive_UL: Array,
  mask_UL: Array,
  log_negatives_UL: Array,
  scale: Array,
  config: PretrainConfig,
  step: Array,
  index_U: Array,
) -> Array:
  """Each anchor against `pairs` offsets drawn from its window of L' following events."""
  users, length = positive_UL.shape
  place_ULP = (index_U[:, None, None] * length + jnp.arange(length)[:, None]) * config.pairs + jnp.arange(config.pairs)
  offset_ULP = 1 + (hash_uniform(place_ULP, step + 1) % jnp.uint32(config.window)).astype(jnp.int32)
  target_ULP = jnp.arange(length)[:, None] + offset_ULP
  inside_ULP = target_ULP < length
  target_ULP = jnp.minimum(target_ULP, length - 1)
  user_U11 = jnp.arange(users)[:, None, None]
  valid_ULP = inside_ULP & positive_UL[user_U11, target_ULP] & mask_UL[:, :, None]
  logit_ULP = scale * jnp.einsum('ulo,ulpo->ulp', h_ULO, z_ULO[user_U11, target_ULP])
  return _mean(info_nce(logit_ULP, log_negatives_UL[:, :, None]), valid_ULP)


def _future_token(
  h_ULO: Array, z_ULO: Array, positive_UL: Array, log_negatives_UL: Array, scale: Array, config: PretrainConfig
) -> Array:
  """One anchor, the L_d-th event, against the L' events that follow it; segments that end before have no pair."""
  anchor = config.downstream_length - 1
  targets = slice(anchor + 1, anchor + 1 + config.window)
  logit_UP = scale * jnp.einsum('uo,upo->up', h_ULO[:, anchor], z_ULO[:, targets])
  return _mean(info_nce(logit_UP, log_negatives_UL[:, anchor, None]), positive_UL[:, targets])


def _mean(values: Array, valid: Array) -> Array:
  return jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
