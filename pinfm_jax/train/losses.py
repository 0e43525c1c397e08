"""PinFM's sequence losses: next-token, multi-token and future-token InfoNCE over shared in-batch negatives (section 3).

All three losses share their negatives: an anchor's negatives depend on its user and not on its target. So the
log-sum-exp over negatives (or the sum of a binary cross-entropy) is computed once an anchor, in chunks that are
recomputed in the backward pass, and a (anchor, target) pair costs one inner product. No [tokens x tokens] array exists.

The losses are those of the global batch on any mesh. Every device computes the anchors of its own rows, and shares
them with the devices of its `model` group; what crosses devices is ids, users and flags of all events, the columns'
vectors [K, O], and, with a `model` axis, one number an anchor forward and the anchors' gradients back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from pinfm_jax.config import PretrainConfig
from pinfm_jax.model.hashing import fold_seed
from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.train.negatives import (
  Columns,
  Reduction,
  choose_columns,
  liked_elsewhere,
  positive_mask,
  reduce_negatives,
)
from pinfm_jax.train.pairs import Anchors, pair_sums
from pinfm_jax.train.popularity import Draws, log_inclusion
from pinfm_jax.train.sharding import AXES, BATCH_AXES, everywhere

Array = jax.Array

_COLUMNS, _PAIRS = 0, 1  # what a seed is for


class Extra(NamedTuple):
  """What the options of the losses read beside the events; None where an option is off.

  Attributes:
    item_UN2: uint32 id words of the uniform negatives, N a row.
    z_UNO: their targets z.
    frequency_UL: each event's item's share of all positive events (log_q).
    frequency_UN: the same of the uniform negatives.
    catalogue: number of items that negatives are drawn from.
    power_sum: sum over these of frequency^negative_power.
  """

  item_UN2: Array | None = None
  z_UNO: Array | None = None
  frequency_UL: Array | None = None
  frequency_UN: Array | None = None
  catalogue: int = 1
  power_sum: float = 1.0


class _Rows(NamedTuple):
  """What lies by rows: the part of a device's own."""

  anchors: Anchors
  user_UL: Array
  z_UNO: Array
  frequency_UL: Array | None
  frequency_UN: Array | None


def sequence_losses(
  h_ULO: Array,
  z_ULO: Array,
  log_temperature: Array,
  events: EventBatch,
  config: PretrainConfig,
  action_bits: int,
  seed: Array,
  index_U: Array,
  extra: Extra | None = None,
) -> tuple[Array, dict[str, Array]]:
  """The weighted sum of L_ntl, L_mtl and L_ftl (PinFM section 3.1), each averaged over its valid pairs.

  Runs on the mesh of `jax.set_mesh`, rows over its axes data and fsdp (their product must divide U); without one, on
  one device.

  Args:
    h_ULO: H of every position.
    z_ULO: z of every position's item.
    log_temperature: learnable scalar.
    events: the global batch.
    config: weights, window, anchor, columns.
    action_bits: A_pos as bits; 0 = every event.
    seed: uint32 of the run and its step; seeds negatives and pair sampling.
    index_U: int32 place of each row in the global batch; seeds pair sampling.
    extra: inputs of the options; may be None while they are off.

  Returns:
    The loss, and the figures 'ntl', 'mtl', 'ftl' (of the losses in use), 'temperature', 'columns'.
  """
  mesh = _mesh()
  users, length, width = h_ULO.shape
  extra = extra or Extra()
  positive_UL = positive_mask(events, action_bits)
  item_UN2 = jnp.zeros((users, 0, 2), jnp.uint32) if extra.item_UN2 is None else extra.item_UN2
  z_UNO = jnp.zeros((users, 0, width)) if extra.z_UNO is None else extra.z_UNO
  columns, shown_UL = _global_columns(events, positive_UL, item_UN2, config, seed)
  segment_UL = jnp.zeros((users, length), jnp.int32) if events.segment_UL is None else events.segment_UL
  anchors = Anchors(h_ULO, z_ULO, events.mask_UL, positive_UL, segment_UL, index_U, shown_UL)
  rows = _Rows(anchors, events.user_UL, z_UNO, extra.frequency_UL, extra.frequency_UN)
  draws = Draws(users * item_UN2.shape[1], extra.catalogue, config.negative_power, extra.power_sum)

  def on_a_device(rows: _Rows, columns: Columns, scale: Array, seed: Array) -> dict[str, Array]:
    columns_KO, frequency_K = _column_values(rows, columns)
    correction_K = _correction(frequency_K, columns, draws, config)
    # Cast once, before the chunks: the cast's transpose is the sum of their gradients over devices, else one a chunk.
    shared = jax.lax.pcast((columns_KO, correction_K, scale), BATCH_AXES, to='varying')
    negatives_UL = _reduced(rows, columns, *shared, mesh.shape['model'], config)
    sums = pair_sums(rows.anchors, negatives_UL, shared[-1], config, seed, extra.catalogue)
    sums = {name: jax.lax.psum(value, BATCH_AXES) for name, value in sums.items()}
    return {name: total / jnp.maximum(count, 1) for name, (total, count) in sums.items()}

  scale = jnp.exp(-(jax.lax.stop_gradient(log_temperature) if config.fixed_temperature else log_temperature))
  by_rows = jax.shard_map(on_a_device, mesh=mesh, in_specs=(P(BATCH_AXES), P(), P(), P()), out_specs=P())
  losses = by_rows(rows, columns, scale, fold_seed(seed, _PAIRS))
  weights = {'ntl': config.ntl_weight, 'mtl': config.mtl_weight, 'ftl': config.ftl_weight}
  total = sum((weights[name] * value for name, value in losses.items()), start=jnp.zeros(()))
  return total, {**losses, 'temperature': 1 / scale, 'columns': jnp.sum(columns.valid_K)}


