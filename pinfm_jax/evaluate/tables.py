"""A table of results as Markdown (results.md) and as aligned text (the terminal)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
  """A titled table of text cells; the first column names the row, the others are right-aligned."""

  title: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  note: str = ''

  def __post_init__(self):
    for row in self.rows:
      if len(row) != len(self.header):
        raise ValueError(f'got a row of {len(row)} cells in "{self.title}"; expected {len(self.header)}')

  def markdown(self) -> str:
    """A level-3 heading, the table and the note, each parted by a blank line."""
    rule = ['---', *['---:'] * (len(self.header) - 1)]
    lines = [_markdown_row(self.header), _markdown_row(rule), *map(_markdown_row, self.rows)]
    return '\n\n'.join(part for part in (f'### {self.title}', '\n'.join(lines), self.note) if part) + '\n'

  def text(self) -> str:
    """The same, aligned for a terminal."""
    widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
      first = cells[0].ljust(widths[0])
      return '  '.join([first, *(cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True))]).rstrip()

    rule = '  '.join('-' * width for width in widths)
    lines = [self.title, '', line(self.header), rule, *map(line, self.rows)]
    return '\n'.join([*lines, *(['', self.note] if self.note else [])]) + '\n'


def mean_std(mean: float, std: float, digits: int = 4) -> str:
  """'0.7123 ± 0.0012'; without ± where there is one seed (std NaN), '–' where the figure is undefined."""
  if mean != mean:
    return '–'
  return f'{mean:.{digits}f}' + ('' if std != std else f' ± {std:.{digits}f}')


def percent_interval(value: float, low: float, high: float, digits: int = 2) -> str:
  """'+2.31 % [+1.10, +3.52]' of relative values; the interval says so where there is too little data for one."""
  if value != value:
    return '–'
  interval = '[too few]' if low != low else f'[{100 * low:+.{digits}f}, {100 * high:+.{digits}f}]'
  return f'{100 * value:+.{digits}f} % {interval}'


def interval(value: float, low: float, high: float, digits: int = 4) -> str:
  """'+0.0231 [+0.0110, +0.0352]' of differences, as `percent_interval`."""
  if value != value:
    return '–'
  ends = '[too few]' if low != low else f'[{low:+.{digits}f}, {high:+.{digits}f}]'
  return f'{value:+.{digits}f} {ends}'


def _markdown_row(cells) -> str:
  return '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'
