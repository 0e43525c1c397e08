"""Metrics of the cells of a sequence evaluation, on paired resamples of the users."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pinfm_jax.evaluate.bootstrap import Lift, Ratio, draws, ratios
from pinfm_jax.evaluate.lifts import Resampled, auc_terms
from pinfm_jax.evaluate.metrics import GroupedRequests
from pinfm_jax.evaluate.predict import predictions_of
from pinfm_jax.evaluate.ranking import HIT_K, RankingPredictions, utility
from pinfm_jax.evaluate.sorted_auc import SortedScores
from pinfm_jax.robustness.sequence_evaluation import Key, SequenceEvaluation
from pinfm_jax.robustness.sequences import CLEAN, HOSTILE, NONE
from pinfm_jax.robustness.subjects import RankingSubject

WORST_STATIC, WORST = 'worst of these', 'worst case'
NDCG_K = 10
_RESAMPLES = 1000
Arm = tuple[str, float]  # row, strength


@dataclass(frozen=True)
class Figure:
  """One metric of one column: `resampled` over users, its mean over seeds and their spread, one an arm."""

  arms: tuple[Arm, ...]
  resampled: Resampled
  std_A: np.ndarray

  def interval(self, arm: Arm) -> tuple[float, float, float, float]:
    """Mean, std over seeds (NaN of one), and the ends of the 95 % interval over users."""
    place = self.arms.index(arm)
    low, high = np.nanquantile(self.resampled.samples_RA[:, place], (0.025, 0.975))
    return float(self.resampled.value_A[place]), float(self.std_A[place]), float(low), float(high)

  def difference(self, arm: Arm, other: Arm) -> Lift | None:
    """What an arm changes against another; None where one of them is not measured."""
    if arm not in self.arms or other not in self.arms:
      return None
    return self.resampled.lift(self.arms.index(arm), self.arms.index(other))


class Figures:
  """All metrics of an evaluation's finished cells."""

  def __init__(self, evaluation: SequenceEvaluation, weights: dict[str, float] | None = None):
    """Takes the cells; `weights` are the utility's, which orders a request (ranking only)."""
    self.evaluation, self._weights = evaluation, weights or {}
    ranking = isinstance(evaluation.subject, RankingSubject)
    self.metrics = (f'HIT@{HIT_K}', 'AUC') if ranking else (f'NDCG@{NDCG_K}',)
    self._known: dict[str, dict[str, Figure]] = {}

  def figure(self, metric: str, column: str) -> Figure | None:
    """One metric of all arms that a column is measured with; None if it is with none."""
    if column not in self._known:
      self._known[column] = self._measure(column)
    return self._known[column].get(metric)

  def outcomes(self, column: str, row: str, strength: float) -> list[np.ndarray]:
    """An arm's outcomes, one a seed; of the two worst cases, an example at a time, those of the highest loss."""
    c = self.evaluation.config
    static = tuple(name for name in c.columns if name in (CLEAN, *HOSTILE))
    names = {WORST_STATIC: static, WORST: (*static, *c.adaptive)}.get(column, (column,))
    seeds, found = c.seeds[:1] if row == NONE else c.seeds, []
    for seed in seeds:
      cells = [self.evaluation.found(Key(name, row, strength, seed)) for name in names]
      if cells and all(cell is not None for cell in cells):
        worst_N = np.argmax([cell['loss'] for cell in cells], axis=0)
        stacked = np.stack([cell['outcome'] for cell in cells])
        found.append(stacked[worst_N, np.arange(len(worst_N))])
    return found

  def _measure(self, column: str) -> dict[str, Figure]:
    c = self.evaluation.config
    arms = [(NONE, c.main)] if NONE in c.rows else []
    arms += [(row, strength) for strength in c.strengths for row in c.rows if row != NONE]
    outcomes = {arm: found for arm in arms if (found := self.outcomes(column, *arm))}
    if not outcomes:
      return {}
    columns = [outcome for found in outcomes.values() for outcome in found]
    counts = [len(found) for found in outcomes.values()]
    terms = self._ranking_terms(columns) if len(self.metrics) == 2 else self._next_terms(columns)
    return {metric: _figure(tuple(outcomes), counts, pair) for metric, pair in zip(self.metrics, terms, strict=True)}

  @cached_property
  def _requests(self) -> tuple[RankingPredictions, np.ndarray, np.ndarray]:
    """What happened in the requests; which of an outcome's places are candidates; and whose rows they are."""
    requests = self.evaluation.subject.requests
    count_N = np.array([len(requests.dataset.request(int(row))) for row in requests.request_row])
    mask_NC = np.arange(requests.config.candidates) < count_N[:, None]
    base = predictions_of(requests, np.zeros((int(count_N.sum()), len(requests.schema.labels)), np.float32))
    return base, mask_NC, np.unique(base.user_M, return_inverse=True)[1]

  def _ranking_terms(self, outcomes: Sequence[np.ndarray]) -> list[tuple[Ratio, ...]]:
    base, mask_NC, unit_M = self._requests
    label, units = self.evaluation.subject.label, int(unit_M.max()) + 1
    labels_M, scores = base.labels_MT[:, label], [outcome[mask_NC] for outcome in outcomes]
    hits = [
      GroupedRequests(base.request_M, utility(each, base.label_names, self._weights)).hit_at_k(labels_M, HIT_K)
      for each in scores
    ]
    request_R, first_R = np.unique(base.request_M, return_index=True)
    unit_Q = unit_M[first_R][np.searchsorted(request_R, hits[0].request_Q)]
    hit = Ratio.of(np.stack([each.hit_Q for each in hits], axis=1), unit_Q, units)
    ordered = [SortedScores(labels_M, each[:, label]) for each in scores]
    return [(hit,), auc_terms(ordered, np.ones(len(unit_M), bool), unit_M, units)]

  def _next_terms(self, outcomes: Sequence[np.ndarray]) -> list[tuple[Ratio, ...]]:
    rank_NA = np.stack(outcomes, axis=1)
    gain_NA = np.where(rank_NA <= NDCG_K, 1 / np.log2(1.0 + rank_NA), 0.0)
    return [(Ratio.of(gain_NA, np.arange(len(gain_NA)), len(gain_NA)),)]


def _figure(arms: tuple[Arm, ...], counts: Sequence[int], terms: tuple[Ratio, ...]) -> Figure:
  """A metric of arms whose seeds are neighbouring columns of the terms: one mean, or the two that an AUC is made of."""
  samples = ratios(terms, draws(len(terms[0].counts_U), _RESAMPLES))
  value_S = terms[0].means()
  samples_RS = samples[0] if len(terms) == 1 else samples[0] + samples[1] - value_S
  parts = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
  value_A = np.array([value_S[part].mean() for part in parts])
  std_A = np.array([value_S[part].std(ddof=1) if len(part) > 1 else np.nan for part in parts])
  return Figure(arms, Resampled(value_A, np.stack([samples_RS[:, part].mean(axis=1) for part in parts], axis=1)), std_A)
