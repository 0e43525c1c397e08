"""Reads the item tables of a bundle with NumPy alone: one file to copy for those who serve in PyTorch, C++ or Rust.

  reader = TableReader('bundles/quickstart')
  vectors = reader.vectors(['pin/7', 'pin/8'])  # float32 [2, S * E]

It imports nothing of pinfm_jax and no JAX. What follows is all that a reader in another language needs.

**Files.** `manifest.json` (UTF-8 JSON) has, under "tables": storage ("int4", "int8" or "float32"), sub_tables S,
rows R, width E, row_bytes, hash_seed. Under "id_type", "item" is "integer" or "string". `tables.bin` holds S * R packed
rows of row_bytes bytes, nothing before, between or behind them: sub-table s has the rows s * R to (s + 1) * R - 1.
All numbers are little-endian.

**From an id to its key** (unsigned 64-bit). An integer -2^63 <= id < 2^63: its two's complement, id mod 2^64. A string:
BLAKE2b with an 8-byte digest, no key, no salt, of its UTF-8 bytes; the digest read as a little-endian number.

**From a key to its S rows.** With hash_seed -1 nothing is hashed, row[s] = s * R + min(key, R - 1). With any other, as
below. All arithmetic is unsigned; u32 wraps at 2^32, u64 at 2^64.

  u32 mix(u32 h) { h ^= h >> 16; h *= 0x85EBCA6B; h ^= h >> 13; h *= 0xC2B2AE35; return h ^ (h >> 16); }

  u32 low = key, high = key >> 32;
  for (u64 s = 0; s < S; ++s) {
    u64 salt = s + 1 + (u64)(u32)hash_seed * 1000003;
    u32 a = mix(low ^ (u32)(salt * 0x9E3779B9));
    u32 b = mix(high ^ (u32)(salt * 0xC2B2AE3D) ^ a);
    a = mix(a + b * 0x9E3779B9);
    row[s] = s * R + (((u64)a * R + ((u64)b * R >> 32)) >> 32);
  }

**A packed row.** int4: E / 2 bytes of codes, byte i has value 2i in the low four bits, 2i + 1 in the high four.
int8: E bytes of codes. Then, for both, float16 scale and float16 bias; value = bias + scale * code, in float32.
float32: E float32, no scale and bias. The item's vector is its S rows one after another, S * E values.

**Check yourself.** "golden" in the manifest lists ids, each with the "key" (hexadecimal text) and the "rows" that the
above must give. An example, S = 2, R = 50, hash_seed = 3:

  >>> hex(id_key('pin/7'))
  '0x8b1f69b41d74e8af'
  >>> hash_rows(np.array([id_key('pin/7')], np.uint64), 2, 50, 3).tolist()
  [[20, 86]]

and a packed int4 row of four values with the codes 0, 3, 15, 0, the scale 1 and the bias 2:

  >>> unpack(np.array([0x30, 0x0F, 0x00, 0x3C, 0x00, 0x40], np.uint8), 'int4').tolist()
  [2.0, 5.0, 17.0, 2.0]
"""

import hashlib
import json
import operator
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FORMAT = 'pinfm-bundle'
VERSIONS = (1, 2)  # of the bundle; the tables are the same in both
_LOW = np.uint64(0xFFFFFFFF)


class TableReader:
  """The item tables of a bundle, memory-mapped: only the pages of the rows that are read take memory."""

  def __init__(self, bundle: str | Path):
    """Opens the tables and checks that this file hashes ids as the bundle says.

    Args:
      bundle: its directory; manifest.json and tables.bin are needed.

    Raises:
      FileNotFoundError: one of them is not there.
      ValueError: no bundle or one of an unknown version, one without tables, or files that do not fit each other.
    """
    directory = Path(bundle)
    manifest = json.loads((directory / 'manifest.json').read_text(encoding='utf-8'))
    if manifest.get('format') != FORMAT or manifest.get('format_version') not in VERSIONS:
      found = f'{manifest.get("format")!r}, version {manifest.get("format_version")!r}'
      raise ValueError(f'{directory}: got the format {found}, expected {FORMAT!r}, version {VERSIONS}')
    tables = manifest['tables']
    if tables is None:
      raise ValueError(f'{directory} has no tables: its ranker is without PinFM')
    self.storage, self.width, self.id_type = tables['storage'], tables['width'], manifest['id_type']['item']
    self.sub_tables, self.rows, self.hash_seed = tables['sub_tables'], tables['rows'], tables['hash_seed']
    self.path, total, size = directory / 'tables.bin', self.sub_tables * self.rows, tables['row_bytes']
    if self.path.stat().st_size != total * size:
      raise ValueError(f'{self.path} has {self.path.stat().st_size} bytes, expected {total} rows of {size}')
    self._sha256 = next(file['sha256'] for file in manifest['files'] if file['name'] == 'tables.bin')
    self._packed = np.asarray(np.memmap(self.path, np.uint8, 'r', shape=(total, size)))
    for golden in manifest['golden']:
      keys = self.keys([golden['id']])
      if int(keys[0]) != int(golden['key'], 16) or self.row_numbers(keys)[0].tolist() != golden['rows']:
        raise ValueError(f'{directory}: the id {golden["id"]!r} hashes to other rows than the bundle says')

  @property
  def vector_width(self) -> int:
    """Width of an item's vector, S * E."""
    return self.sub_tables * self.width

  def vectors(self, ids: Sequence[int | str]) -> np.ndarray:
    """Item vectors.

    Args:
      ids: integers or strings, as in the training data; any id has a vector, whether training saw it or not.

    Returns:
      float32 [n, S * E].

    Raises:
      ValueError: an id does not fit the bundle's type of ids.
    """
    return self.vectors_of_keys(self.keys(ids))

  def vectors_of_keys(self, keys: np.ndarray) -> np.ndarray:
    """Item vectors of 64-bit keys: uint64 [n] -> float32 [n, S * E]."""
    rows = unpack(self._packed.take(self.row_numbers(keys), axis=0), self.storage)
    return rows.reshape(len(keys), self.vector_width)

  def keys(self, ids: Sequence[int | str]) -> np.ndarray:
    """The 64-bit keys of ids: uint64 [n].

    Raises:
      ValueError: an id does not fit the bundle's type of ids.
    """
    text = self.id_type == 'string'
    if isinstance(ids, np.ndarray) and not text and ids.dtype.kind == 'i':
      return ids.astype(np.int64).view(np.uint64)
    try:
      return np.array([id_key(_text(value) if text else _integer(value)) for value in ids], np.uint64)
    except TypeError as error:
      raise ValueError(f'got an id that is no {self.id_type} ({error})') from None

  def row_numbers(self, keys: np.ndarray) -> np.ndarray:
    """Numbers of the S rows of each key: uint64 [n] -> int64 [n, S]."""
    return hash_rows(keys, self.sub_tables, self.rows, self.hash_seed)

  def verify(self) -> None:
    """Reads the whole of tables.bin and compares its SHA-256 with the manifest's.

    Raises:
      ValueError: it differs.
    """
    with open(self.path, 'rb') as file:
      if hashlib.file_digest(file, 'sha256').hexdigest() != self._sha256:
        raise ValueError(f'{self.path} is damaged: copy the bundle again')


