"""The columns of InfoNCE: which items of the global batch serve as negatives, and for which users they do not.

Only ids, users and flags are looked at here, replicated on every device: 13 bytes a token of the global batch cross the
mesh, and every device finds the same columns. The sum over them is each device's own (`reduce_negatives`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.model.dcat import MASKED
from pinfm_jax.model.hashing import permute_words
from pinfm_jax.model.pinfm import EventBatch

Array = jax.Array

# Largest number of logits that exist at once, in float32: 64 MiB.
CHUNK_LOGITS = 1 << 24
_ALL_ONES = np.uint32(0xFFFFFFFF)


class Columns(NamedTuple):
  """K negative columns, and who may not use them. T tokens are the events of the global batch, row by row.

  Attributes:
    token_K: int32, a token that holds the column's item: t < T is event t, T + v is uniform negative v.
    valid_K: False on unused columns.
    user_T: uint32, ascending: with column_T the pairs (user, column that the user may not use). The tail that holds no
      pair has the largest user.
    column_T: int32 column of the pair; K where there is none.
    positives: float32 scalar, positive events of the batch.
    share: float32 scalar, the share of the batch's distinct positive items that became columns.
  """

  token_K: Array
  valid_K: Array
  user_T: Array
  column_T: Array
  positives: Array
  share: Array


def positive_mask(events: EventBatch, action_bits: int) -> Array:
  """Which events are positive targets: any action of A_pos taken, or every real event when `action_bits` is 0."""
  if action_bits == 0:
    return events.mask_UL
  return events.mask_UL & (events.actions_UL & jnp.uint32(action_bits) > 0)


def choose_columns(
  item_T2: Array, user_T: Array, positive_T: Array, uniform_V2: Array, max_columns: int, seed: Array
) -> Columns:
  """The distinct positive items of the global batch, at most `max_columns` sampled a step, and V uniform negatives.

  All entries are sorted by a random permutation of their ids, which a 64-bit word pair holds exactly. So the first
  distinct items are a uniform sample of the distinct items, it depends on nothing but (seed, ids), and two items are
  never taken for one. A uniform negative that is a column already, or was drawn twice, adds no second column.

  A column is excluded for every user who has its item among the positives of the global batch, whichever row or device
  holds them (PinFM Eq. 2: a user's positives are no negatives of that user). The exclusions are kept as pairs, as
  there are at most T of them, where a [users, K] mask could be larger than the batch.

  Args:
    item_T2: uint32 id words of every event of the global batch.
    user_T: uint32 user of each event.
    positive_T: positive targets (see `positive_mask`).
    uniform_V2: uint32 id words of random items of the catalogue; V may be 0.
    max_columns: columns for the positive items.
    seed: uint32, of the run and the step.
  """
  tokens, uniforms = item_T2.shape[0], uniform_V2.shape[0]
  entries, sampled = tokens + uniforms, min(max_columns, tokens)
  columns = sampled + uniforms
  used = jnp.concatenate([positive_T, jnp.ones(uniforms, bool)])
  high, low = (jnp.where(used, w, _ALL_ONES) for w in permute_words(jnp.concatenate([item_T2, uniform_V2]), seed))
  # The third key puts an item's events before its uniform draws, and both before what is not used.
  entry = jnp.arange(entries, dtype=jnp.int32) + jnp.where(used, 0, entries).astype(jnp.int32)
  user = jnp.concatenate([user_T, jnp.zeros(uniforms, jnp.uint32)])
  high, low, entry, user = jax.lax.sort((high, low, entry, user), num_keys=3, is_stable=False)
  used, event = entry < entries, entry < tokens
  new = used & ((high != _previous(high, 0)) | (low != _previous(low, 0)) | (jnp.arange(entries) == 0))
  run = jnp.where(used, jnp.cumsum(new) - 1, entries)  # number of the distinct item

  rank = jnp.cumsum(new & event) - 1
  in_batch = new & event & (rank < sampled)
  column = jnp.where(in_batch, rank, columns).astype(jnp.int32)
  if uniforms:
    drawn = used & ~event & (new | _previous(event, False))  # the first draw of an item
    taken = jnp.zeros(entries, bool).at[jnp.where(in_batch, run, entries)].set(True, mode='drop')
    drawn &= ~taken.at[run].get(mode='fill', fill_value=False)
    column = jnp.where(drawn, sampled + jnp.cumsum(drawn) - 1, column).astype(jnp.int32)
  token_K = jnp.zeros(columns, jnp.int32).at[column].set(entry, mode='drop')
  valid_K = jnp.zeros(columns, bool).at[column].set(True, mode='drop')
  column_R = jnp.full(entries, columns, jnp.int32)
  column_R = column_R.at[jnp.where(column < columns, run, entries)].set(column, mode='drop')
  # Every positive event's column, sampled or drawn: its user may not use it.
  column = jnp.where(event, column_R.at[run].get(mode='fill', fill_value=columns), columns)
  user = jnp.where(column < columns, user, _ALL_ONES)
  user_T, column_T = jax.lax.sort((user, column), num_keys=1, is_stable=False)
  distinct = jnp.sum(new & event)
  share = jnp.minimum(1.0, sampled / jnp.maximum(distinct, 1))
  return Columns(token_K, valid_K, user_T, column_T, jnp.sum(positive_T, dtype=jnp.float32), share)


def liked_elsewhere(item_T2: Array, user_T: Array, positive_T: Array) -> Array:
  """Events whose item is among their user's positives in the global batch, [T]: no negatives of that user."""
  tokens = item_T2.shape[0]
  entry = jnp.arange(tokens, dtype=jnp.int32) + jnp.where(positive_T, 0, tokens).astype(jnp.int32)
  user, low, high, entry = jax.lax.sort((user_T, item_T2[:, 0], item_T2[:, 1], entry), num_keys=4, is_stable=False)
  same = (user == _previous(user, 0)) & (low == _previous(low, 0)) & (high == _previous(high, 0))
  new = ~same | (jnp.arange(tokens) == 0)
  run = jnp.cumsum(new) - 1
  liked_R = jnp.zeros(tokens, bool).at[jnp.where(new, run, tokens)].set(entry < tokens, mode='drop')  # positives first
  return jnp.zeros(tokens, bool).at[entry % tokens].set(liked_R[run], unique_indices=True)


class Reduction(NamedTuple):
  """What is computed of an anchor's negatives, and which those are.

  Attributes:
    bce_negatives: 0 = log-sum-exp of the logits; k = k times the mean of softplus(logit) = -log(1 - sigmoid(logit)):
      the expected loss of k negatives drawn from the columns, with the variance of all of them.
    keep_positives: no column is excluded.
  """

  bce_negatives: int = 0
  keep_positives: bool = False


LOG_SUM = Reduction()


def reduce_negatives(
  h_AO: Array,
  user_A: Array,
  columns: Columns,
  columns_KO: Array,
  correction_K: Array,
  scale: Array,
  chunk: int = 0,
  how: Reduction = LOG_SUM,
) -> Array:
  """log sum_k exp(<H, z_k> / tau - correction_k) over each anchor's allowed negatives; -1e30 where it has none.

  Of several chunks the [chunk, K] logits are recomputed in the backward pass, and no [A, K] array exists.

  Args:
    h_AO: anchors.
    user_A: uint32 user of each.
    columns: the columns.
    columns_KO: their vectors z.
    correction_K: subtracted from the logits (`popularity.log_inclusion`, `pretrain.count_as`).
    scale: 1 / tau.
    chunk: most anchors computed at once; 0 = as many as `CHUNK_LOGITS` allows.
    how: another sum, or other columns.

  Returns:
    [A] float32.
  """
  anchors, width = h_AO.shape
  chunk = min(chunk or max(1, CHUNK_LOGITS // columns_KO.shape[0]), anchors)
  chunks = -(-anchors // chunk)
  size = -(-anchors // chunks)
  pad = chunks * size - anchors
  h_NCO = jnp.pad(h_AO, ((0, pad), (0, 0))).reshape(chunks, size, width)
  user_NC = jnp.pad(user_A, (0, pad)).reshape(chunks, size)

  def one(h_CO: Array, user_C: Array) -> Array:
    allowed_CK = columns.valid_K[None]
    if not how.keep_positives:
      allowed_CK = allowed_CK & ~excluded(user_C, columns)
    logits_CK = scale * jnp.einsum('co,ko->ck', h_CO, columns_KO, preferred_element_type=jnp.float32) - correction_K
    if how.bce_negatives:
      total_C = jnp.sum(jnp.where(allowed_CK, jax.nn.softplus(logits_CK), 0.0), axis=-1)
      return how.bce_negatives * total_C / jnp.maximum(jnp.sum(allowed_CK, axis=-1), 1)
    return jax.nn.logsumexp(jnp.where(allowed_CK, logits_CK, MASKED), axis=-1)

  if chunks == 1:
    return one(h_AO, user_A)
  return jax.lax.map(lambda args: jax.checkpoint(one)(*args), (h_NCO, user_NC)).reshape(-1)[:anchors]


def excluded(user_C: Array, columns: Columns) -> Array:
  """Which columns each anchor's user may not use, [C, K].

  Neighbouring anchors of one user share a slot. The slots' users have ranges in the sorted pairs; these are walked
  through, one window of C pairs after another, until the longest list of pairs is done.
  """
  anchors, count = user_C.shape[0], columns.valid_K.shape[0]
  first_C = (user_C != _previous(user_C, 0)) | (jnp.arange(anchors) == 0)
  slot_C = jnp.cumsum(first_C) - 1
  begin_C = jnp.searchsorted(columns.user_T, user_C, side='left')
  length_C = jnp.where(first_C, jnp.searchsorted(columns.user_T, user_C, side='right') - begin_C, 0)
  end_C = jnp.cumsum(length_C)
  total = end_C[-1]

  def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
    place, mask_SK = state
    pair_W = place + jnp.arange(anchors)
    anchor_W = jnp.minimum(jnp.searchsorted(end_C, pair_W, side='right'), anchors - 1)
    source_W = begin_C[anchor_W] + pair_W - (end_C[anchor_W] - length_C[anchor_W])
    column_W = jnp.where(pair_W < total, columns.column_T.at[source_W].get(mode='clip'), count)
    return place + anchors, mask_SK.at[slot_C[anchor_W], column_W].set(True, mode='drop')

  # Zeros made from the anchors: under shard_map a loop's state must differ by device from the start.
  nothing_SK = jnp.broadcast_to((slot_C < 0)[:, None], (anchors, count))
  _, mask_SK = jax.lax.while_loop(lambda state: state[0] < total, body, (total * 0, nothing_SK))
  return mask_SK[slot_C]


def _previous(x: Array, first: bool | int) -> Array:
  """Each element's predecessor."""
  return jnp.concatenate([jnp.full(1, first, x.dtype), x[:-1]])
