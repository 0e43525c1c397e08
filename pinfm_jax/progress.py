"""Progress lines with an ETA for work that takes longer than a few seconds."""

import sys
import time


class Progress:
  """Prints `label  42 %  1.2 k rows/s  ETA 0:12` at most once a second.

  On a terminal the line is redrawn in place; in a log file each line stands alone, ten seconds apart. Work that ends
  earlier prints nothing but its closing line.

  Attributes:
    quiet: set on the class, it prints nothing: of several processes one speaks for all.
  """

  quiet = False

  def __init__(self, label: str, total: float | None, unit: str):
    """Starts the clock.

    Args:
      label: what is being done.
      total: how many units there are, or None when that is not known.
      unit: what is counted, in the plural ("rows").
    """
    self._label, self._total, self._unit = label, total, unit
    self._stream = sys.stderr
    self._every_s = 1.0 if self._stream.isatty() else 10.0
    self._start = self._printed = time.monotonic()
    self._done = self._first = self._printed_done = 0.0
    self._rate: float | None = None

  def start_at(self, done: float) -> None:
    """Counts `done` units as finished before this run (a resumed run's rate leaves them out)."""
    self._done = self._first = self._printed_done = done

  def update(self, done: float, note: str = '') -> None:
    """Says that `done` units in all are finished; `note` is appended to the line."""
    self._done = done
    now = time.monotonic()
    if now - self._printed >= self._every_s:
      self._print(self._line(now, note), end='\r' if self._stream.isatty() else '\n')
      self._printed, self._printed_done = now, done

  def close(self, note: str = '') -> float:
    """Prints the closing line and returns the seconds since the start."""
    seconds = time.monotonic() - self._start
    rate = (self._done - self._first) / max(seconds, 1e-9)
    text = f'{self._label}: {_count(self._done)} {self._unit} in {duration(seconds)} ({_count(rate)} {self._unit}/s)'
    self._print(text + (f'  {note}' if note else ''), end='\n')
    return seconds

  def _line(self, now: float, note: str) -> str:
    recent = (self._done - self._printed_done) / max(now - self._printed, 1e-9)
    rate = recent if self._rate is None else (self._rate + recent) / 2  # half old, half new
    # Below a hundredth the first line says how long the compilation took, and nothing of what is to come.
    starting = self._printed_done == self._first and self._done - self._first < (self._total or 0) / 100
    self._rate = None if starting else rate
    parts = [self._label]
    if self._total:
      parts.append(f'{100 * self._done / self._total:3.0f} %')
    parts.append(f'{_count(rate)} {self._unit}/s')
    if self._total and rate > 0 and not starting:
      parts.append(f'ETA {duration((self._total - self._done) / rate)}')
    return '  '.join(parts + ([note] if note else []))

  def _print(self, text: str, end: str) -> None:
    if self.quiet:
      return
    clear = '\x1b[2K' if self._stream.isatty() else ''
    self._stream.write(clear + text + end)
    self._stream.flush()


def duration(seconds: float) -> str:
  """Seconds as `h:mm:ss` or `m:ss`; under ten seconds with one decimal (`4.2 s`)."""
  if seconds < 10:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(int(round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'


def _count(value: float) -> str:
  for scale, suffix in ((1e9, ' G'), (1e6, ' M'), (1e3, ' k')):
    if value >= 10 * scale:
      return f'{value / scale:.1f}{suffix}'
  return f'{value:.0f}' if value >= 100 else f'{value:.3g}'
