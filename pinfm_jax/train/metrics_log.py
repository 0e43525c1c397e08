"""What a training run tells: metrics.jsonl, TensorBoard when installed, the progress line, and a loss that broke."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from pinfm_jax.errors import UserError
from pinfm_jax.progress import Progress
from pinfm_jax.train.distributed import is_first

_SCORE = 'eval/score'


class MetricsLog:
  """Takes the figures of every step, one step late, and writes those of every `log_every`-th; process 0 writes."""

  def __init__(self, directory: Path, label: str, steps: int, examples: int, log_every: int, first: int):
    """Opens the log.

    Args:
      directory: of the run; metrics.jsonl lies there.
      label: of the progress line and of errors.
      steps: of the whole run.
      examples: of the global batch.
      log_every: steps between lines.
      first: steps done before; later lines of an earlier attempt are dropped.
    """
    self._label, self._steps, self._examples, self._log_every = label, steps, examples, log_every
    self._path, self._writes = directory / 'metrics.jsonl', is_first()
    if self._writes:
      directory.mkdir(parents=True, exist_ok=True)
      _drop_after(self._path, first)
    self._progress = Progress(label, steps * examples, 'examples')
    self._progress.start_at(first * examples)
    self._waited = self._wait_share = 0.0
    self._since, self._since_step = time.monotonic(), first
    self._board = _tensorboard(directory) if self._writes else None
    self._first = self._done = first
    self._saved = first if first else None
    self._bad_gradient: int | None = None

  def waited(self, seconds: float) -> None:
    """Counts time spent waiting for data."""
    self._waited += seconds

  def read(self, step: int, figures: Mapping[str, jax.Array]) -> None:
    """Takes the figures of a step that has been dispatched, and waits for them.

    Raises:
      UserError: the loss is not finite; the steps and the checkpoint that is kept are named.
    """
    loss = float(figures['loss'])
    if not math.isfinite(loss):
      raise UserError(self._broken(f'the loss became {loss} at step {step}', step))
    if self._bad_gradient is None and not math.isfinite(float(figures.get('grad_norm', 0.0))):
      self._bad_gradient = step
    self._done = step
    now = time.monotonic()
    if step % self._log_every == 0 or step == self._steps:
      elapsed, steps = max(now - self._since, 1e-9), step - self._since_step
      row = {name: float(value) for name, value in figures.items()}
      row['examples_per_s'] = steps * self._examples / elapsed
      row['data_wait_share'] = self._wait_share = self._waited / elapsed
      self._write(step, row)
      self._since, self._since_step, self._waited = now, step, 0.0
    note = f'loss {loss:.4f}  waiting for data {100 * self._wait_share:.0f} %'
    self._progress.update(step * self._examples, note)

  def measured(self, step: int, figures: Mapping[str, float], score: float) -> None:
    """Writes figures of what does not train, as eval/..., and the one by which the best state is found (the lowest).

    Raises:
      UserError: that one is not finite.
    """
    if not math.isfinite(score):
      raise UserError(self._broken(f'the held-out loss became {score} at step {step}', step))
    score_beside = {} if figures.get('loss') == score else {_SCORE: score}
    self._write(step, {f'eval/{name}': value for name, value in figures.items()} | score_beside)

  def measured_before(self) -> list[float]:
    """The scores of earlier attempts' measurements that still stand, in order."""
    if not self._path.exists():
      return []
    rows = [json.loads(line) for line in self._path.read_text().splitlines()]
    return [row.get(_SCORE, row.get('eval/loss')) for row in rows if _SCORE in row or 'eval/loss' in row]

  def note(self, text: str) -> None:
    """Says something about the run; process 0 prints."""
    if self._writes:
      print(f'{self._label}: {text}', flush=True)

  def paused(self, seconds: float) -> None:
    """Leaves time spent on measuring and saving out of the training rate."""
    self._since += seconds

  def saved(self, step: int) -> None:
    """Notes a checkpoint."""
    self._saved = step

  def refuse(self, step: int, name: str) -> None:
    """The state after `step` is not finite, though the losses up to it were.

    Raises:
      UserError: always.
    """
    raise UserError(self._broken(f'{name} holds NaN or infinity after step {step}, whose loss was still finite', step))

  def close(self, finished: bool) -> None:
    """Prints the closing line of a run that did something, and closes the files."""
    if finished and self._done > self._first:
      self._progress.update(self._done * self._examples)
      self._progress.close()
    if self._board:
      self._board.close()

  def _broken(self, what: str, step: int) -> str:
    last = self._saved
    where = f'the checkpoint of step {last} is kept' if last else 'there is no earlier checkpoint'
    since = f'between step {(last or 0) + 1} and step {step}'
    cause = f'; the gradient was not finite first at step {self._bad_gradient}' if self._bad_gradient else ''
    return (
      f'{self._label}: {what} (the last finite loss: step {self._done}{cause}). It went wrong {since}; {where} and the '
      'same command goes on from it. Lower the learning rate, or look at the data of those steps'
    )

  def _write(self, step: int, row: Mapping[str, float]) -> None:
    if not self._writes:
      return
    with open(self._path, 'a') as file:
      file.write(json.dumps({'step': step, 'time': time.time(), **row}) + '\n')
    if self._board:
      for name, value in row.items():
        self._board.add_scalar(name, value, step)


def _drop_after(path: Path, step: int) -> None:
  """Drops the lines of steps that a resumed run will do again, and a half-written last line."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)['step'] <= step:
        kept.append(line + '\n')
    except ValueError:
      continue
  temporary = path.with_suffix('.partial')
  temporary.write_text(''.join(kept))
  temporary.replace(path)


def _tensorboard(directory: Path) -> Any:
  try:
    from tensorboardX import SummaryWriter  # the extra `tensorboard`
  except ImportError:
    return None
  return SummaryWriter(str(directory / 'tensorboard'), write_to_disk=True)
