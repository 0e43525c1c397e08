"""A ranker's predictions on the evaluation requests, and their metrics by label and item age."""

import dataclasses
import difflib
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.evaluate import metrics
from pinfm_jax.evaluate.sorted_auc import SortedScores

AGE_EDGES_HOURS = (24.0, 168.0, 672.0)
HIT_K = 3
_FORMAT = 'pinfm-predictions-1'


@dataclass(frozen=True)
class RankingPredictions:
  """What a ranker said about M candidates, T labels each, beside what happened.

  `reference_MT` holds the true probabilities where they are known (simulated data only). An age is the candidate's
  age at its impression, NaN where the creation time is unknown. `unseen_M` says whether pretraining had no event of the
  item (`splits.pretrained_items`); None in files of versions that did not say. The class checks shapes and that scores
  are finite.
  """

  request_M: np.ndarray  # int64
  user_M: np.ndarray  # int64
  item_key_M: np.ndarray  # uint64
  age_hours_M: np.ndarray  # float32
  labels_MT: np.ndarray  # uint8, 0 or 1
  scores_MT: np.ndarray  # float32 probabilities
  reference_MT: np.ndarray | None  # float32 probabilities
  label_names: tuple[str, ...]
  unseen_M: np.ndarray | None = None  # bool

  def __post_init__(self):
    rows, tasks = len(self.request_M), len(self.label_names)
    for field in dataclasses.fields(self):
      array = getattr(self, field.name)
      if array is None or field.name == 'label_names':
        continue
      expected = (rows, tasks) if field.name.endswith('_MT') else (rows,)
      if array.shape != expected:
        raise ValueError(f'got {field.name} of shape {array.shape}; expected {expected}')
    if not np.isfinite(self.scores_MT).all():
      raise UserError(
        'got predictions that are NaN or infinite; expected finite probabilities: the training diverged, '
        'lower finetune.update.learning_rate and run again'
      )

  def save(self, path: str | Path) -> None:
    """Writes one .npz without pickle; `path` appears only when it is complete."""
    path = Path(path)
    arrays = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
    arrays['label_names'] = np.array(self.label_names, dtype=np.str_)
    partial = path.with_name(path.name + '.partial')
    with open(partial, 'wb') as file:  # a file object: given a name, savez would append another .npz
      np.savez(file, allow_pickle=False, format=np.array(_FORMAT), **arrays)
    os.replace(partial, path)

  @classmethod
  def load(cls, path: str | Path) -> 'RankingPredictions':
    """Reads what `save` wrote.

    Args:
      path: the .npz file.

    Returns:
      The predictions.

    Raises:
      UserError: the file is missing, damaged or holds something else.
    """
    try:
      with open(path, 'rb') as file, np.load(file, allow_pickle=False) as archive:
        if str(archive['format']) != _FORMAT:
          raise ValueError(f'format {archive["format"]}')
        arrays = {f.name: archive[f.name] for f in dataclasses.fields(cls) if f.name in archive}
      names = tuple(str(name) for name in arrays.pop('label_names'))
      return cls(**{'reference_MT': None, 'unseen_M': None, **arrays, 'label_names': names})
    except FileNotFoundError:
      raise UserError(f'{path}: no such file; expected the predictions of a fine-tuned arm: run that stage') from None
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
      raise UserError(
        f'{path}: got a damaged or foreign file ({str(error) or type(error).__name__}); expected predictions written '
        'by an evaluation: delete it and run the stage again'
      ) from None

  @cached_property
  def sorted_scores(self) -> tuple[SortedScores, ...]:
    """The scores of each label, sorted once for all that is measured."""
    return tuple(SortedScores(*column) for column in zip(self.labels_MT.T, self.scores_MT.T, strict=True))

  def label(self, name: str) -> int:
    """The column of a label."""
    return self.label_names.index(name)


def utility_weights(weights: Mapping[str, float], label_names: Sequence[str]) -> np.ndarray:
  """The utility's weights as a vector, checked; a label that is not named weighs 0.

  Args:
    weights: weight of each label's probability (a hide's is negative).
    label_names: the T labels of the data.

  Returns:
    [T] float64.

  Raises:
    UserError: a weight names no label, or every weight is 0.
  """
  for name in weights:
    if name not in label_names:
      near = difflib.get_close_matches(name, label_names, n=1, cutoff=0.0)
      raise UserError(
        f"got a utility weight for '{name}'; expected labels of the data ({', '.join(label_names)}): "
        f"did you mean '{near[0]}'?"
      )
  vector = np.array([weights.get(name, 0.0) for name in label_names], np.float64)
  if not vector.any():
    raise UserError(
      f'got no utility weight other than 0, so nothing orders a request; expected one for at least one of '
      f'{", ".join(label_names)}: set evaluate.utility'
    )
  return vector


def utility(scores_MT: np.ndarray, label_names: Sequence[str], weights: Mapping[str, float]) -> np.ndarray:
  """The one utility that orders a request: sum over labels of weight x predicted probability; [M] float64."""
  return scores_MT.astype(np.float64) @ utility_weights(weights, label_names)


def age_buckets(age_hours_M: np.ndarray, edges: Sequence[float] = AGE_EDGES_HOURS) -> dict[str, np.ndarray]:
  """Boolean masks of the rows by item age, with the names used in figures.

  Args:
    age_hours_M: ages in hours, NaN unknown.
    edges: ascending ages in hours that separate the buckets.

  Returns:
    Masks named 'age<24h', 'age24-168h', ..., 'age>=672h' and 'age_unknown', young to old, the empty ones left out.
  """
  text = [f'{edge:g}' for edge in edges]
  names = [f'age<{text[0]}h', *(f'age{a}-{b}h' for a, b in zip(text, text[1:], strict=False)), f'age>={text[-1]}h']
  bucket_M = np.where(np.isnan(age_hours_M), len(names), np.searchsorted(edges, age_hours_M, side='right'))
  masks = ((name, bucket_M == i) for i, name in enumerate([*names, 'age_unknown']))
  return {name: mask for name, mask in masks if mask.any()}


