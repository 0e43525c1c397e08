"""Checksums of a bundle's files: SHA-256 of each, and a digest a MiB of the tables, so that they can be sampled."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pinfm_jax.data.info import file_sha256
from pinfm_jax.errors import UserError
from pinfm_jax.serve.manifest import FileEntry

BLOCK = 1 << 20
DIGEST = 8  # bytes of BLAKE2b a block
_SAMPLED_BLOCKS = 128
_TOGETHER = 16  # blocks that are hashed side by side


class Describer:
  """Describes a file while its bytes pass by; the two checksums are computed in threads, side by side."""

  def __init__(self):
    self._whole, self._blocks, self._rest, self._size = hashlib.sha256(), [], bytearray(), 0
    self._pool = ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0))))  # hashing runs without Python's lock

  def update(self, content: bytes | memoryview) -> None:
    """Takes the next bytes."""
    self._size += len(content)
    self._rest += content
    if len(self._rest) >= _TOGETHER * BLOCK:
      self._digest(len(self._rest) // BLOCK * BLOCK)

  def finish(self, name: str) -> tuple[FileEntry, bytes]:
    """The entry of the file, and the digests of its blocks one after another (8 bytes of BLAKE2b a MiB)."""
    self._digest(len(self._rest))
    self._pool.shutdown()
    return FileEntry(name, self._size, self._whole.hexdigest()), b''.join(self._blocks)

  def _digest(self, size: int) -> None:
    with memoryview(self._rest) as rest, rest[:size] as ready:
      whole = self._pool.submit(self._whole.update, ready)
      self._blocks += self._pool.map(lambda start: _digest(ready[start : start + BLOCK]), range(0, size, BLOCK))
      whole.result()
    del self._rest[:size]


def describe(directory: Path, name: str) -> tuple[FileEntry, bytes]:
  """Reads a file once; returns what `Describer.finish` does."""
  describer = Describer()
  with open(directory / name, 'rb') as file:
    while block := file.read(BLOCK):
      describer.update(block)
  return describer.finish(name)


def check_size(directory: Path, entry: FileEntry) -> None:
  """Raises UserError unless the file is there with the stated size."""
  path = directory / entry.name
  if not path.is_file():
    raise UserError(f'{path} is missing: copy the bundle again or export it again')
  size = path.stat().st_size
  if size != entry.bytes:
    raise UserError(f'{path} has {size} bytes, expected {entry.bytes}: copy the bundle again or export it again')


def check_whole(directory: Path, entry: FileEntry) -> None:
  """Raises UserError unless the file has the stated SHA-256."""
  found = file_sha256(directory / entry.name)
  if found != entry.sha256:
    raise UserError(
      f'{directory / entry.name} is damaged: its SHA-256 is {found[:16]}.., expected {entry.sha256[:16]}..; '
      'copy the bundle again or export it again'
    )


def check_sample(directory: Path, entry: FileEntry, digests: bytes) -> None:
  """Compares some blocks of a file, other ones at each call, with their digests.

  Raises:
    UserError: a block differs.
  """
  blocks = len(digests) // DIGEST
  chosen = np.random.default_rng().choice(blocks, min(blocks, _SAMPLED_BLOCKS), replace=False)
  with open(directory / entry.name, 'rb') as file:
    for block in sorted(chosen.tolist()):
      file.seek(block * BLOCK)
      if _digest(file.read(BLOCK)) != digests[block * DIGEST : (block + 1) * DIGEST]:
        raise UserError(
          f'{directory / entry.name} is damaged in its MiB {block}; copy the bundle again or export it again'
        )


def _digest(block: bytes | memoryview) -> bytes:
  return hashlib.blake2b(block, digest_size=DIGEST).digest()
