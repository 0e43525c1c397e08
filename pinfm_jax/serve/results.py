"""Results of scored requests, as `pinfm score` and the server write them."""

from typing import Any

import numpy as np

from pinfm_jax.serve.manifest import Manifest
from pinfm_jax.serve.requests import ScoringRequest

UTILITY = 'utility'


def score_names(manifest: Manifest) -> tuple[str, ...]:
  """What a candidate's scores are: the labels' probabilities and, if the bundle has utility weights, the utility."""
  return (*manifest.schema.labels, *([UTILITY] if manifest.utility else []))


def with_utility(scores_CT: np.ndarray, manifest: Manifest) -> np.ndarray:
  """The scores of `score_names`: the probabilities [C, labels], and the utility behind them."""
  if not manifest.utility:
    return scores_CT
  weights = np.array([manifest.utility.get(label, 0.0) for label in manifest.schema.labels])
  return np.column_stack([scores_CT, scores_CT.astype(np.float64) @ weights])


def result_document(request: ScoringRequest, names: tuple[str, ...], scores_CN: np.ndarray) -> dict[str, Any]:
  """{"request_id", "scores": [{"item_id", name: score, ...}, ...]}, in the order of the request's candidates."""
  rows = zip(request.item_ids, *scores_CN.T.tolist(), strict=True)
  scores = [dict(zip(('item_id', *names), row, strict=True)) for row in rows]
  return {'request_id': request.request_id, 'scores': scores}
