"""Reads a checkpoint in one process of several, which Orbax does in all of them together unless it is told."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from pinfm_jax.errors import UserError

_done = False


@contextmanager
def reading_alone() -> Iterator[None]:
  """Within it, Orbax reads without waiting for other processes; use its functions, a `Checkpointer` would wait.

  Do it once all have trained: Orbax numbers its operations in each process, so after one that was not common the
  processes can write no checkpoint together. Orbax would hang; `check_together` says so.
  """
  global _done
  context, here = ocp.Context(), jax.process_index()
  if jax.process_count() > 1:
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = here, {here}
    context.multiprocessing.barrier_sync_key_prefix = f'alone{here}'
    _done = True
  with context:
    yield


def check_together() -> None:
  """Call it before processes save or restore together.

  Raises:
    RuntimeError: this one has read a checkpoint alone.
  """
  if _done:
    raise RuntimeError('this process has read a checkpoint alone (reading_alone): start new processes to train again')


def newest(directory: Path) -> Path:
  """The newest checkpoint in a directory.

  Raises:
    UserError: there is none.
  """
  steps = [int(path.name) for path in Path(directory).glob('[0-9]*') if path.name.isdigit()]
  if not steps:
    raise UserError(f'{directory} has no checkpoints; run the stage that trains it first')
  return Path(directory).absolute() / str(max(steps))
