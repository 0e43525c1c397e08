"""Checksums of a bundle's files: SHA-256 of each, and a digest a MiB of the tables, so that they can be sampled."""

import hashlib
from pathlib import Path

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.serve.manifest import FileEntry

BLOCK = 1 << 20
DIGEST = 8  # bytes of BLAKE2b a block
_SAMPLED_BLOCKS = 128


class Describer:
  """Describes a file while its bytes pass by."""

  def __init__(self):
    self._whole, self._blocks, self._rest, self._size = hashlib.sha256(), [], b'', 0

  def update(self, content: bytes | memoryview) -> None:
    """Takes the next bytes."""
    self._whole.update(content)
    self._size += len(content)
    self._rest += bytes(content)
    whole = len(self._rest) // BLOCK * BLOCK
    self._blocks += [_digest(self._rest[start : start + BLOCK]) for start in range(0, whole, BLOCK)]
    self._rest = self._rest[whole:]

  def finish(self, name: str) -> tuple[FileEntry, bytes]:
    """The entry of the file, and the digests of its blocks one after another (8 bytes of BLAKE2b a MiB)."""
    last = [_digest(self._rest)] if self._rest else []
    return FileEntry(name, self._size, self._whole.hexdigest()), b''.join(self._blocks + last)


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
  with open(directory / entry.name, 'rb') as file:
    found = hashlib.file_digest(file, 'sha256').hexdigest()
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


def _digest(block: bytes) -> bytes:
  return hashlib.blake2b(block, digest_size=DIGEST).digest()
