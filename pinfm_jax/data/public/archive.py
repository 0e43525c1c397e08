"""Unpacks zip and tar archives from elsewhere without letting them write outside their directory."""

import gzip
import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from pinfm_jax.errors import UserError

_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, EOFError)


def is_archive(name: str) -> bool:
  """Whether `unpack` takes a file of this name."""
  return name.endswith(('.zip', '.tar', '.tar.gz', '.tgz', '.tar.xz', '.tar.bz2'))


def unpack(archive: Path, directory: Path) -> list[str]:
  """Unpacks an archive; all of it or nothing appears in `directory`.

  Links and devices are left out; a member that would land outside the directory refuses the whole archive.

  Args:
    archive: a zip, or a tar with any of the usual compressions.
    directory: where to; existing entries of the same name are replaced.

  Returns:
    The names of the entries at the top, sorted.

  Raises:
    UserError: damaged, or with a path that leads outside.
  """
  directory.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix='.unpacking-', dir=directory) as name:
    scratch = Path(name)
    try:
      for member, source in _members(archive):
        target = scratch / _safe(member, archive)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open('wb') as file:
          shutil.copyfileobj(source, file, 1 << 20)
    except _DAMAGE as error:
      raise _damaged(archive, error) from None
    entries = sorted(path.name for path in scratch.iterdir())
    for entry in entries:
      _replace(scratch / entry, directory / entry)
  return entries


def check_gzip(path: Path) -> None:
  """Reads a gzip file to its end, which checks its CRC and length.

  Raises:
    UserError: damaged.
  """
  try:
    with gzip.open(path) as file:
      while file.read(1 << 20):
        pass
  except _DAMAGE as error:
    raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
  return UserError(f'{path}: damaged or cut short ({error}); run the download again')


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
  """Name and content of every regular file."""
  if archive.name.endswith('.zip'):
    with zipfile.ZipFile(archive) as bundle:
      for info in bundle.infolist():
        if not info.is_dir():
          with bundle.open(info) as source:
            yield info.filename, source
    return
  with tarfile.open(archive) as bundle:
    for info in bundle:
      source = bundle.extractfile(info) if info.isreg() else None
      if source is not None:
        yield info.name, source


def _safe(member: str, archive: Path) -> PurePosixPath:
  path = PurePosixPath(member.replace('\\', '/'))
  if path.is_absolute() or '..' in path.parts or not path.parts or ':' in path.parts[0]:
    raise UserError(f'{archive}: the member {member!r} leads outside the archive; it is not safe to unpack')
  return path


def _replace(source: Path, target: Path) -> None:
  if target.is_dir() and not target.is_symlink():
    shutil.rmtree(target)
  source.replace(target)
