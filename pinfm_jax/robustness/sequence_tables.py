"""Tables, curves and the plain verdict of a sequence evaluation."""

from pathlib import Path

from pinfm_jax import plots
from pinfm_jax.evaluate.bootstrap import Lift
from pinfm_jax.evaluate.tables import Table, interval, mean_std
from pinfm_jax.robustness.sequence_evaluation import cost
from pinfm_jax.robustness.sequence_figures import WORST, WORST_STATIC, Arm, Figures
from pinfm_jax.robustness.sequence_terms import NAMES
from pinfm_jax.robustness.sequences import ALL, CLEAN, HOSTILE, NATURAL, NOISE, NONE
from pinfm_jax.robustness.tables import direction
from pinfm_jax.workdir import write_text


def tables(figures: Figures) -> list[Table]:
  """For each metric: all defences under what does not adapt, under what does, and what the repair changes."""
  c, found = figures.evaluation.config, []
  hostile = tuple(name for name in c.columns if name in (CLEAN, *HOSTILE))
  natural = tuple(name for name in c.columns if name in NATURAL)
  about = f'{figures.evaluation.subject.name}, {len(figures.evaluation.subject.rows):,} examples'
  for metric in figures.metrics:
    for title, columns, note in (
      (
        'attacks that do not know the defence',
        (*hostile, WORST_STATIC),
        f'Attacks on embeddings: l_2 {c.radius_l2:g} or l_inf {c.radius_linf:g} an event, {c.steps} steps; '
        f'{c.injected} injected events. {WORST_STATIC.capitalize()}: an example at a time, by the highest loss. '
        'Mean, ± std over seeds of the defence, 95 % interval over users.',
      ),
      ('natural noise', natural, f'{100 * c.share:g} % of the events, drawn. No adversary.'),
      (
        'attacks that know the defence',
        (*c.adaptive, WORST),
        f'BPDA: {c.adaptive_steps} steps through {c.repair.steps} repair steps. {WORST.capitalize()}: over these '
        'and the attacks of the first table, an example at a time: its difference from none is the headline.',
      ),
    ):
      columns = tuple(column for column in columns if figures.figure(metric, column))  # what is measured yet
      if columns:
        found.append(_values(figures, metric, f'{metric} under {title} ({about})', columns, note))
    found.append(_changes(figures, metric, (*hostile, *natural, *c.adaptive, WORST)))
    found.append(_strengths(figures, metric, (*hostile, *natural)))
  return found


def verdict(figures: Figures) -> list[str]:
  """Plain sentences: attacks that do not know the repair, natural noise, clean data, and the worst case."""
  lines, c = [], figures.evaluation.config
  repaired, nothing = (ALL, c.main), (NONE, c.main)
  for metric in figures.metrics:
    best = best_single(figures, metric)
    for column, what in (
      (WORST_STATIC, 'Under attacks that do not know the repair (the worst of them, an example at a time)'),
      *((name, f'With {100 * c.share:g} % of the events {name}') for name in NATURAL if name in c.columns),
      (CLEAN, 'On clean histories'),
      (WORST, 'In the worst case over all attacks, those that know the repair included'),
    ):
      change = _change(figures, metric, column, repaired, nothing)
      if change:
        lines.append(f'{metric}: {what}, repair by all tasks against none: {_text(change)}, {direction(change)}.')
    change = _change(figures, metric, WORST_STATIC, repaired, (best, c.main)) if best else None
    if change:
      lines.append(
        f'{metric}: there, all tasks against the best single one ({best}): {_text(change)}, {direction(change)}.'
      )
  missing = sum(not figures.evaluation.path(key).exists() for key in figures.evaluation.planned())
  if missing:
    lines.append(f'{figures.evaluation.subject.name}: {missing} cells are not finished; run the command again.')
  return lines


def best_single(figures: Figures, metric: str) -> str:
  """The single task of the highest metric in the worst of what does not adapt; '' if there is none yet."""
  figure, main = figures.figure(metric, WORST_STATIC), figures.evaluation.config.main
  singles = [name for name in NAMES if figure and (name, main) in figure.arms]
  return max(singles, key=lambda name: figure.interval((name, main))[0]) if singles else ''


def draw(figures: Figures, directory: Path) -> None:
  """Writes a plot for each metric: the metric over the strength of the repair by all tasks, one line a column."""
  c = figures.evaluation.config
  for metric in figures.metrics:
    series = {}
    for column in c.columns:
      figure = figures.figure(metric, column)
      arms = [(NONE, c.main), *((ALL, strength) for strength in sorted(c.strengths))]
      points = [
        (0.0 if arm[0] == NONE else arm[1], figure.interval(arm)[0]) for arm in arms if figure and arm in figure.arms
      ]
      if len(points) > 1:
        series[column] = tuple(zip(*points, strict=True))
    if series:
      title = f'{metric} after repair by all tasks'
      svg = plots.curves(title, series, metric, xlabel='radius of the repair (l_2, an event)')
      write_text(directory / f'{metric.replace("@", "_at_")}.svg', svg)


def _values(figures: Figures, metric: str, title: str, columns: tuple[str, ...], note: str) -> Table:
  c = figures.evaluation.config
  rows = [
    (row, *(_value(figures, metric, column, (row, c.main)) for column in columns), f'{cost(row, c):.0f}')
    for row in c.rows
  ]
  return Table(title, ('defence', *columns, 'passes'), tuple(rows), note)


def _changes(figures: Figures, metric: str, columns: tuple[str, ...]) -> Table:
  c, best = figures.evaluation.config, best_single(figures, metric)
  others = [name for name in (NONE, NOISE, best) if name in c.rows and ALL in c.rows]
  rows = [
    (column, *(_text(_change(figures, metric, column, (ALL, c.main), (other, c.main))) for other in others))
    for column in columns
    if figures.figure(metric, column)
  ]
  note = 'Paired over users, 95 %.' + (f' The best single task is {best}.' if best else '')
  return Table(f'{metric}: repair by all tasks against ..', ('under', *others), tuple(rows), note)


def _strengths(figures: Figures, metric: str, columns: tuple[str, ...]) -> Table:
  c = figures.evaluation.config
  rows = [
    (
      f'{row} {strength:g}',
      *(_text(_change(figures, metric, column, (row, strength), (NONE, c.main))) for column in columns),
    )
    for row in c.rows
    for strength in sorted(c.strengths)
    if row != NONE
  ]
  note = f'Radius of the repair, l_2 an event. Of radii other than {c.main:g} one seed.'
  return Table(f'{metric} minus none, by strength', ('defence', *columns), tuple(rows), note)


def _change(figures: Figures, metric: str, column: str, arm: Arm, other: Arm) -> Lift | None:
  figure = figures.figure(metric, column)
  return figure.difference(arm, other) if figure else None


def _value(figures: Figures, metric: str, column: str, arm: Arm) -> str:
  figure = figures.figure(metric, column)
  if figure is None or arm not in figure.arms:
    return '–'
  mean, std, low, high = figure.interval(arm)
  return f'{mean_std(mean, std)} [{low:.4f}, {high:.4f}]'


def _text(change: Lift | None) -> str:
  return '–' if change is None else interval(change.difference, change.difference_low, change.difference_high)