def slices(
  predictions: RankingPredictions, edges: Sequence[float] = AGE_EDGES_HOURS
) -> Iterator[tuple[str, str, np.ndarray]]:
  """Every (label, bucket, rows) that is measured; the bucket '' holds all rows.

  The item ages part the rows, and so do 'seen' and 'unseen' (by pretraining). Without any known age, or with items of
  one kind only, there is nothing to tell apart and these buckets are not given.
  """
  buckets = {'': np.ones(len(predictions.request_M), bool)}
  if not np.isnan(predictions.age_hours_M).all():
    buckets |= age_buckets(predictions.age_hours_M, edges)
  unseen_M = predictions.unseen_M
  if unseen_M is not None and unseen_M.any() and not unseen_M.all():
    buckets |= {'seen': ~unseen_M, 'unseen': unseen_M}
  for label in predictions.label_names:
    for bucket, rows in buckets.items():
      yield label, bucket, rows


def figure_name(label: str, bucket: str, metric: str) -> str:
  """'save/auc' over all rows, 'save/age<24h/auc' or 'save/unseen/auc' in a bucket."""
  return '/'.join(part for part in (label, bucket, metric) if part)


def grouped_requests(predictions: RankingPredictions, weights: Mapping[str, float]) -> metrics.GroupedRequests:
  """The requests, each ordered once by the utility."""
  utility_M = utility(predictions.scores_MT, predictions.label_names, weights)
  return metrics.GroupedRequests(predictions.request_M, utility_M)


def ranking_metrics(
  predictions: RankingPredictions, weights: Mapping[str, float], age_edges_hours: Sequence[float] = AGE_EDGES_HOURS
) -> dict[str, float]:
  """All metrics of one ranker.

  For each label: auc, per_user_auc (with per_user_auc_users, how many users it counts), logloss, normalised_entropy,
  calibration, hit@3 (with hit@3_requests) and positives over all rows, and auc, logloss, hit@3, hit@3_requests and
  positives by item age, and for items that pretraining has seen and has not. HIT@3 in a bucket asks for a positive of
  that bucket in the top 3 of the whole request.

  Args:
    predictions: M candidates.
    weights: of the utility that orders a request, see `utility`.
    age_edges_hours: edges of the age buckets.

  Returns:
    Flat figures, such as {'save/auc': 0.71, 'save/hit@3': 0.5, 'save/age<24h/auc': 0.66}; undefined ones are NaN.
  """
  requests = grouped_requests(predictions, weights)
  _, user_M = np.unique(predictions.user_M, return_inverse=True)
  figures: dict[str, float] = {}
  for label, bucket, rows in slices(predictions, age_edges_hours):
    column = predictions.label(label)
    labels, scores = predictions.labels_MT[rows, column], predictions.scores_MT[rows, column]
    hit_Q = requests.hit_at_k(predictions.labels_MT[:, column] * rows, HIT_K).hit_Q
    values = {
      'auc': predictions.sorted_scores[column].auc(rows),
      'logloss': metrics.logloss(labels, scores),
      'hit@3': float(hit_Q.mean()) if hit_Q.size else float('nan'),
      'hit@3_requests': float(hit_Q.size),
      'positives': float(labels.sum()),
    }
    if not bucket:
      auc_U = predictions.sorted_scores[column].user_aucs(user_M).auc_U
      values['per_user_auc'] = float(auc_U.mean()) if auc_U.size else float('nan')
      values['per_user_auc_users'] = float(auc_U.size)
      values['normalised_entropy'] = metrics.normalised_entropy(labels, scores)
      values['calibration'] = metrics.calibration(labels, scores)
    figures |= {figure_name(label, bucket, name): value for name, value in values.items()}
  return figures


def reliability(runs: Sequence[RankingPredictions], label: str, bins: int = 10) -> list[list[float]]:
  """How far a label's probabilities can be believed: what was predicted and what happened, low to high.

  The rows of all seeds are sorted by their prediction and cut into parts of one size; equal predictions stay together,
  so that a part may be missing.

  Args:
    runs: an arm's predictions, one a seed.
    label: which one.
    bins: how many parts.

  Returns:
    [mean prediction, share of positives, rows] of each part.
  """
  scores = np.concatenate([run.scores_MT[:, run.label(label)] for run in runs]).astype(np.float64)
  labels = np.concatenate([run.labels_MT[:, run.label(label)] for run in runs])
  order = np.argsort(scores)
  edges = np.unique(scores[order[np.arange(1, bins) * len(scores) // bins]]) if len(scores) else []
  part_M = np.searchsorted(edges, scores, side='right')
  counts = np.bincount(part_M)
  sums = zip(np.bincount(part_M, scores), np.bincount(part_M, labels), counts, strict=True)
  return [[float(p / n), float(y / n), float(n)] for p, y, n in sums if n]


def best_attainable(
  predictions: RankingPredictions, weights: Mapping[str, float], age_edges_hours: Sequence[float] = AGE_EDGES_HOURS
) -> dict[str, float] | None:
  """`ranking_metrics` of the true probabilities: what a ranker that knows them gets; None where they are not known."""
  if predictions.reference_MT is None:
    return None
  oracle = dataclasses.replace(predictions, scores_MT=predictions.reference_MT)
  return ranking_metrics(oracle, weights, age_edges_hours)
