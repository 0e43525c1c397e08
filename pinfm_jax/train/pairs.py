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
    h_ULO: H of every position.
    z_ULO: z of every position's item.
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


def pair_loss(positive_logit: Array, negatives: Array, config: PretrainConfig, catalogue: int) -> Array:
  """The loss of each pair from its logit s and what `negatives.reduce_negatives` gives of its anchor's columns.

  Softmax: -log(exp(s) / (exp(s) + sum of negatives)) (PinFM Eq. 2). Where the columns are the whole catalogue and keep
  the user's positives, exp(s) is in the sum already: the full cross-entropy.

  Binary cross-entropy: -b log sigmoid(s) - sum of log(1 - sigmoid) over k negatives (SASRec, k = 1). gSASRec's
  calibration (arXiv:2308.07192) b = a (t (1 - 1 / a) + 1 / a) = 1 - t (1 - a), of the share a = k / (catalogue - 1) of
  the items that are drawn, takes out (t = 1) the overconfidence that comes of drawing few.

  Args:
    positive_logit: s.
    negatives: logarithm of the sum over the negatives; for BCE, the sum itself.
    config: which loss.
    catalogue: number of items that negatives are drawn from.
  """
  if config.bce_negatives:
    rate = min(1.0, config.bce_negatives / max(catalogue - 1, 1))
    return (1 - config.bce_calibration * (1 - rate)) * jax.nn.softplus(-positive_logit) + negatives
  if config.keep_positives and config.full_catalogue:
    return negatives - positive_logit
  return jnp.logaddexp(positive_logit, negatives) - positive_logit


def pair_sums(
  anchors: Anchors, negatives_UL: Array, scale: Array, config: PretrainConfig, seed: Array, catalogue: int = 1
) -> dict[str, Array]:
  """Sum and number of the valid pairs' losses, [2], of each loss whose weight is not 0.

  A pair is an anchor and a positive event at most L' places behind it in the same segment:
    ntl: the next event. With impression negatives, the nearest shown events among the L' following ones, at most as
      many as configured, join the anchor's negatives; an item shown twice counts twice.
    mtl: `pairs` offsets drawn of the window for every anchor; one that is drawn twice counts twice.
    ftl: one anchor a segment, its L_d-th event, with all of the window.

  Args:
    anchors: the rows.
    negatives_UL: what is known of each anchor's columns (`negatives.reduce_negatives`).
    scale: 1 / tau.
    config: weights, window, anchor, pairs.
    seed: uint32, of the run and the step; seeds the offsets of mtl.
    catalogue: number of items that negatives are drawn from.
  """
  users, length, _ = anchors.h_ULO.shape
  rows = max(1, min(users, _CHUNK_TOKENS // length))
  while users % rows:
    rows -= 1

  @jax.checkpoint
  def one(part: tuple[Anchors, Array]) -> dict[str, Array]:
    return _chunk_sums(*part, scale, config, seed, catalogue)

  chunked = jax.tree.map(lambda x: x.reshape(users // rows, rows, *x.shape[1:]), (anchors, negatives_UL))
  return jax.tree.map(lambda sums_N2: jnp.sum(sums_N2, axis=0), jax.lax.map(one, chunked))


def _chunk_sums(
  anchors: Anchors, negatives_UL: Array, scale: Array, config: PretrainConfig, seed: Array, catalogue: int
) -> dict[str, Array]:
  length = anchors.h_ULO.shape[1]
  far = config.mtl_weight or config.ftl_weight or config.impression_negatives
  window = max(1, min(config.window if far else 1, length - 1))
  logits_ULW = scale * window_products(anchors.h_ULO, anchors.z_ULO, window)
  same_ULW = following(anchors.segment_UL, window, -1) == anchors.segment_UL[:, :, None]
  inside_ULW = same_ULW & following(anchors.mask_UL, window, False) & anchors.mask_UL[:, :, None]
  pair_ULW = inside_ULW & following(anchors.positive_UL, window, False)
  loss_ULW = pair_loss(logits_ULW, negatives_UL[:, :, None], config, catalogue)
  sums = {}
  if config.ntl_weight:
    all_UL = negatives_UL
    if anchors.shown_UL is not None:
      shown_ULW = inside_ULW & following(anchors.shown_UL, window, False)
      shown_ULW &= jnp.cumsum(shown_ULW, axis=-1) <= config.impression_negatives
      log_shown_UL = jax.nn.logsumexp(jnp.where(shown_ULW, logits_ULW, MASKED), axis=-1)
      all_UL = jnp.logaddexp(negatives_UL, log_shown_UL)
    sums['ntl'] = _sum(pair_loss(logits_ULW[:, :, 0], all_UL, config, catalogue), pair_ULW[:, :, 0])
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
