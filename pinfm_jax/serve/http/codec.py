"""Bodies to ranking requests, and scores to bodies: the work of an inference call that is not scoring."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.serve.http.inputs import REQUEST
from pinfm_jax.serve.http.models import Served
from pinfm_jax.serve.http.protocol import HttpError, decode_request, encode_response, inflate
from pinfm_jax.serve.requests import ScoringRequest

_WORDS = {'candidates': 'candidates', 'history': 'events in the history'}


@dataclass(frozen=True)
class Call:
  """A decoded inference call.

  Attributes:
    id: given back.
    timeout_s: how long the client waits, None = it did not say.
    requests: to be scored.
    outputs: names of the outputs -> whether in binary.
    width: C of numeric outputs, where tensors say it; None = all requests must have equally many candidates.
  """

  id: str
  timeout_s: float | None
  requests: list[ScoringRequest]
  outputs: dict[str, bool]
  width: int | None


class Codec:
  """Decodes and encodes; its methods run on worker threads."""

  def __init__(self, name: str, max_body: int, max_requests: int, max_candidates: int, max_events: int):
    """Takes the model's name, and what a call may ask for (see `app.Limits`)."""
    self._name, self._max_body, self._max_requests = name, max_body, max_requests
    self._most = {'candidates': max_candidates, 'history': max_events}

  def decode(self, served: Served, body: bytes, encoding: str, header_length: str | None) -> Call:
    """Decodes and checks a body.

    Args:
      served: the bundle that will score it.
      body: as received.
      encoding: the header Content-Encoding.
      header_length: the header Inference-Header-Content-Length.

    Raises:
      HttpError: anything wrong with it.
    """
    request = decode_request(inflate(body, encoding.strip().lower(), self._max_body), header_length)
    for tensor in request.inputs.values():  # before a document is made of each: an empty tensor may claim any shape
      if tensor.array.ndim and len(tensor.array) > self._max_requests:
        raise HttpError(413, f'got {len(tensor.array)} requests at once, at most {self._max_requests} are allowed')
    whole = REQUEST in request.inputs
    outputs = served.outputs.wanted(request, whole)
    documents = served.inputs.documents(request.inputs, request.id)
    width = None if whole else request.inputs['candidate_item_id'].array.shape[1]
    requests = [self._checked(served, i, document) for i, document in enumerate(documents)]
    return Call(request.id, request.timeout_s, requests, outputs, width)

  def encode(self, served: Served, call: Call, scores: list[np.ndarray]) -> tuple[bytes, dict[str, str]]:
    """The body of the answer, and its headers.

    Raises:
      HttpError: numeric outputs of requests with different numbers of candidates.
    """
    about = {'model_name': self._name, 'model_version': served.version} | ({'id': call.id} if call.id else {})
    tensors = served.outputs.tensors(list(call.outputs), call.requests, scores, call.width)
    return encode_response(about, list(zip(tensors, call.outputs.values(), strict=True)))

  def _checked(self, served: Served, i: int, document: Any) -> ScoringRequest:
    for name, most in self._most.items():
      listed = document.get(name) if isinstance(document, dict) else None
      if isinstance(listed, list) and len(listed) > most:
        raise HttpError(413, f'request {i}: got {len(listed)} {_WORDS[name]}, at most {most} are allowed')
    try:
      return served.scorer.parse(document)
    except UserError as error:
      raise HttpError(400, f'request {i}: {error}') from None
