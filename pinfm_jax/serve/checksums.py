"""Checksums of a bundle's files: SHA-256 of each, and a digest a MiB of the tables, so that they can be sampled."""

import hashlib
from pathlib import Path

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.serve.manifest import FileEntry

BLOCK = 1 << 20
_DIGEST = 8  # bytes of BLAKE2b a block
_SAMPLED_BLOCKS = 128


def describe(directory: Path, name: str) -> tuple[FileEntry, bytes]:
  """Reads a file once.

  Returns:
    Its entry, and the digests of its blocks one after another (8 bytes of BLAKE2b a MiB).
  """
  whole, blocks, size = hashlib.sha256(), [], 0
  with open(directory / name, 'rb') as file:
    while block := file.read(BLOCK):
      whole.update(block)
      blocks.append(_digest(block))
      size += len(block)
  return FileEntry(name, size, whole.hexdigest()), b''.join(blocks)


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
  blocks = len(digests) // _DIGEST
  chosen = np.random.default_rng().choice(blocks, min(blocks, _SAMPLED_BLOCKS), replace=False)
  with open(directory / entry.name, 'rb') as file:
    for block in sorted(chosen.tolist()):
      file.seek(block * BLOCK)
      if _digest(file.read(BLOCK)) != digests[block * _DIGEST : (block + 1) * _DIGEST]:
        raise UserError(
          f'{directory / entry.name} is damaged in its MiB {block}; copy the bundle again or export it again'
        )


def _digest(block: bytes) -> bytes:
  return hashlib.blake2b(block, digest_size=_DIGEST).digest()
