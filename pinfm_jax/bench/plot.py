"""The plots of the benchmarks, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from pinfm_jax.plots import COLOURS

_STYLE = {
  'font.size': 9,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.alpha': 0.2,
  'axes.prop_cycle': matplotlib.cycler(color=COLOURS),
  'legend.frameon': False,
}


def bars(path: Path, title: str, values: Mapping[str, float], xlabel: str) -> None:
  """Horizontal bars, the first on top, each with its value; the axis is logarithmic where they differ much.

  Args:
    path: of the PNG file.
    title: of the plot.
    values: label -> positive value.
    xlabel: what the values are.
  """
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(7.2, 0.9 + 0.36 * len(values)), layout='constrained')
    axes = figure.subplots()
    places = range(len(values))
    axes.barh(places, list(values.values()), color=[COLOURS[i % len(COLOURS)] for i in places])
    for place, value in zip(places, values.values(), strict=True):
      axes.annotate(f' {value:.3g}', (value, place), va='center')
    axes.set_yticks(places, list(values))
    axes.invert_yaxis()
    if max(values.values()) > 20 * min(values.values()):
      axes.set_xscale('log')
    axes.margins(x=0.15)
    axes.grid(axis='y', visible=False)
    axes.set_xlabel(xlabel)
    axes.set_title(title, loc='left')
    figure.savefig(path, dpi=150)


def count(number: float) -> str:
  """A number as '8 M', '128 k' or '200'."""
  for scale, suffix in ((1_000_000, 'M'), (1_000, 'k')):
    if number >= scale:
      return f'{number / scale:.4g} {suffix}'
  return f'{number:.4g}'


Panel = tuple[str, str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]


def lines(path: Path, panels: Sequence[Panel], ylabel: str, log_y: bool = False) -> None:
  """Lines over a logarithmic axis, one panel beside another with one scale of the values.

  Args:
    path: of the PNG file.
    panels: (title, label of the x axis, name -> (x, y)).
    ylabel: what the values are.
    log_y: logarithmic values too.
  """
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(3.9 * len(panels), 3.1), layout='constrained')
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, xlabel, series) in zip(all_axes, panels, strict=True):
      for name, (x, y) in series.items():
        axes.plot(x, y, marker='o', label=name)
      axes.set_xscale('log')
      places = sorted({value for x, _ in series.values() for value in x})
      axes.set_xticks(places, [count(place) for place in places])
      axes.set_xticks([], minor=True)
      if log_y:
        axes.set_yscale('log')
      axes.set_xlabel(xlabel)
      axes.set_title(title, loc='left')
      if len(series) > 1:
        axes.legend()
    all_axes[0].set_ylabel(ylabel)
    figure.savefig(path, dpi=150)
