"""Which form of causal softmax attention runs: the plain one, or a flash kernel that never stores the [L, L] scores.

The choice is made while tracing, from the platform, the type and the sizes. All forms compute the same function:
`dcat.attend_causal`. Programs for several platforms at once (`serve.programs`) ask for the plain form.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pinfm_jax.errors import UserError
from pinfm_jax.model.dcat import LayerKV, attend_causal, visible_keys

Array = jax.Array

# Mesh axes as `train.sharding` lays out activations; a kernel is opaque to the partitioner, so they are named here.
_BATCH_AXES = ('data', 'fsdp')
_HEAD_AXIS = 'model'
_SPLASH_BLOCKS = (512, 384, 256, 128)


def causal_attention(query_ULHK: Array, kv: LayerKV, mask_UL: Array, segment_UL: Array | None, kind: str) -> Array:
  """Causal self-attention in the form that `kind` ('auto', 'xla' or 'flash') gives on this platform.

  Args:
    query_ULHK: queries of every position.
    kv: keys and values of the same positions.
    mask_UL: True on real events, which precede the padding.
    segment_UL: int32 segments of packed rows, contiguous; None where each row is one.
    kind: `TowerConfig.attention`.

  Returns:
    [U, L, H, K]; equal to `attend_causal` on real events, finite and meaningless on padding.

  Raises:
    UserError: 'flash' where no flash kernel serves.
  """
  length, _, head_width = query_ULHK.shape[1:]
  form = choose_form(kind, current_platform(), query_ULHK.dtype.name, length, head_width)
  if form == 'xla':
    return attend_causal(query_ULHK, kv, mask_UL, segment_UL)
  return on_shards(attend_cudnn if form == 'cudnn' else attend_splash, query_ULHK, kv, segment_UL)


def choose_form(kind: str, platform: str, dtype: str, length: int, head_width: int) -> str:
  """'xla', 'cudnn' (CUDA) or 'splash' (TPU).

  'auto' takes the flash kernel where there is one and the plain form elsewhere; symbolic lengths need the plain form.

  Raises:
    UserError: 'flash' where no kernel serves, with the reason.
  """
  reason = _why_no_flash(platform, dtype, length, head_width) if kind != 'xla' else ''
  if kind == 'flash' and reason:
    raise UserError(f"model.tower.attention is 'flash', but {reason}; set model.tower.attention=auto or xla")
  if kind == 'xla' or reason:
    return 'xla'
  return 'cudnn' if platform == 'cuda' else 'splash'


def current_platform() -> str:
  """'cpu', 'tpu', 'cuda' or 'rocm'."""
  backend = jax.default_backend()
  if backend != 'gpu':
    return backend
  return 'cuda' if 'cuda' in jax.devices()[0].client.platform_version else 'rocm'


def _why_no_flash(platform: str, dtype: str, length: int, head_width: int) -> str:
  if platform not in ('cuda', 'tpu'):
    return f'flash kernels exist for cuda and tpu and this is {platform}'
  if not isinstance(length, int):
    return 'the length is symbolic and flash kernels need a fixed one'
  if platform == 'tpu':
    return '' if length % 128 == 0 else f'on tpu it needs histories of a multiple of 128 events, got {length}'
  if dtype != 'bfloat16':
    return f'on cuda it needs model.tower.dtype=bfloat16, got {dtype}'
  if head_width % 8 or head_width > 128:
    return f'on cuda a head (width / heads) must be a multiple of 8 of at most 128 wide, got {head_width}'
  return '' if length % 2 == 0 else f'on cuda it needs histories of an even number of events, got {length}'


def attend_cudnn(query_ULHK: Array, key_ULHK: Array, value_ULHK: Array, segment_UL: Array | None) -> Array:
  """cuDNN's flash attention, softmax in float32.

  Padding stands behind the real events, so the causal mask alone hides it and no scores' mask is needed. Packed rows
  need one: [U, 1, L, L] in bfloat16, shared by the heads, still H times smaller than the scores.
  """
  mask_U1LM = None
  if segment_UL is not None:
    mask_U1LM = visible_keys(jnp.ones(segment_UL.shape, bool), segment_UL)
  return jax.nn.dot_product_attention(
    query_ULHK, key_ULHK, value_ULHK, mask=mask_U1LM, is_causal=True, implementation='cudnn'
  )


def attend_splash(
  query_ULHK: Array, key_ULHK: Array, value_ULHK: Array, segment_UL: Array | None, interpret: bool = False
) -> Array:
  """JAX's splash attention kernel for TPU: skips the blocks above the diagonal, masks segments inside a block.

  `interpret` runs the kernel's program step by step on any platform (for tests).
  """
  # Here, because only TPUs need it and the import takes a second.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  length, heads, head_width = query_ULHK.shape[1:]
  block = next(size for size in _SPLASH_BLOCKS if length % size == 0)
  sizes = splash.BlockSizes(
    block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
  )
  mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
  kernel = splash.make_splash_mha_single_device(mask=mask, block_sizes=sizes, interpret=interpret)
  query_ULHK = query_ULHK * jnp.asarray(1 / math.sqrt(head_width), query_ULHK.dtype)
  by_head = [x.swapaxes(1, 2) for x in (query_ULHK, key_ULHK, value_ULHK)]
  segments = None if segment_UL is None else splash.SegmentIds(segment_UL, segment_UL)
  return jax.vmap(kernel)(*by_head, segments).swapaxes(1, 2)


def on_shards(kernel: Callable[..., Array], query_ULHK: Array, kv: LayerKV, segment_UL: Array | None) -> Array:
  """Runs a kernel on each device's users and heads: the partitioner cannot look inside, and would gather all of them.

  An axis that does not divide the users or heads leaves them whole, as `train.sharding` does.
  """
  arrays = (query_ULHK, kv.key, kv.value, segment_UL)
  mesh = jax.sharding.get_abstract_mesh()
  batch = tuple(axis for axis in _BATCH_AXES if axis in mesh.axis_names)
  if not batch:
    return kernel(*arrays)
  users, _, heads, _ = query_ULHK.shape
  batch = batch if users % math.prod(mesh.shape[axis] for axis in batch) == 0 else None
  head = _HEAD_AXIS if heads % mesh.shape.get(_HEAD_AXIS, heads + 1) == 0 else None
  spec = P(batch, None, head, None)
  specs = (spec, spec, spec, None if segment_UL is None else P(batch, None))
  return jax.shard_map(kernel, in_specs=specs, out_specs=spec, check_vma=False)(*arrays)
