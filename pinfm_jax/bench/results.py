"""What a benchmark found: one table of figures beside their targets, as text, Markdown, JSON and a plot."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from pinfm_jax import __version__
from pinfm_jax.bench.timing import Spread, peak_memory_gb
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.tables import Table
from pinfm_jax.workdir import write_json, write_text


@dataclass(frozen=True)
class Figure:
  """One measured figure.

  Attributes:
    name: key in results.json, parts divided by '/'.
    text: what it is, for a reader.
    value: the figure (the median, where it was measured several times).
    least: of the repetitions, or None.
    greatest: of the repetitions, or None.
    unit: 's', 'x', 'bytes', ...
    at_most: a target: the value may not exceed it.
    at_least: a target: the value may not fall below it.
  """

  name: str
  text: str
  value: float
  least: float | None = None
  greatest: float | None = None
  unit: str = 'x'
  at_most: float | None = None
  at_least: float | None = None

  @classmethod
  def of(cls, name: str, text: str, spread: Spread, **rest: Any) -> 'Figure':
    """A figure that was measured several times."""
    return cls(name, text, spread.median, spread.least, spread.greatest, **rest)

  @property
  def met(self) -> bool | None:
    """Whether the value meets its target; None where it has none."""
    if self.at_most is None and self.at_least is None:
      return None
    above = self.at_least is None or self.value >= self.at_least
    return above and (self.at_most is None or self.value <= self.at_most)


@dataclass(frozen=True)
class Findings:
  """A benchmark's figures, what it measured (`settings`), and what a reader must know (`notes`)."""

  title: str
  settings: dict[str, Any]
  figures: Sequence[Figure]
  notes: Sequence[str]
  environment: dict[str, Any]

  def table(self) -> Table:
    """The figures, with least and greatest where there are several repetitions."""
    rows = []
    for figure in self.figures:
      spread = '' if figure.least is None else f'{_number(figure.least)} .. {_number(figure.greatest)}'
      value = f'{_number(figure.value)} {figure.unit}'.strip()
      rows.append((figure.text, value, spread, _target(figure), _met(figure)))
    return Table(self.title, ('figure', 'median', 'least .. greatest', 'target', 'met'), tuple(rows))


def environment(extra: Sequence[str] = ()) -> dict[str, Any]:
  """Machine and versions, as a reader needs them to judge a time; `extra` names more packages."""
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', *extra)
  return {
    'pinfm_jax': __version__,
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
    'processor': _processor(),
    'device': jax.devices()[0].device_kind,
    'platform': jax.default_backend(),
    'threads': len(os.sched_getaffinity(0)),
    'load_at_start': round(os.getloadavg()[0], 2),
  }


def make_directory(out: str | Path) -> Path:
  """The directory of a benchmark's results, before anything is measured.

  Raises:
    UserError: it cannot be made.
  """
  path = Path(out)
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'{out} cannot be made ({error.strerror}); give another --out') from error
  return path


def write_findings(findings: Findings, out: Path) -> None:
  """Prints the table and writes results.json and results.md."""
  machine = dict(findings.environment) | {'peak_memory_gb': round(peak_memory_gb(), 2)}
  notes = [*findings.notes]
  if machine['load_at_start'] > 0.25 * machine['threads']:
    notes.append(
      f'The load average was {machine["load_at_start"]} when this began: other work shared the processors. Times are '
      'indicative, and so are ratios: programs that synchronise their threads often suffer most. Repeat it when the '
      'machine is quiet.'
    )
  write_json(out / 'results.json', {
    'title': findings.title,
    'environment': machine,
    'settings': findings.settings,
    'figures': {f.name: _plain(f) for f in findings.figures},
    'notes': notes,
  })  # fmt: skip
  about = ', '.join(f'{name} {value}' for name, value in machine.items())
  settings = ', '.join(f'{name} {value}' for name, value in findings.settings.items())
  text = [f'# {findings.title}', findings.table().markdown(), f'Measured: {settings}.', *notes, f'Machine: {about}.']
  write_text(out / 'results.md', '\n\n'.join(part.strip() for part in text) + '\n')
  print('\n' + findings.table().text())
  print('\n'.join([*notes, f'{about}', f'results.json, results.md and a plot are in {out}']))


def _plain(figure: Figure) -> dict[str, Any]:
  values = {name: value for name, value in asdict(figure).items() if value is not None and name != 'name'}
  return values | ({} if figure.met is None else {'met': figure.met})


def _number(value: float | None) -> str:
  if value is None:
    return ''
  if float(value).is_integer() and abs(value) >= 1000:
    return f'{int(value):,}'
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def _target(figure: Figure) -> str:
  parts = [(figure.at_most, 'at most'), (figure.at_least, 'at least')]
  return ', '.join(f'{words} {_number(bound)}' for bound, words in parts if bound is not None)


def _met(figure: Figure) -> str:
  return '' if figure.met is None else 'yes' if figure.met else 'NO'


def _processor() -> str:
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      return next((line.split(':')[1].strip() for line in file if line.startswith('model name')), platform.machine())
  except OSError:
    return platform.machine()