def _mesh() -> Mesh | AbstractMesh:
  """The mesh of `jax.set_mesh`, or one device."""
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    return mesh
  return jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])


def _global_columns(
  events: EventBatch, positive_UL: Array, item_UN2: Array, config: PretrainConfig, seed: Array
) -> tuple[Columns, Array | None]:
  """The columns of the global batch, and with impression negatives the events that may serve as such, [U, L]."""
  ids = [events.item_UL2.reshape(-1, 2), events.user_UL.reshape(-1), positive_UL.reshape(-1)]
  ids, uniform_V2 = [everywhere(x) for x in ids], everywhere(item_UN2.reshape(-1, 2))
  columns = choose_columns(*ids, uniform_V2, config.max_columns, fold_seed(seed, _COLUMNS))
  if not config.impression_negatives:
    return columns, None
  return columns, events.mask_UL & ~positive_UL & ~liked_elsewhere(*ids).reshape(positive_UL.shape)


def _column_values(rows: _Rows, columns: Columns) -> tuple[Array, Array | None]:
  """The columns' vectors [K, O] and frequencies [K]: each device gives those of its own tokens, and a sum collects."""
  users, length = rows.user_UL.shape
  uniform = rows.z_UNO.shape[1]
  device = jax.lax.axis_index(BATCH_AXES)
  tokens = columns.user_T.shape[0] - jax.lax.axis_size(BATCH_AXES) * users * uniform
  event_K = columns.token_K - device * users * length
  draw_K = columns.token_K - tokens - device * users * uniform
  own_event_K = columns.valid_K & (event_K >= 0) & (event_K < users * length) & (columns.token_K < tokens)
  own_draw_K = columns.valid_K & (draw_K >= 0) & (draw_K < users * uniform)

  def collect(of_events: Array, of_draws: Array) -> Array:
    """[U, L, ...] and [U, N, ...] -> [K, ...]."""
    flat = [x.reshape(-1, *x.shape[2:]) for x in (of_events, of_draws)]
    # A place beyond the end reads as 0; a negative one would count from the end.
    places = (jnp.where(own, place, jnp.iinfo(jnp.int32).max) for own, place in
              ((own_event_K, event_K), (own_draw_K, draw_K)))  # fmt: skip
    parts = [x.at[place].get(mode='fill', fill_value=0) for x, place in zip(flat, places, strict=True) if x.shape[0]]
    return jax.lax.psum(sum(parts), BATCH_AXES)

  columns_KO = collect(rows.anchors.z_ULO, rows.z_UNO)
  if rows.frequency_UL is None:
    return columns_KO, None
  none_UN = rows.frequency_UL[:, :0]
  return columns_KO, collect(rows.frequency_UL, none_UN if rows.frequency_UN is None else rows.frequency_UN)


def _correction(frequency_K: Array | None, columns: Columns, draws: Draws, config: PretrainConfig) -> Array:
  """What is subtracted from the columns' logits, [K]."""
  if frequency_K is not None:
    return log_inclusion(frequency_K, columns, draws)
  if config.count_as:  # all columns together weigh as so many
    return jnp.full(columns.valid_K.shape, jnp.log(jnp.sum(columns.valid_K) / config.count_as))
  return jnp.zeros(columns.valid_K.shape)


def _reduced(
  rows: _Rows,
  columns: Columns,
  columns_KO: Array,
  correction_K: Array,
  scale: Array,
  model: int,
  config: PretrainConfig,
) -> Array:
  """`reduce_negatives` of the device's rows, [U, L]; the devices of a `model` group take a share each."""
  how = Reduction(config.bce_negatives, config.keep_positives)
  users, length, width = rows.anchors.h_ULO.shape
  h_AO, user_A = rows.anchors.h_ULO.reshape(-1, width), rows.user_UL.reshape(-1)
  if model == 1:
    reduced_A = reduce_negatives(h_AO, user_A, columns, columns_KO, correction_K, scale, how=how)
    return reduced_A.reshape(users, length)
  columns_KO, correction_K, scale = jax.lax.pcast((columns_KO, correction_K, scale), 'model', to='varying')
  share = -(-users * length // model)
  pad = share * model - users * length
  first = jax.lax.axis_index('model') * share
  h_AO = jax.lax.dynamic_slice_in_dim(jnp.pad(h_AO, ((0, pad), (0, 0))), first, share)
  user_A = jax.lax.dynamic_slice_in_dim(jnp.pad(user_A, (0, pad)), first, share)
  own_A = reduce_negatives(h_AO, user_A, columns, columns_KO, correction_K, scale, how=how)
  places = first + jnp.arange(share)
  all_A = jnp.zeros(share * model).at[places].set(own_A, indices_are_sorted=True, unique_indices=True)
  return jax.lax.psum(all_A, 'model')[: users * length].reshape(users, length)
