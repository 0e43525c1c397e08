"""What a study found: one row a block, with quality, costs, reproducibility and stability, and the block to take."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pinfm_jax.bench.timing import ratios
from pinfm_jax.config import EvaluateConfig
from pinfm_jax.evaluate.ranking import HIT_K, RankingPredictions, figure_name, ranking_metrics
from pinfm_jax.evaluate.tables import Table
from pinfm_jax.stages.context import Run
from pinfm_jax.study import tables
from pinfm_jax.study.consistency import disagreement, metric_of, slices_of
from pinfm_jax.study.costs import AGAIN, Costs
from pinfm_jax.study.plots import trade_off
from pinfm_jax.study.recommend import Recommendation, pareto_front, recommend
from pinfm_jax.study.rows import Decision, Row
from pinfm_jax.study.tuning import Trial, tuning_table
from pinfm_jax.workdir import write_json, write_text

_UNSTEADY = 0.05  # equal programs may differ by so much in latency


@dataclass(frozen=True)
class Findings:
  """The result of a study.

  Attributes:
    title: of the page.
    baseline: the block that ratios are relative to.
    rows: the blocks.
    evaluate: labels and utility.
    decision: how they were judged.
    recommendation: the block to take.
    costs: as measured.
    slices_note: how the split was parted.
  """

  title: str
  baseline: str
  rows: tuple[Row, ...]
  evaluate: EvaluateConfig
  decision: Decision
  recommendation: Recommendation
  costs: Costs
  slices_note: str

  @property
  def figure(self) -> str:
    """The figure that decides, 'save/auc'."""
    return figure_name(self.evaluate.main_label, '', self.decision.metric)

  def verdict(self) -> str:
    """The recommendation and its limits."""
    limits = self.decision.limits
    asked = (
      f'Limits: peak training memory at most {100 * limits.memory:+g} % and serving latency at most '
      f'{100 * limits.latency:+g} % of {self.baseline}, training within {100 * limits.share:g} % of '
      f'{self.decision.device}.'
    )
    first, again = (self.costs.costs[name].serve_s for name in (self.baseline, self.baseline + AGAIN))
    noise = ratios(again, first).median - 1
    warning = (
      f' But equal programs differed by {100 * noise:+.0f} % in latency, so that ratios say little: delete costs.json '
      'and repeat it when the machine is quiet.'
    )
    text = self.recommendation.text(self.figure, self.baseline)
    return f'{asked} {text}' + warning * (abs(noise) > _UNSTEADY)

  def tables(self) -> tuple[Table, ...]:
    """Quality and costs, reproducibility, stability."""
    first = tables.main_table(self.rows, self.evaluate, self.costs, self.decision, self.baseline)
    return (
      first,
      tables.reproducibility_table(self.rows, self.figure, self.baseline),
      tables.stability_table(self.rows, self.figure, self.slices_note),
    )

  def fronts(self) -> dict[str, tuple[str, ...]]:
    """Blocks that no other beats, by latency and by memory."""
    sign = -1 if self.decision.metric == 'logloss' else 1
    quality = {row.name: sign * float(np.mean(row.figures[self.figure])) for row in self.rows}
    costs = {'latency': {r.name: r.latency.median for r in self.rows}, 'memory': {r.name: r.memory for r in self.rows}}
    defined = [name for name, value in quality.items() if not math.isnan(value)]
    return {kind: pareto_front({n: (cost[n], quality[n]) for n in defined}) for kind, cost in costs.items()}

  def figures(self) -> dict[str, Any]:
    """For results.json."""
    recommendation, difference = self.recommendation, self.recommendation.difference
    return {
      'title': self.title,
      'baseline': self.baseline,
      'figure': self.figure,
      'limits': asdict(self.decision.limits) | {'device': self.decision.device},
      'recommended': recommendation.name,
      'difference': difference and {**asdict(difference), 'within_noise': difference.is_noise},
      'equals': recommendation.equals,
      'excluded': recommendation.excluded,
      'pareto': self.fronts(),
      'environment': self.costs.environment,
      'memory_requests': self.costs.memory_requests,
      'blocks': {row.name: _plain(row) for row in self.rows},
    }

  def write(
    self, directory: Path, about: str, trials: Mapping[str, Sequence[Trial]] | None = None, missing: Sequence[str] = ()
  ) -> None:
    """Writes results.md, results.json, latency.svg and memory.svg."""
    shown = list(self.tables())
    if trials:
      shown.append(tuning_table(trials, self.decision.metric, self.evaluate.main_label))
    parts = [f'# {self.title}', about, self.verdict(), *(table.markdown() for table in shown)]
    parts += ['### Plots', '![Quality against latency](latency.svg)', '![Quality against memory](memory.svg)']
    if missing:
      parts += ['### Not complete', '\n'.join(f'- {line}' for line in missing)]
    write_text(directory / 'results.md', '\n\n'.join(part.rstrip('\n') for part in parts) + '\n')
    write_json(directory / 'results.json', _defined(self.figures()))
    fronts = self.fronts()
    for kind, what in (('latency', 'serving latency'), ('memory', 'peak training memory')):
      points = {
        row.name: (row.latency.median if kind == 'latency' else row.memory, float(np.mean(row.figures[self.figure])))
        for row in self.rows
      }
      label = f'{what}, ratio to {self.baseline}'
      plot = trade_off(self.title, points, fronts[kind], label, self.figure, self.recommendation.name)
      write_text(directory / f'{kind}.svg', plot + '\n')

  def text(self) -> str:
    """The tables for the terminal, the recommendation last."""
    return '\n\n'.join([*(table.text().rstrip() for table in self.tables()), self.verdict()])


def find(run: Run, predictions: Mapping[str, Sequence[Path]], costs: Costs, decision: Decision) -> Findings:
  """Compares the blocks.

  Args:
    run: whose arms are the blocks, with the settings they were trained with.
    predictions: block -> files of its predictions, one a seed.
    costs: of the blocks.
    decision: how they are judged.
  """
  experiment, rows, slices = run.experiment, [], None
  evaluate, baseline = experiment.evaluate, experiment.baseline
  base = costs.costs[baseline]
  launch = {arm.name: arm.overrides for arm in experiment.arms}
  for name, paths in predictions.items():
    runs = [RankingPredictions.load(path) for path in paths]
    slices = slices or slices_of(runs[0], run.dataset, decision.segments)
    each = [ranking_metrics(one, evaluate.utility, evaluate.age_edges_hours) for one in runs]
    names = [
      figure_name(label, '', metric)
      for label in runs[0].label_names
      for metric in ('auc', 'hit@3', 'hit@3_requests', 'logloss')
    ]
    cost = costs.costs[name]
    rows.append(Row(
      name=name,
      settings=tables.settings_words(launch[name]),
      figures={figure: tuple(found[figure] for found in each) for figure in names},
      cost=cost,
      memory=cost.memory_bytes / base.memory_bytes,
      share=cost.memory_bytes / decision.device_bytes,
      step=ratios(cost.step_s, base.step_s),
      latency=ratios(cost.serve_s, base.serve_s),
      disagreement=disagreement(runs, evaluate.main_label, evaluate.utility),
      slices={part: _mean(runs, decision.metric, evaluate, mask) for part, mask in slices.masks.items()},
    ))  # fmt: skip
  figure = figure_name(evaluate.main_label, '', decision.metric)
  recommendation = recommend([row.measured(figure) for row in rows], baseline, decision.limits, decision.metric)
  title = f'{experiment.name}: interaction blocks'
  return Findings(title, baseline, tuple(rows), evaluate, decision, recommendation, costs, slices.note)


def _mean(runs: Sequence[RankingPredictions], metric: str, evaluate: EvaluateConfig, mask: np.ndarray) -> float:
  return float(np.mean([metric_of(run, metric, evaluate.main_label, evaluate.utility, mask) for run in runs]))


def _plain(row: Row) -> dict[str, Any]:
  values = {name: list(value) for name, value in row.figures.items()}
  return {
    'settings': row.settings,
    'seeds': values,
    'parameters': row.cost.parameters,
    'block_parameters': row.cost.block_parameters,
    'memory_bytes': row.cost.memory_bytes,
    'memory_ratio': row.memory,
    'device_share': row.share,
    'step_ms': 1e3 * median(row.cost.step_s),
    'step_ratio': asdict(row.step),
    'serve_ms': 1e3 * median(row.cost.serve_s),
    'latency_ratio': asdict(row.latency),
    'disagreement': row.disagreement and asdict(row.disagreement),
    f'changed_top{HIT_K}': row.disagreement and row.disagreement.changed_top,
    'slices': dict(row.slices),
  }


def _defined(value: Any) -> Any:
  """The same with null for what is undefined, which JSON cannot say otherwise."""
  if isinstance(value, Mapping):
    return {name: _defined(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [_defined(item) for item in value]
  return None if isinstance(value, float) and math.isnan(value) else value
