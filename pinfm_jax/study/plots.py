"""Quality against cost, one point a block, with the line of those that no other block beats."""

import re
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

from pinfm_jax.plots import STYLE, to_svg


def trade_off(
  title: str,
  points: Mapping[str, tuple[float, float]],
  front: Sequence[str],
  xlabel: str,
  ylabel: str,
  recommended: str = '',
) -> str:
  """Points with numbers, the Pareto front as a line, and the names below.

  Args:
    title: of the plot.
    points: block -> (cost, quality); undefined ones (NaN) are named and not drawn.
    front: names of the points on the front, by cost.
    xlabel: what the costs are.
    ylabel: what the quality is.
    recommended: the block that is drawn as a star; '' = none.

  Returns:
    An SVG document.
  """
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(6.4, 3.6 + 0.19 * -(-len(points) // 2)), layout='constrained')
    axes = figure.subplots()
    axes.set_title(title, loc='left')
    line = [points[name] for name in front]
    axes.plot([x for x, _ in line], [y for _, y in line], linewidth=1.2, linestyle='--', label='_front')
    for number, (name, (x, y)) in enumerate(points.items(), 1):
      marker, size = ('*', 13) if name == recommended else ('o', 6)
      axes.plot([x], [y], marker, markersize=size, label=f'{number}  {name}')
      if y == y:
        axes.annotate(str(number), (x, y), textcoords='offset points', xytext=(5, 4))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.margins(0.08)
    figure.legend(loc='outside lower left', ncols=2)
    svg = to_svg(figure, f'{title} {xlabel}')
  # A file of its own has no page whose text colour it could take, and needs a size.
  width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
  return svg.replace('<svg ', f'<svg width="{width}" height="{height}" font-family="sans-serif" ', 1).replace(
    'currentColor', '#555555'
  )
