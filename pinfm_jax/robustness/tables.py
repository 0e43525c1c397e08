"""Tables and the plain verdict of an evaluation, from the cells that are finished."""

import numpy as np

from pinfm_jax.evaluate.bootstrap import Lift, Ratio, draws, lift, ratios
from pinfm_jax.evaluate.tables import Table, mean_std, percent_interval
from pinfm_jax.robustness.defended import ALL, CLEAN, NONE, ROWS
from pinfm_jax.robustness.evaluation import Evaluation
from pinfm_jax.robustness.tasks import NAMES

WORST = 'worst case'
_RESAMPLES = 2000


def kept(evaluation: Evaluation, row: str, column: str) -> np.ndarray | None:
  """[seeds, N] float64: which images stayed correct, a seed's worst case over columns included; None = no such cell.

  Args:
    evaluation: of the cells.
    row: a defence.
    column: an attack, 'worst transfer' (clean and all transfer attacks, all images) or 'worst case' (the adaptive
      attacks too, the first images); an image counts where no attack changed its class.
  """
  c = evaluation.config
  if column == 'worst transfer':
    names = (CLEAN, *c.transfer)
  elif column == WORST:
    names = (CLEAN, *c.transfer, *c.adaptive)
  else:
    found = evaluation.found(row, column)
    return np.stack([found[seed] for seed in sorted(found)]).astype(np.float64) if found else None
  found = {name: evaluation.found(row, name) for name in names}
  seeds = [seed for seed in c.seeds if all(seed in cells for cells in found.values())]
  if not seeds:
    return None
  size = c.adaptive_images if column == WORST else c.transfer_images
  return np.stack([np.all([found[n][seed][:size] for n in names], axis=0) for seed in seeds]).astype(np.float64)


def difference(evaluation: Evaluation, row: str, other: str, column: str) -> Lift | None:
  """A row's accuracy minus another's on the same images, paired; seeds are averaged an image at a time."""
  arms = [kept(evaluation, name, column) for name in (other, row)]
  if any(arm is None for arm in arms):
    return None
  columns = np.stack([arm.mean(axis=0) for arm in arms], axis=1)
  term = Ratio.of(columns, np.arange(len(columns)), len(columns))
  samples = ratios([term], draws(len(columns), _RESAMPLES))[0]
  means = term.means()
  return lift(means[0], means[1], samples[:, 0], samples[:, 1])


def tables(evaluation: Evaluation) -> list[Table]:
  """Accuracy under transfer attacks, under attacks that know of the repair, and what the repair changes."""
  c = evaluation.config
  radius = f'{c.ball.norm} {c.ball.radius * 255:g}/255'
  rows = [row for row in c.rows if kept(evaluation, row, CLEAN) is not None]
  costs = {row: evaluation.defended.cost(row) for row in rows}
  transfer = (CLEAN, *c.transfer, 'worst transfer')
  adaptive = (*c.adaptive, WORST)
  first = Table(
    f'Accuracy (%) under transfer attacks, {radius}, {c.transfer_images} images',
    ('defence', *transfer, 'passes'),
    tuple((row, *(_accuracy(evaluation, row, column) for column in transfer), f'{costs[row]:.0f}') for row in rows),
    'Interval of 95 % over images; ± over seeds of the defence. Passes: forward-backward passes of the classifier that '
    'the defence of one image costs. The attacks know the classifier, not the defence.',
  )
  second = Table(
    f'Accuracy (%) under attacks that know of the defence, {radius}, {c.adaptive_images} images',
    ('defence', *adaptive, 'worst case minus none'),
    tuple(
      (
        row,
        *(_accuracy(evaluation, row, column) for column in adaptive),
        _points(difference(evaluation, row, NONE, WORST)),
      )
      for row in rows
    ),
    f'BPDA: {c.adaptive_steps} steps through {c.repair.steps} repair steps, from where the last transfer attack ended; '
    f'EOT over {c.eot} draws; unrolled: {c.unrolled_steps} steps; Square: {c.queries} queries. The worst case is '
    "taken an image at a time over all attacks of both tables: its difference from 'none', in points, is the headline.",
  )
  best = best_single(evaluation)
  third = Table(
    'What the repair by all tasks changes, in points',
    ('against', *transfer),
    tuple(
      (name, *(_points(difference(evaluation, ALL, name, column)) for column in transfer))
      for name in (NONE, 'noise', best, 'untrained')
      if name in rows and ALL in rows
    ),
    f'Paired over images, 95 %. The best single task, by the mean of the transfer columns, is {best}.' if best else '',
  )
  return [first, second, third]


def best_single(evaluation: Evaluation) -> str:
  """The single task of the highest mean accuracy over the transfer attacks; '' if there is none yet."""
  means = {}
  for row in NAMES:
    cells = [kept(evaluation, row, column) for column in evaluation.config.transfer]
    if row in evaluation.config.rows and cells and all(cell is not None for cell in cells):
      means[row] = np.mean([cell.mean() for cell in cells])
  return max(means, key=means.get) if means else ''


def verdict(evaluation: Evaluation) -> list[str]:
  """Plain sentences about the two claims: gains under transfer, and what is left of them in the worst case."""
  best, lines = best_single(evaluation), []
  for other, what in ((NONE, 'no defence'), (best, f'the best single task ({best})')):
    found = difference(evaluation, ALL, other, 'worst transfer') if other else None
    if found:
      lines.append(
        f'Under transfer attacks (worst of all, an image at a time), repair by all tasks against {what}: '
        f'{_points(found)} points, {direction(found)}.'
      )
  found = difference(evaluation, ALL, NONE, WORST)
  if found:
    lines.append(
      f'In the worst case over all attacks, those that know of the repair included, it is {_points(found)} points '
      f'against no defence, {direction(found)}.'
    )
  clean = difference(evaluation, ALL, NONE, CLEAN)
  if clean:
    lines.append(f'On clean images it is {_points(clean)} points, {direction(clean)}.')
  missing = sum(
    kept(evaluation, row, column) is None
    for row in evaluation.config.rows if row in ROWS
    for column in (CLEAN, *evaluation.config.transfer, *evaluation.config.adaptive)
  )  # fmt: skip
  if missing:
    lines.append(
      f'{missing} cells are not finished; without --rows, --seeds and --until the command makes all of them.'
    )
  return lines


def _accuracy(evaluation: Evaluation, row: str, column: str) -> str:
  """'54.3 ± 0.2 [52.8, 55.9]': mean over seeds, its spread over seeds, the interval over images."""
  cell = kept(evaluation, row, column)
  if cell is None:
    return '–'
  values = cell.mean(axis=0)
  term = Ratio.of(values[:, None], np.arange(values.size), values.size)
  low, high = np.quantile(ratios([term], draws(values.size, _RESAMPLES))[0], (0.025, 0.975))
  std = 100 * cell.mean(axis=1).std(ddof=1) if len(cell) > 1 else float('nan')
  return f'{mean_std(100 * values.mean(), std, 1)} [{100 * low:.1f}, {100 * high:.1f}]'


def _points(found: Lift | None) -> str:
  if found is None:
    return '–'
  return percent_interval(found.difference, found.difference_low, found.difference_high, 1).replace(' %', '')


def direction(found: Lift) -> str:
  """What the interval of a difference says, in words."""
  if found.difference_low > 0:
    return 'a gain beyond the interval'
  return 'a loss beyond the interval' if found.difference_high < 0 else 'no difference beyond the interval'