def id_key(value: int | str) -> int:
  """The 64-bit key of an id: of an integer, or of a string.

  Raises:
    ValueError: an integer beyond 64 bits, or a string that is empty or longer than 512 bytes.
  """
  if isinstance(value, str):
    if not 1 <= len(value.encode()) <= 512:
      raise ValueError(f'got an id of {len(value.encode())} bytes, expected 1 to 512')
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), 'little')
  if not -(1 << 63) <= value < 1 << 63:
    raise ValueError(f'got the id {value}, expected a 64-bit integer')
  return value % (1 << 64)


def hash_rows(keys: np.ndarray, sub_tables: int, rows: int, seed: int = 0) -> np.ndarray:
  """Numbers of the rows of each key, counted over all sub-tables: uint64 [n] -> int64 [n, S]."""
  keys = np.asarray(keys, np.uint64)[:, None]
  sub_table = np.arange(sub_tables, dtype=np.uint64)
  if seed == -1:  # exact rows
    return (np.minimum(keys, np.uint64(rows - 1)) + sub_table * np.uint64(rows)).astype(np.int64)
  low, high = keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)
  salt = sub_table + np.uint64(1) + np.uint64((seed & 0xFFFFFFFF) * 1_000_003)
  a = _mix(low ^ (salt * np.uint64(0x9E3779B9) & _LOW).astype(np.uint32))
  b = _mix(high ^ (salt * np.uint64(0xC2B2AE3D) & _LOW).astype(np.uint32) ^ a)
  a = _mix(a + b * np.uint32(0x9E3779B9)).astype(np.uint64)
  carry = b.astype(np.uint64) * np.uint64(rows) >> np.uint64(32)
  return ((a * np.uint64(rows) + carry >> np.uint64(32)) + sub_table * np.uint64(rows)).astype(np.int64)


def unpack(packed: np.ndarray, storage: str) -> np.ndarray:
  """Packed rows as numbers: uint8 [..., row_bytes] -> float32 [..., E].

  Raises:
    ValueError: an unknown storage.
  """
  if storage == 'float32':
    return np.ascontiguousarray(packed).view('<f4').astype(np.float32)
  if storage not in ('int4', 'int8'):
    raise ValueError(f'got the storage {storage!r}, expected int4, int8 or float32')
  codes, constants = packed[..., :-4], np.ascontiguousarray(packed[..., -4:]).view('<f2').astype(np.float32)
  if storage == 'int4':
    codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], 2 * codes.shape[-1])
  return constants[..., 1:] + constants[..., :1] * codes.astype(np.float32)


def _text(value: object) -> str:
  if not isinstance(value, str):
    raise ValueError(f'got the id {value!r}, expected a string')
  return str(value)


def _integer(value: object) -> int:
  if isinstance(value, str) and re.fullmatch('-?[0-9]{1,19}', value):
    return int(value)
  if isinstance(value, str | bool):
    raise ValueError(f'got the id {value!r}, expected an integer')
  return operator.index(value)  # which refuses 1.5


def _mix(h: np.ndarray) -> np.ndarray:
  h = h ^ (h >> np.uint32(16))
  h = h * np.uint32(0x85EBCA6B)
  h = h ^ (h >> np.uint32(13))
  h = h * np.uint32(0xC2B2AE35)
  return h ^ (h >> np.uint32(16))
