"""Directories and files that appear whole or not at all."""

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pinfm_jax.errors import UserError


@contextmanager
def complete_directory(
  out: Path, overwrite: bool, marker: str = 'manifest.json', kind: str = 'bundle'
) -> Iterator[Path]:
  """A new directory beside `out` that takes its place when the block ends without an error, and else vanishes.

  What a killed process left behind is put right by the next one: a process holds a lock on its own while it lives.

  Args:
    out: the directory to make; of a link, what it leads to.
    overwrite: replace one that holds the file `marker`.
    marker: see overwrite.
    kind: names it in messages.

  Raises:
    UserError: `out` exists and may not be replaced, or it cannot be made.
  """
  out = out.resolve()
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    _recover(out)
    _check_free(out, overwrite, marker, kind)
    partial, lock = _locked_partial(out)
  except OSError as error:
    raise UserError(f'{out} cannot be made ({error.strerror}); give another place') from error
  try:
    yield partial
    _check_free(out, overwrite, marker, kind)  # it may have come meanwhile
    _take_place(partial, out)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  finally:
    os.close(lock)


def _is_free(out: Path) -> bool:
  return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def _check_free(out: Path, overwrite: bool, marker: str, kind: str) -> None:
  if _is_free(out):
    return
  if not overwrite:
    raise UserError(f'{out} exists already; give another place, or --overwrite')
  if not (out / marker).is_file():
    raise UserError(f'{out} exists and is no {kind}, so it is not replaced; give another place')


def _locked_partial(out: Path) -> tuple[Path, int]:
  while True:
    partial = out.with_name(f'{out.name}.partial-{uuid.uuid4().hex[:8]}')
    partial.mkdir()
    lock = _lock(partial)
    if lock is not None and partial.exists():  # else another process took it for a dead one's, before it was locked
      return partial, lock


def _lock(directory: Path) -> int | None:
  """Locks a directory until the descriptor is closed; None if it is gone, or a living process has it."""
  try:
    lock = os.open(directory, os.O_RDONLY)
  except FileNotFoundError:
    return None
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(lock)
    return None
  return lock


def _take_place(partial: Path, out: Path) -> None:
  replaced = partial.with_name(f'{partial.name}.old')
  try:
    if out.exists():
      os.rename(out, replaced)
    os.rename(partial, out)
  except BaseException:
    if replaced.exists() and not out.exists():
      os.rename(replaced, out)
    raise
  shutil.rmtree(replaced, ignore_errors=True)


def _recover(out: Path) -> None:
  """Removes what dead processes left beside `out`, and puts back what one had moved away before it could replace it."""
  ours = re.compile(re.escape(out.name) + r'\.partial-[0-9a-f]{8}(\.old)?')
  for left in sorted(path for path in out.parent.iterdir() if path.is_dir() and ours.fullmatch(path.name)):
    moved = left.suffix == '.old'
    writer = left.with_suffix('') if moved else left  # what its process holds the lock of
    lock = _lock(writer)
    if lock is None and writer.exists():
      continue
    if moved and _is_free(out):
      os.rename(left, out)
    else:
      shutil.rmtree(left, ignore_errors=True)
    if lock is not None:
      os.close(lock)


@contextmanager
def complete_file(out: Path, source: Path) -> Iterator[Path]:
  """A path beside `out` whose file takes its place when the block ends without an error.

  A link's target is replaced, not the link; what is no plain file (a pipe, /dev/null) is written to as it is.

  Args:
    out: the file to make.
    source: what is read meanwhile, and so must be another file.

  Raises:
    UserError: `out` cannot be written.
  """
  if out.is_dir() or not out.absolute().parent.is_dir():
    raise UserError(f'{out} cannot be written: expected the name of a file in a directory that exists')
  if out.exists() and source.exists() and out.samefile(source):
    raise UserError(f'{out} holds the input; give another --out')
  out = out.resolve()
  plain = out.is_file() or not out.exists()
  partial = out.with_name(f'{out.name}.partial-{os.getpid()}') if plain else out
  try:
    yield partial
    if plain:
      os.replace(partial, out)
  except OSError as error:
    raise UserError(f'{out} cannot be written ({error.strerror}); give another --out') from error
  finally:
    if plain:
      partial.unlink(missing_ok=True)
