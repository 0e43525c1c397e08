"""Plots as inline SVG: no external resource, legible on light and dark pages, the same bytes for the same data."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

COLOURS = ('#3f83d1', '#d97b29', '#2f9e6e', '#b763b8', '#d05252', '#8f8a2c', '#5aa9a9', '#8d6e63')
_INK = '#010203'  # stands for the page's text colour while matplotlib draws
_MAX_POINTS = 400
STYLE = {
  'svg.fonttype': 'none',  # text stays text: smaller, selectable, in the page's font
  'font.size': 10,
  'axes.titlesize': 11,
  'axes.edgecolor': _INK,
  'axes.labelcolor': _INK,
  'axes.titlecolor': _INK,
  'axes.linewidth': 0.7,
  'axes.prop_cycle': matplotlib.cycler(linestyle=('-', '--', ':')) * matplotlib.cycler(color=COLOURS),
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': _INK,
  'grid.alpha': 0.12,
  'grid.linewidth': 0.7,
  'text.color': _INK,
  'xtick.color': _INK,
  'ytick.color': _INK,
  'legend.frameon': False,
  'legend.fontsize': 9,
}


@dataclass(frozen=True)
class Interval:
  """A point with its interval."""

  value: float
  low: float
  high: float


def curves(
  title: str,
  series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  ylabel: str,
  from_zero: bool = False,
  xlabel: str = 'step',
) -> str:
  """Lines over training steps, or over something else.

  Args:
    title: of the plot.
    series: name -> (steps, values); long ones are averaged to a few hundred points.
    ylabel: what the values are.
    from_zero: whether the axis of the values begins at 0.
    xlabel: what the values stand over.

  Returns:
    An <svg> element.
  """
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(title)
    for name, (steps, values) in series.items():
      x, y = _thinned(steps, values)
      axes.plot(x, y, label=name, linewidth=1.6, marker='o' if len(x) == 1 else None)
    axes.set_xlabel(xlabel)
    if from_zero:
      axes.set_ylim(bottom=0)
    axes.set_ylabel(ylabel)
    _legend(axes, len(series))
    return to_svg(figure, f'curves {title} {ylabel}')


def intervals(title: str, series: Mapping[str, Mapping[str, Interval]], ylabel: str) -> str:
  """Points with intervals over categories, around a line at 0.

  Args:
    title: of the plot.
    series: name -> {category: interval}, in per cent; a series may lack a category.
    ylabel: what the values are.

  Returns:
    An <svg> element.
  """
  categories = list(dict.fromkeys(category for points in series.values() for category in points))
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(title)
    axes.axhline(0, color=_INK, linewidth=0.9)
    for i, (name, points) in enumerate(series.items()):
      shift = min(0.16, 0.8 / len(series)) * (i - (len(series) - 1) / 2)  # the points of a category stay apart
      x = [categories.index(category) + shift for category in points]
      y = np.array([(p.value, p.value - p.low, p.high - p.value) for p in points.values()]).T
      marker = 'os^D'[i // len(COLOURS) % 4]  # where the colours begin again
      axes.errorbar(x, y[0], yerr=np.maximum(y[1:], 0), fmt=marker, markersize=5, capsize=3, linewidth=1.5, label=name)
    axes.set_xticks(range(len(categories)), categories)
    axes.set_xlim(-0.5, len(categories) - 0.5)
    axes.grid(axis='x', visible=False)
    axes.set_ylabel(ylabel)
    _legend(axes, len(series))
    return to_svg(figure, f'intervals {title} {ylabel}')


def reliability(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
  """What was predicted against what happened, beside the line on which both are the same.

  Args:
    title: of the plot.
    series: name -> (mean prediction, observed share) pairs, low to high.

  Returns:
    An <svg> element.
  """
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(title)
    top = max((value for points in series.values() for point in points for value in point), default=1.0) or 1.0
    axes.plot([0, top], [0, top], color=_INK, linewidth=0.9, linestyle=':')
    for name, points in series.items():
      axes.plot(*zip(*points, strict=True), label=name, linewidth=1.4, marker='o', markersize=4)
    axes.set_xlabel('mean prediction')
    axes.set_ylabel('share of positives')
    _legend(axes, len(series))
    return to_svg(figure, f'reliability {title}')


def _legend(axes: matplotlib.axes.Axes, entries: int) -> None:
  """Inside while the entries are few, else below the axes, where they hide nothing."""
  if entries > 4:
    axes.figure.legend(loc='outside lower left', ncols=2)
    axes.figure.set_figheight(2.7 + 0.19 * -(-entries // 2))
  elif entries > 1:
    axes.legend()


def _figure(title: str) -> tuple:
  figure = Figure(figsize=(4.2, 2.7), layout='constrained')
  axes = figure.subplots()
  axes.set_title(title, loc='left')
  return figure, axes


def to_svg(figure: Figure, name: str) -> str:
  """A figure as an <svg> element for a page, with ids that begin with its name."""
  for text in figure.findobj(matplotlib.text.Text):
    text.set_parse_math(False)  # a label such as 'price_$' is no formula
  figure.patch.set_alpha(0)
  for axes in figure.axes:
    axes.patch.set_alpha(0)
  buffer = io.StringIO()
  with matplotlib.rc_context({'svg.hashsalt': name}):
    figure.savefig(buffer, format='svg', metadata={'Date': None})
  svg = buffer.getvalue()
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  svg = re.sub(r'<style type="text/css">.*?</style>', '', svg, flags=re.DOTALL)  # would style the whole page
  svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1', svg, count=1)
  svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', svg, count=1)
  svg = re.sub(r'font: (\d+(?:\.\d+)?)px [^;\"]*', r'font-size: \1px', svg)
  return _own_ids(svg, name).replace(_INK, 'currentColor').strip()


def _own_ids(svg: str, name: str) -> str:
  """Prefixes ids, which matplotlib repeats from figure to figure while a page needs them unique."""
  prefix = re.sub(r'\W+', '-', name)
  svg = re.sub(r' id="([^"]*)"', rf' id="{prefix}-\1"', svg)
  svg = re.sub(r'href="#([^"]*)"', rf'href="#{prefix}-\1"', svg)
  return re.sub(r'url\(#([^)]*)\)', rf'url(#{prefix}-\1)', svg)


def _thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
  x, y = np.asarray(steps, float), np.asarray(values, float)
  if x.size <= _MAX_POINTS:
    return x, y
  starts = np.linspace(0, x.size, _MAX_POINTS, endpoint=False).astype(int)
  counts = np.diff(np.append(starts, x.size))
  return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
