"""From scores to output tensors: `response` as `pinfm score` writes it, and one tensor a label."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.serve.fields import show
from pinfm_jax.serve.http.protocol import HttpError, InferRequest, Tensor, bytes_array
from pinfm_jax.serve.manifest import Manifest
from pinfm_jax.serve.requests import ScoringRequest
from pinfm_jax.serve.results import UTILITY, result_document, score_names, with_utility

RESPONSE = 'response'


class OutputWriter:
  """Makes the output tensors of a bundle."""

  def __init__(self, manifest: Manifest):
    """Takes labels and weights.

    Raises:
      UserError: a label with the name of another output.
    """
    self._manifest, self.numeric = manifest, score_names(manifest)
    taken = sorted({RESPONSE, UTILITY} & set(manifest.schema.labels))
    if taken:
      raise UserError(
        f'the bundle has the label {taken[0]!r}, which names another output of the server; rename the label'
      )

  def describe(self) -> list[dict[str, Any]]:
    """The outputs of the model's metadata."""
    numeric = [{'name': name, 'datatype': 'FP32', 'shape': [-1, -1]} for name in self.numeric]
    return [{'name': RESPONSE, 'datatype': 'BYTES', 'shape': [-1]}, *numeric]

  def wanted(self, request: InferRequest, whole: bool) -> dict[str, bool]:
    """Names of the outputs to make -> whether in binary.

    Args:
      request: the decoded request.
      whole: its input is `request`, so that its default output is `response`; else the numeric ones.

    Raises:
      HttpError: 400, an output that the model does not have.
    """
    if request.outputs is None:
      return dict.fromkeys((RESPONSE,) if whole else self.numeric, request.binary)
    for name in request.outputs:
      if name != RESPONSE and name not in self.numeric:
        expected = ', '.join((RESPONSE, *self.numeric))
        raise HttpError(400, f'got the output {show(name)}, which the model does not have; expected some of {expected}')
    return dict(request.outputs)

  def tensors(
    self, names: Sequence[str], requests: Sequence[ScoringRequest], scores: Sequence[np.ndarray], width: int | None
  ) -> list[Tensor]:
    """The output tensors.

    Args:
      names: which.
      requests: what was scored.
      scores: [C, labels] of each.
      width: C of the numeric outputs, NaN behind a request's candidates; None = all requests have equally many.

    Raises:
      HttpError: 400, numeric outputs of requests with different numbers of candidates.
    """
    values = [with_utility(scores_CT, self._manifest) for scores_CT in scores]
    made = []
    for name in names:
      if name == RESPONSE:
        texts = [self._text(request, v) for request, v in zip(requests, values, strict=True)]
        made.append(Tensor(name, 'BYTES', bytes_array(texts, (len(texts),))))
      else:
        column = self.numeric.index(name)
        made.append(Tensor(name, 'FP32', _stacked(name, [v[:, column] for v in values], width)))
    return made

  def _text(self, request: ScoringRequest, scores_CN: np.ndarray) -> bytes:
    return json.dumps(result_document(request, self.numeric, scores_CN)).encode()


def _stacked(name: str, columns: list[np.ndarray], width: int | None) -> np.ndarray:
  counts = {len(column) for column in columns}
  if width is None:
    if len(counts) > 1:
      raise HttpError(
        400, f'the output {name!r} needs requests with equally many candidates, got {min(counts)} to {max(counts)}; '
             f'ask for {RESPONSE!r}, or send them apart'
      )  # fmt: skip
    width = counts.pop() if counts else 0
  stacked = np.full((len(columns), width), np.nan, np.float32)
  for row, column in zip(stacked, columns, strict=True):
    row[: len(column)] = column
  return stacked
