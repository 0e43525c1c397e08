"""Row-wise min-max quantisation of table rows to int4 or int8, packed to bytes (PinFM section 7).

A packed row of width E is its codes, then its scale, then its bias, with nothing between:

  storage  codes                                                    scale    bias     bytes    at E = 32
  int4     E / 2 bytes; byte i holds value 2i (low nibble), 2i + 1  float16  float16  E/2 + 4  20: 31.25 % of fp16
  int8     E bytes                                                  float16  float16  E + 4    36: 56.25 % of fp16
  float32  4 E bytes, the values themselves                         -        -        4 E      128

Numbers are little-endian; value = bias + scale * code. Codes are chosen against the rounded scale and bias, so the
rounding to float16 adds no error of its own.

Plain min-max spends levels on a row's extremes. With `clip`, scale and bias are those of a search for the least squared
error (`serve.clip`); the bytes mean the same, so no reader knows the difference.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.serve.clip import fitted_constants

STORAGES = ('int4', 'int8', 'float32')
_LEVELS = {'int4': 15, 'int8': 255}
_LARGEST_HALF = 65504.0
_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class PackedRows:
  """A table that is packed already, as a bundle holds it; what can be a table's rows can also be this.

  Attributes:
    parts: consecutive parts, uint8 [rows, row_bytes].
    storage: how they are packed.
  """

  parts: Iterable[np.ndarray]
  storage: str


def row_bytes(width: int, storage: str) -> int:
  """Bytes of a packed row.

  Args:
    width: E, values of a row; even for int4.
    storage: 'int4', 'int8' or 'float32'.

  Raises:
    UserError: an unknown storage, or an odd width for int4.
  """
  if storage not in STORAGES:
    raise UserError(f"got the table storage '{storage}', expected one of {', '.join(STORAGES)}: set serve.storage")
  if storage == 'int4' and width % 2:
    raise UserError(f'got tables of width {width}, but int4 packs two values a byte: set serve.storage=int8')
  return {'int4': width // 2 + 4, 'int8': width + 4, 'float32': 4 * width}[storage]


def quantise(rows_GE: np.ndarray, storage: str, clip: bool = False) -> np.ndarray:
  """Packs rows; holds a few copies of them, so give a large table in parts (`quantise_parts`).

  Args:
    rows_GE: float rows, or bf16 ones as uint16 bits.
    storage: 'int4', 'int8' or 'float32'.
    clip: search each row's scale and bias for the least squared error; float32 has none to search.

  Returns:
    uint8 [G, row_bytes].

  Raises:
    UserError: a value is NaN, infinite or too large for float16, or the storage does not fit the width.
  """
  size = row_bytes(rows_GE.shape[1], storage)
  rows_GE = np.ascontiguousarray(as_float32(rows_GE), '<f4')
  largest = np.finfo(np.float32).max if storage == 'float32' else _LARGEST_HALF
  if not (np.abs(rows_GE) <= largest).all():  # NaN compares false
    raise UserError(
      f'got table rows with NaN or values beyond {largest:g}, expected finite ones: the training diverged, lower its '
      'table_learning_rate and run it again'
    )
  if storage == 'float32':
    return rows_GE.view(np.uint8).reshape(-1, size)
  levels = _LEVELS[storage]
  if clip:
    scale_G1, bias_G1 = fitted_constants(rows_GE, levels)
  else:
    low_G1 = rows_GE.min(axis=1, keepdims=True)
    bias_G1 = low_G1.astype('<f2')
    scale_G1 = ((rows_GE.max(axis=1, keepdims=True) - low_G1) / levels).astype('<f2')
  step_G1 = np.where(scale_G1 > 0, scale_G1, 1).astype(np.float32)  # scale 0: a constant row, whatever its codes
  codes_GE = np.clip(np.rint((rows_GE - bias_G1) / step_G1), 0, levels).astype(np.uint8)
  if storage == 'int4':
    codes_GE = codes_GE[:, 0::2] | codes_GE[:, 1::2] << 4
  return np.concatenate([codes_GE, scale_G1.view(np.uint8), bias_G1.view(np.uint8)], axis=1)


def as_float32(rows_GE: np.ndarray) -> np.ndarray:
  """Table rows as float32, whatever they are stored in: bf16 is kept as its bits, uint16."""
  if rows_GE.dtype == np.uint16:
    rows_GE = rows_GE.view(ml_dtypes.bfloat16)
  return rows_GE.astype(np.float32, copy=False)


def quantise_parts(
  rows_GE: np.ndarray | jax.Array | Iterable[np.ndarray] | PackedRows, storage: str, clip: bool = False
) -> Iterator[np.ndarray]:
  """Packs a table part by part, so that memory stays bounded.

  Args:
    rows_GE: a whole table (host or device), its consecutive parts, or packed rows, which pass as they are if they are
      packed that way (packing again what was rounded once could round otherwise).
    storage: 'int4', 'int8' or 'float32'.
    clip: see `quantise`.

  Yields:
    uint8 [rows of the part, row_bytes].
  """
  if isinstance(rows_GE, PackedRows):
    for packed in rows_GE.parts:
      yield packed if rows_GE.storage == storage else quantise(dequantise(packed, rows_GE.storage), storage, clip)
    return
  parts = _parts(rows_GE) if hasattr(rows_GE, 'shape') else rows_GE
  for part in parts:
    yield quantise(np.asarray(part), storage, clip)


def dequantise(packed: np.ndarray, storage: str) -> np.ndarray:
  """Unpacks rows on the host.

  Args:
    packed: uint8 [..., row_bytes].
    storage: how they were packed.

  Returns:
    float32 [..., E].
  """
  if storage == 'float32':
    return np.ascontiguousarray(packed).view('<f4')
  codes, constants = packed[..., :-4], np.ascontiguousarray(packed[..., -4:]).view('<f2').astype(np.float32)
  if storage == 'int4':
    codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], 2 * codes.shape[-1])
  return constants[..., 1:] + constants[..., :1] * codes.astype(np.float32)


def dequantise_on_device(packed: jax.Array, width: int, storage: str) -> jax.Array:
  """`dequantise` inside a compiled program.

  Args:
    packed: uint8 [..., row_bytes]; leading sizes may be symbolic.
    width: E.
    storage: how they were packed.

  Returns:
    float32 [..., E].
  """
  leading = packed.shape[:-1]
  if storage == 'float32':
    return _from_bytes(packed.reshape(*leading, width, 4), jnp.uint32, jnp.float32)
  codes = packed[..., :-4]
  if storage == 'int4':
    codes = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*leading, width)
  constants = _from_bytes(packed[..., -4:].reshape(*leading, 2, 2), jnp.uint16, jnp.float16).astype(jnp.float32)
  return constants[..., 1:] + constants[..., :1] * codes.astype(jnp.float32)


def _parts(rows_GE: np.ndarray | jax.Array) -> Iterator[np.ndarray]:
  for start in range(0, rows_GE.shape[0], _CHUNK_ROWS):
    yield rows_GE[start : start + _CHUNK_ROWS]


def _from_bytes(octets: jax.Array, word: jnp.dtype, kind: jnp.dtype) -> jax.Array:
  """Little-endian bytes [..., n] -> numbers [...]; a bitcast that changes the rank cannot have symbolic sizes."""
  shifts = 8 * jnp.arange(octets.shape[-1], dtype=word)
  return jax.lax.bitcast_convert_type(jnp.sum(octets.astype(word) << shifts, axis=-1, dtype=word), kind)
