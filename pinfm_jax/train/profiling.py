"""A profiler trace of a window of training steps (`pinfm run FILE --profile 20:25`)."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from pinfm_jax.errors import UserError


@dataclass(frozen=True)
class Window:
  """The steps first to last, both included, counted from 1 as in metrics.jsonl."""

  first: int
  last: int

  @classmethod
  def parse(cls, text: str) -> 'Window':
    """Reads '20:25'.

    Raises:
      UserError: it is no window.
    """
    match = re.fullmatch(r'(\d{1,9}):(\d{1,9})', text)
    window = cls(*(int(part) for part in match.groups())) if match else cls(0, 0)
    if not 1 <= window.first <= window.last:
      raise UserError(f"--profile is '{text}'; expected FIRST:LAST steps, counted from 1, for example 20:25")
    return window


class Tracer:
  """Traces the window's steps of one training run; does nothing without a window, or where the run has passed it."""

  def __init__(self, window: Window | None, directory: Path, label: str, steps: range):
    """Says at once if no step of the window will run.

    Args:
      window: what to trace.
      directory: of the training run; the trace goes to its folder profile/.
      label: of the run, for messages.
      steps: the steps that will run, counted from 1.
    """
    self._window, self._directory, self._open = window, directory / 'profile', False
    if window and window.first not in steps:
      print(f'{label}: no trace, step {window.first} is not among those that run ({steps.start} to {steps.stop - 1})')
      self._window = None

  def before(self, step: int) -> None:
    """Call it before a step is dispatched."""
    if self._window and step == self._window.first:
      jax.profiler.start_trace(self._directory)
      self._open = True

  def after(self, step: int, result: Any) -> None:
    """Call it with the step's result; at the window's end it waits for the result."""
    if self._open and step == self._window.last:
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    """Ends an open trace: at the window's end, at the run's, or when the run breaks off."""
    if self._open:
      self._open = False
      jax.profiler.stop_trace()
      print(
        f'trace of steps {self._window.first} to {self._window.last}: {self._directory}; open its .xplane.pb in XProf '
        f'(pip install xprof; xprof --logdir {self._directory}), or its trace.json.gz at https://ui.perfetto.dev'
      )
