"""The tables of a study."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from pinfm_jax.bench.timing import Spread, ratios
from pinfm_jax.config import EvaluateConfig
from pinfm_jax.evaluate.ranking import figure_name
from pinfm_jax.evaluate.tables import Table, mean_std
from pinfm_jax.study.costs import AGAIN, CANDIDATES, Costs
from pinfm_jax.study.recommend import difference
from pinfm_jax.study.rows import Decision, Row
from pinfm_jax.sweep.grid import settings_text


def hide_like(evaluate: EvaluateConfig, labels: Sequence[str]) -> tuple[str, ...]:
  """Labels of negative utility, whose HIT@3 is better when lower."""
  return tuple(label for label in labels if evaluate.utility.get(label, 0.0) < 0)


def settings_words(overrides: Mapping[str, Any]) -> str:
  """Settings without the groups' names, which most of them share."""
  return settings_text({key.removeprefix('ranker.').removeprefix('finetune.'): v for key, v in overrides.items()})


def main_table(rows: Sequence[Row], evaluate: EvaluateConfig, costs: Costs, decision: Decision, baseline: str) -> Table:
  """Quality and costs of every block."""
  main = evaluate.main_label
  hides = hide_like(evaluate, [name.removesuffix('/auc') for name in rows[0].figures if name.endswith('/auc')])
  figures = [
    figure_name(main, '', 'hit@3'),
    *(figure_name(label, '', 'hit@3') for label in hides),
    figure_name(main, '', 'auc'),
    figure_name(main, '', 'logloss'),
  ]
  headings = [f'{main} HIT@3', *(f'{label} HIT@3 (low is good)' for label in hides), f'{main} AUC', f'{main} logloss']
  header = (
    'block', *headings, 'ranker parameters', 'block parameters', 'training memory', 'of the device', 'step', 'latency'
  )  # fmt: skip
  cells = []
  for row in rows:
    cells.append((
      row.name,
      *(over_seeds(row.figures[figure]) for figure in figures),
      f'{row.cost.parameters:,}',
      f'{row.cost.block_parameters:,}',
      f'{row.cost.memory_bytes / 1e6:,.1f} MB ({row.memory:.2f}x)',
      f'{100 * row.share:.2g} %' + ' (beyond the line)' * (row.share > decision.limits.share),
      f'{row.step.median:.2f}x',
      f'{row.latency.median:.2f}x',
    ))  # fmt: skip
  return Table('Quality and costs', header, tuple(cells), _costs_note(rows, costs, decision, baseline, hides))


def _costs_note(rows: Sequence[Row], costs: Costs, decision: Decision, baseline: str, hides: Sequence[str]) -> str:
  first, second = costs.costs[baseline], costs.costs[baseline + AGAIN]
  lines = [
    f'Ratios are to {baseline} ({1e3 * median(first.step_s):.3g} ms a training step of {costs.requests} requests, '
    f'{1e3 * median(first.serve_s):.3g} ms for a request of {CANDIDATES:,} candidates): medians of '
    f'{len(first.step_s)} rounds in which all blocks run in turn.',
    f'The same programs made twice differ by {_range(ratios(second.step_s, first.step_s))} (step) and '
    f'{_range(ratios(second.serve_s, first.serve_s))} (latency).',
    f'Memory: peak of the compiled step with {costs.memory_requests} requests, as {costs.environment["platform"]} '
    f'programs take it; the device has {decision.device}.',
  ]
  for label in hides:
    requests = rows[0].figures[figure_name(label, '', 'hit@3_requests')][0]
    lines.append(f'{label} HIT@3 counts {requests:.0f} requests.')
  machine = costs.environment
  lines.append(f'Machine: {machine["processor"]}, {machine["device"]}, {machine["threads"]} threads.')
  if machine['load_at_start'] > 0.25 * machine['threads']:
    lines.append(
      f'The load average was {machine["load_at_start"]} when the costs were measured: other work shared the '
      'processors; delete costs.json and repeat it when the machine is quiet.'
    )
  return ' '.join(lines)


def reproducibility_table(rows: Sequence[Row], figure: str, baseline: str) -> Table:
  """What retraining alone changes, and whether a block differs from the baseline by more than that."""
  base = next(row for row in rows if row.name == baseline).measured(figure)
  header = (
    'block', f'{figure} against {baseline}', f'{figure}: std over seeds',
    'mean absolute difference of predictions', 'rank correlation',
    'requests whose top 3 changed', 'settings',
  )  # fmt: skip
  cells = []
  for row in rows:
    values, pair = row.figures[figure], row.disagreement
    std = f'{np.std(values, ddof=1):.4f}' if len(values) > 1 else '–'
    between = ('–',) * 3
    if pair:
      changed = '–' if np.isnan(pair.changed_top) else f'{100 * pair.changed_top:.1f} %'
      between = (f'{pair.mean_difference:.4f}', f'{pair.rank_correlation:.4f}', changed)
    against = '' if row.name == baseline else difference(row.measured(figure), base).text()
    cells.append((row.name, against, std, *between, row.settings or "the launch file's"))
  note = (
    'Retrains differ in their seed alone: initial values, order of the data, dropout. Means over all pairs of seeds. '
    'Top 3 by utility, of requests with more than 3 candidates. Seed noise: half the 95 % interval of the difference '
    'of means (Welch).'
  )
  return Table('Reproducibility', header, tuple(cells), note)


def stability_table(rows: Sequence[Row], figure: str, note: str) -> Table:
  """The metric on parts of the split."""
  parts = list(rows[0].slices)
  times = [part for part in parts if part.startswith('time')]
  cells = []
  for row in rows:
    over_time = [row.slices[part] for part in times]
    spread = f'{max(over_time) - min(over_time):.4f}' if len(over_time) > 1 else '–'
    cells.append((row.name, *(mean_std(row.slices[part], float('nan')) for part in parts), spread))
  header = ('block', *parts, 'range over time')
  return Table(f'Stability: {figure} on parts of the split', header, tuple(cells), note)


def over_seeds(values: Sequence[float]) -> str:
  """'0.7123 ± 0.0012'."""
  return mean_std(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float('nan'))


def _range(spread: Spread) -> str:
  return f'{100 * (spread.median - 1):+.1f} % at the median'
