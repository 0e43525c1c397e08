"""The (anchor, target) pairs of the three sequence losses, within each row of the batch (PinFM section 3.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pinfm_jax.config import PretrainConfig
from pinfm_jax.model.dcat import MASKED
from pinfm_jax.model.hashing import hash_uniform

Array = jax.Array

_CHUNK_TOKENS = 8192  # of whole rows that are computed at once


class Anchors(NamedTuple):
  """Rows of events as anchors and as targets.

  Attributes:
    h_ULO: unit-length H of every position.
    z_ULO: unit-length z of every position's item.
    mask_UL: True on real events.
    positive_UL: positive targets.
    segment_UL: int32, equal within a segment.
    index_U: int32 place of the row in the global batch.
    shown_UL: events that count as impression negatives, or None.
  """

  h_ULO: Array
  z_ULO: Array
  mask_UL: Array
  positive_UL: Array
  segment_UL: Array
  index_U: Array
  shown_UL: Array | None = None


def info_nce(positive_logit: Array, log_negatives: Array) -> Array:
  """-log(exp(s) / (exp(s) + sum of negatives)) for each pair (PinFM Eq. 2)."""
  return jnp.logaddexp(positive_logit, log_negatives) - positive_logit


def pair_sums(
  anchors: Anchors, log_negatives_UL: Array, scale: Array, config: PretrainConfig, seed: Array
) -> dict[str, Array]:
  """Sum and number of the valid pairs' losses, [2], of each loss whose weight is not 0.

  A pair is an anchor and a positive event at most L' places behind it in the same segment:
    ntl: the next event. With impression negatives, the nearest shown events among the L' following ones, at most as
      many as configured, join the anchor's negatives; an item shown twice counts twice.
    mtl: `pairs` offsets drawn of the window for every anchor; one that is drawn twice counts twice.
    ftl: one anchor a segment, its L_d-th event, with all of the window.

  Args:
    anchors: the rows.
    log_negatives_UL: log-sum-exp over each anchor's columns.
    scale: 1 / tau.
    config: weights, window, anchor, pairs.
    seed: uint32, of the run and the step; seeds the offsets of mtl.
  """
  users, length, _ = anchors.h_ULO.shape
  rows = max(1, min(users, _CHUNK_TOKENS // length))
  while users % rows:
    rows -= 1

  @jax.checkpoint
  def one(part: tuple[Anchors, Array]) -> dict[str, Array]:
    return _chunk_sums(*part, scale, config, seed)

  chunked = jax.tree.map(lambda x: x.reshape(users // rows, rows, *x.shape[1:]), (anchors, log_negatives_UL))
  return jax.tree.map(lambda sums_N2: jnp.sum(sums_N2, axis=0), jax.lax.map(one, chunked))


def _chunk_sums(
  anchors: Anchors, log_negatives_UL: Array, scale: Array, config: PretrainConfig, seed: Array
) -> dict[str, Array]:
  length = anchors.h_ULO.shape[1]
  far = config.mtl_weight or config.ftl_weight or config.impression_negatives
  window = max(1, min(config.window if far else 1, length - 1))
  logits_ULW = scale * window_products(anchors.h_ULO, anchors.z_ULO, window)
  same_ULW = following(anchors.segment_UL, window, -1) == anchors.segment_UL[:, :, None]
  inside_ULW = same_ULW & following(anchors.mask_UL, window, False) & anchors.mask_UL[:, :, None]
  pair_ULW = inside_ULW & following(anchors.positive_UL, window, False)
  loss_ULW = info_nce(logits_ULW, log_negatives_UL[:, :, None])
  sums = {}
  if config.ntl_weight:
    log_all_UL = log_negatives_UL
    if anchors.shown_UL is not None:
      shown_ULW = inside_ULW & following(anchors.shown_UL, window, False)
      shown_ULW &= jnp.cumsum(shown_ULW, axis=-1) <= config.impression_negatives
      log_shown_UL = jax.nn.logsumexp(jnp.where(shown_ULW, logits_ULW, MASKED), axis=-1)
      log_all_UL = jnp.logaddexp(log_negatives_UL, log_shown_UL)
    sums['ntl'] = _sum(info_nce(logits_ULW[:, :, 0], log_all_UL), pair_ULW[:, :, 0])
  if config.mtl_weight:
    drawn_ULW = drawn_offsets(anchors.index_U, length, window, config, seed)
    sums['mtl'] = _sum(loss_ULW, jnp.where(pair_ULW, drawn_ULW, 0))
  if config.ftl_weight:
    anchor_UL1 = (place_in_segment(anchors.segment_UL) == config.downstream_length - 1)[:, :, None]
    sums['ftl'] = _sum(loss_ULW, pair_ULW & anchor_UL1)
  return sums


def window_products(h_ULO: Array, z_ULO: Array, window: int) -> Array:
  """<h_l, z_(l + 1 + w)> of each position with the `window` ones behind it, [U, L, W]; 0 beyond the row.

  Computed as one matmul of blocks of W anchors with the 2 W targets that they reach, of which the band is kept: a
  gather of each anchor's targets would read every target W times.
  """
  users, length, width = h_ULO.shape
  blocks = -(-length // window)
  pad = blocks * window - length
  h_UBIO = jnp.pad(h_ULO, ((0, 0), (0, pad), (0, 0))).reshape(users, blocks, window, width)
  z_UBIO = jnp.pad(z_ULO, ((0, 0), (0, pad + window), (0, 0))).reshape(users, blocks + 1, window, width)
  z_UBJO = jnp.concatenate([z_UBIO[:, :-1], z_UBIO[:, 1:]], axis=2)
  x_UBIJ = jnp.einsum('ubio,ubjo->ubij', h_UBIO, z_UBJO, preferred_element_type=jnp.float32)
  # Element (i, i + 1 + w) of a block lies at i * 2W + i + 1 + w = i * (2W + 1) + w + 1: rows one longer are the band.
  flat = x_UBIJ.reshape(users, blocks, 2 * window * window)[:, :, 1:]
  flat = jnp.pad(flat, ((0, 0), (0, 0), (0, window + 1)))
  band_UBIW = flat.reshape(users, blocks, window, 2 * window + 1)[..., :window]
  return band_UBIW.reshape(users, blocks * window, window)[:, :length]


def following(x_UL: Array, window: int, fill: bool | int) -> Array:
  """x of the `window` positions behind each one, [U, L, W]; `fill` beyond the row."""
  length = x_UL.shape[1]
  padded = jnp.pad(x_UL, ((0, 0), (0, window)), constant_values=fill)
  return padded[:, jnp.arange(length)[:, None] + 1 + jnp.arange(window)]


def drawn_offsets(index_U: Array, length: int, window: int, config: PretrainConfig, seed: Array) -> Array:
  """How often each anchor draws each offset of L_mtl, int32 [U, L, W]: a function of (seed, place in the batch)."""
  place_UL1 = (index_U[:, None, None] * length + jnp.arange(length)[:, None]) * config.pairs
  offset_ULP = hash_uniform(place_UL1 + jnp.arange(config.pairs), seed) % jnp.uint32(config.window)
  return jnp.sum(offset_ULP[..., None] == jnp.arange(window, dtype=jnp.uint32), axis=2)


def place_in_segment(segment_UL: Array) -> Array:
  """Each event's place in its segment, counted from 0."""
  place_L = jnp.arange(segment_UL.shape[1], dtype=jnp.int32)
  new_UL = jnp.pad(segment_UL[:, 1:] != segment_UL[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  return place_L - jax.lax.cummax(jnp.where(new_UL, place_L, 0), axis=1)


def _sum(losses: Array, weights: Array) -> Array:
  """[2]: the weighted sum, and the sum of the weights."""
  weights = weights.astype(jnp.float32)
  return jnp.stack([jnp.sum(jnp.where(weights > 0, losses * weights, 0.0)), jnp.sum(weights)])
