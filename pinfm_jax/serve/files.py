"""Directories and files that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pinfm_jax.errors import UserError


@contextmanager
def complete_directory(
  out: Path, overwrite: bool, marker: str = 'manifest.json', kind: str = 'bundle'
) -> Iterator[Path]:
  """A new directory beside `out` that takes its place when the block ends without an error.

  Args:
    out: the directory to make.
    overwrite: replace one that holds the file `marker`.
    marker: see overwrite.
    kind: names it in messages.

  Raises:
    UserError: `out` exists and may not be replaced, or it cannot be made.
  """
  out = out.resolve()  # a link stays, and what it leads to is replaced
  occupied = out.exists() and not (out.is_dir() and not any(out.iterdir()))
  if occupied and not overwrite:
    raise UserError(f'{out} exists already; give another --out, or --overwrite')
  if occupied and not (out / marker).is_file():
    raise UserError(f'{out} exists and is no {kind}, so it is not replaced; give another --out')
  partial, replaced = (out.with_name(f'{out.name}.{word}-{os.getpid()}') for word in ('partial', 'replaced'))
  shutil.rmtree(partial, ignore_errors=True)
  try:
    partial.mkdir(parents=True)
  except OSError as error:
    raise UserError(f'{out} cannot be made ({error.strerror}); give another --out') from error
  try:
    yield partial
    if occupied:
      os.rename(out, replaced)
    os.rename(partial, out)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    if replaced.exists() and not out.exists():
      os.rename(replaced, out)
    raise
  shutil.rmtree(replaced, ignore_errors=True)


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
