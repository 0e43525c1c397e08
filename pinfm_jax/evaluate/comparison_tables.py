"""The tables of a comparison of arms: metrics with lifts, probabilities, one arm against the others, item buckets."""

from typing import TYPE_CHECKING

from pinfm_jax.evaluate.bootstrap import Lift
from pinfm_jax.evaluate.ranking import figure_name
from pinfm_jax.evaluate.tables import Table, interval, mean_std, percent_interval

if TYPE_CHECKING:
  from pinfm_jax.evaluate.comparison import RankingComparison

# The metrics that get a table of lifts: how it calls them, and what they count.
LIFTED = {
  'hit@3': ('HIT@3', 'requests counted', 'hit@3_requests'),
  'auc': ('AUC', 'positives', 'positives'),
  'per_user_auc': ('Per-user AUC', 'users counted', 'per_user_auc_users'),
}


def ranking_tables(result: 'RankingComparison') -> tuple[Table, ...]:
  """All tables: a lifted metric each, probabilities, the challenger's differences, and for each label lifts by bucket.

  The last ones are there where item ages, or the items that pretraining has not seen, are known.
  """
  against = [_against_table(result, metric) for metric in ('hit@3', 'auc')] if result.challenger else []
  buckets = [table for table in (_bucket_table(result, label) for label in result.labels_shown) if table.rows]
  return (*(_metric_table(result, metric) for metric in LIFTED), _probability_table(result), *against, *buckets)


def _metric_table(result: 'RankingComparison', metric: str) -> Table:
  title, counted, count_name = LIFTED[metric]
  names = [figure_name(label, '', metric) for label in result.labels_shown]
  paper = result.paper if metric == 'hit@3' else {}

  def row(name: str, cells: list[str], reference: str = '') -> tuple[str, ...]:
    return (name, *cells, reference) if paper else (name, *cells)

  rows = [row(arm, [mean_std(*values[name]) for name in names]) for arm, values in result.metrics.items()]
  for arm, lifts in result.lifts.items():
    rows.append(row(f'lift of {arm}', [_lift_text(lifts[name]) for name in names], paper.get(arm, '')))
  if result.best is not None:
    rows.append(row('best attainable', [mean_std(result.best[name], float('nan')) for name in names]))
  counts = [result.metrics[result.baseline][figure_name(label, '', count_name)][0] for label in result.labels_shown]
  rows.append(row(counted, [f'{count:,.0f}' for count in counts]))
  note = (
    f'Mean{" ± std" if result.seeds > 1 else ""} over {result.seeds} seed{"s" if result.seeds > 1 else ""}. Lifts are '
    f'relative to {result.baseline}, with 95 % intervals of a paired bootstrap over {_drawn(result, metric)}.'
  )
  if paper:
    note += ' Paper: the lift that the PinFM paper reports for such an arm, on other data: a reference, no target.'
  return Table(title, row('', _header(result, metric), 'paper'), tuple(rows), note)


def _probability_table(result: 'RankingComparison') -> Table:
  rows = []
  for label in result.labels_shown:
    for arm, figures in result.metrics.items():
      change = result.lifts[arm][figure_name(label, '', 'logloss')] if arm in result.lifts else None
      loss, entropy, calibration = (
        mean_std(*figures[figure_name(label, '', name)])
        for name in ('logloss', 'normalised_entropy', 'calibration')
      )  # fmt: skip
      rows.append((arm, label, loss, _difference_text(change) if change else '', entropy, calibration))
  note = (
    f'The change of logloss is against {result.baseline}, with 95 % intervals of a paired bootstrap over '
    f'{_drawn(result, "logloss")}; below 0 is better. NE: logloss over that of the base rate, below 1 is better than '
    'knowing nothing. Calibration: mean prediction over mean label, best at 1.'
  )
  return Table('Probabilities', ('', 'label', 'logloss', 'change', 'NE', 'calibration'), tuple(rows), note)


def _against_table(result: 'RankingComparison', metric: str) -> Table:
  rows = [
    (arm, *(_difference_text(lifts[figure_name(label, '', metric)]) for label in result.labels_shown))
    for arm, lifts in result.against.items()
  ]
  note = (
    f"The metric of '{result.challenger}' less that of the row's arm, with 95 % intervals of a paired bootstrap over "
    f'{_drawn(result, metric)}.'
  )
  title = f'{LIFTED[metric][0]}: {result.challenger} against'
  return Table(title, ('', *_header(result, metric)), tuple(rows), note)


def _bucket_table(result: 'RankingComparison', label: str) -> Table:
  """Arms stand below each other within a bucket, so that a reader sees which of them helps there."""
  figures = result.metrics[result.baseline]
  buckets = dict.fromkeys(parts[1] for parts in (name.split('/') for name in figures) if len(parts) == 3)
  rows = []
  for bucket in buckets:
    hit, auc, *counts = (figure_name(label, bucket, m) for m in ('hit@3', 'auc', 'hit@3_requests', 'positives'))
    for arm, lifts in result.lifts.items():
      rows.append((
        bucket_text(bucket),
        arm,
        _lift_text(lifts[hit]),
        f'{figures[counts[0]][0]:,.0f}',
        _lift_text(lifts[auc]),
        f'{figures[counts[1]][0]:,.0f}',
      ))  # fmt: skip
  note = (
    f'Lifts are relative to {result.baseline}. HIT@3 asks for a positive of the row among the top 3 of the whole '
    'request (requests: those with such a positive), AUC is among the candidates of the row.'
  )
  if 'unseen' in buckets:
    note += ' Seen, unseen: items of which pretraining had an event, or none.'
  header = ('item', 'arm', f'{_marked(result, "HIT@3", label)} lift', 'requests', 'AUC lift', 'positives')
  return Table(f'{label} by item age', header, tuple(rows), note)


def bucket_text(bucket: str) -> str:
  """How a reader is told of a bucket of `ranking.slices`."""
  return 'age unknown' if bucket == 'age_unknown' else bucket.removeprefix('age')


def _marked(result: 'RankingComparison', text: str, label: str) -> str:
  return f'{text} (lower is better)' if label in result.lower_is_better else text


def _header(result: 'RankingComparison', metric: str) -> list[str]:
  labels = result.labels_shown
  return [_marked(result, label, label) for label in labels] if metric == 'hit@3' else list(labels)


def _drawn(result: 'RankingComparison', metric: str) -> str:
  over = 'users' if metric == 'per_user_auc' else result.resample
  return f'{getattr(result, over):,} {over}'


def _lift_text(lift: Lift) -> str:
  return percent_interval(lift.relative, lift.low, lift.high)


def _difference_text(lift: Lift) -> str:
  return interval(lift.difference, lift.difference_low, lift.difference_high)
