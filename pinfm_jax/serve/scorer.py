"""Scores ranking requests with a bundle: exported programs, mapped rows, and the featurizing code of training."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pinfm_jax.data.featurize import candidate_inputs, event_inputs
from pinfm_jax.data.tokens import PLAIN, TokenInputs
from pinfm_jax.errors import UserError
from pinfm_jax.progress import Progress
from pinfm_jax.serve.bundle import Bundle, load_bundle
from pinfm_jax.serve.requests import RequestParser, ScoringRequest

Arrays = dict[str, np.ndarray]
_LEAST_EVENTS = 32
_LEAST_CANDIDATES = 8


class Scorer:
  """Scores requests in batches; every batch has one of few sizes, so that few programs are compiled."""

  def __init__(self, bundle: Bundle, max_users: int = 32, max_candidates: int = 8192):
    """Puts the parameters on the device.

    Args:
      bundle: an opened bundle.
      max_users: requests of a batch.
      max_candidates: padded candidates of a batch; a longer request is scored in several passes over one context.
    """
    self.bundle = bundle
    self._max_users, self._max_candidates = max_users, max_candidates
    self._parser = RequestParser(bundle.manifest)
    model = bundle.manifest.pinfm
    self._tokens = TokenInputs(model.tower.time_gap_buckets, bundle.items) if model is not None else PLAIN
    self._params, self._stats = jax.device_put((bundle.params, bundle.stats))
    self._context = jax.jit(bundle.context.call) if bundle.context else None
    self._crossing = jax.jit(bundle.crossing.call)

  @classmethod
  def load(cls, path: str | Path) -> 'Scorer':
    """Opens and checks the bundle in the directory `path` (see `load_bundle`)."""
    return cls(load_bundle(path))

  def score(self, requests: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Scores requests in the form of `serve.requests`.

    Args:
      requests: decoded JSON objects; read no further ahead than a batch needs.

    Yields:
      {"request_id", "scores": [{"item_id", <label>: probability, ..., "utility"}, ...]} for each request, in the
      order of the requests and of their candidates; "utility" only if the bundle has utility weights.

    Raises:
      UserError: a malformed request; the message has its number, counted from 1.
    """
    return self._score((f'request {i}', request) for i, request in enumerate(requests, 1))

  def parse(self, document: Any) -> ScoringRequest:
    """Checks one request.

    Raises:
      UserError: anything wrong with it.
    """
    return self._parser.parse(document)

  def probabilities(self, requests: list[ScoringRequest]) -> list[np.ndarray]:
    """[C, T] of each request."""
    scores: list[np.ndarray] = []
    batch: list[ScoringRequest] = []
    for request in requests:
      if batch and not self._fits([*batch, request]):
        scores, batch = scores + self._probabilities(batch), []
      batch.append(request)
    return scores + self._probabilities(batch)

  def results(self, requests: list[ScoringRequest]) -> list[dict[str, Any]]:
    """The result of each request."""
    return list(self._results(requests))

  def warm_up(self, progress: Progress | None = None) -> int:
    """Compiles nothing here."""
    return 0

  def score_batch(self, events: Arrays, candidates: Arrays) -> np.ndarray:
    """Scores stacked model inputs.

    Args:
      events: what `featurize.history_inputs` makes, [U, L, ...]; unused by a ranker without PinFM.
      candidates: what `featurize.candidate_inputs` makes, [U, C, ...].

    Returns:
      Probabilities, float32 [U, C, T]; those of padded candidates mean nothing.
    """
    return self.cross(self.context(events), events, candidates)

  def context(self, events: Arrays) -> dict[str, jax.Array] | None:
    """The context pass: keys and values of the histories, kept on the device (None without PinFM)."""
    if self._context is None:
      return None
    inputs = {name: column for name, column in events.items() if name != 'item'}
    return self._context(self._params, {**inputs, 'rows': self.bundle.rows.rows(events['item'])})

  def cross(self, context: dict[str, jax.Array] | None, events: Arrays, candidates: Arrays) -> np.ndarray:
    """The crossing pass and the ranker over the kept context of the same users; see `score_batch`."""
    inputs = {name: value for name, value in candidates.items() if name != 'labels'}
    if context is None:
      return np.asarray(self._crossing(self._params, self._stats, inputs))
    inputs['rows'] = self.bundle.rows.rows(candidates['item'])
    return np.asarray(self._crossing(self._params, self._stats, context, events['mask'], inputs))

  def _score(self, requests: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """`score` of requests that each come with the words that say where they stand."""
    batch: list[ScoringRequest] = []
    for where, document in requests:
      try:
        request = self._parser.parse(document)
      except UserError as error:
        name = document.get('request_id') if isinstance(document, dict) else None
        raise UserError(f'{where}{f" ({name!r})" if name is not None else ""}: {error}') from None
      if batch and not self._fits([*batch, request]):
        yield from self._results(batch)
        batch = []
      batch.append(request)
    yield from self._results(batch)

  def _fits(self, batch: list[ScoringRequest]) -> bool:
    candidates = _bucket(max(len(r.item_ids) for r in batch), _LEAST_CANDIDATES)
    return len(batch) <= self._max_users and _bucket(len(batch), 1) * candidates <= self._max_candidates

  def _results(self, batch: list[ScoringRequest]) -> Iterator[dict[str, Any]]:
    manifest = self.bundle.manifest
    weights = np.array([manifest.utility.get(label, 0.0) for label in manifest.schema.labels])
    for request, scores_CT in zip(batch, self._probabilities(batch), strict=True):
      names, rows = manifest.schema.labels, scores_CT.tolist()
      if manifest.utility:
        names = (*names, 'utility')
        rows = np.column_stack([scores_CT, scores_CT.astype(np.float64) @ weights]).tolist()
      ids = request.item_ids
      scores = [{'item_id': i, **dict(zip(names, row, strict=True))} for i, row in zip(ids, rows, strict=True)]
      yield {'request_id': request.request_id, 'scores': scores}

  def _probabilities(self, batch: list[ScoringRequest]) -> list[np.ndarray]:
    """[C, T] of each request."""
    schema = self.bundle.manifest.schema
    most = max((len(r.item_ids) for r in batch), default=0)
    if not most:
      return [np.zeros((0, len(schema.labels)), np.float32) for _ in batch]
    events = self._events(batch)
    width = min(_bucket(most, _LEAST_CANDIDATES), max(self._max_candidates // len(events['mask']), 1))
    context, parts = self.context(events), []
    contents = [self._content(r) for r in batch]
    for start in range(0, most, width):
      rows = slice(start, start + width)
      inputs = [
        candidate_inputs(r.candidates, rows, width, schema, content, self._tokens, r.last_event_ms, r.content)
        for r, content in zip(batch, contents, strict=True)
      ]
      parts.append(self.cross(context, events, _stack(inputs, len(events['mask']))))
    scores_UCT = np.concatenate(parts, axis=1)
    return [scores_CT[: len(r.item_ids)] for r, scores_CT in zip(batch, scores_UCT, strict=False)]

  def _events(self, batch: list[ScoringRequest]) -> Arrays:
    most = max(r.window.stop - r.window.start for r in batch)
    length = min(_bucket(most, _LEAST_EVENTS), self.bundle.manifest.schema.history_length)
    inputs = [event_inputs(r.history, r.window, length, self._tokens, r.history_content) for r in batch]
    return _stack(inputs, _bucket(len(batch), 1))

  def _content(self, request: ScoringRequest) -> np.ndarray | None:
    """Content of the candidates as a feature of the ranker: their own, else what the bundle knows, else zeros."""
    if request.content is None:
      return None
    items = self._tokens.items
    known = items.inputs(request.candidates.item)['content'] if items else np.float32(0)
    return np.where(np.isnan(request.content).any(axis=1, keepdims=True), known, request.content)


def score_file(bundle: str | Path, requests: str | Path, out: str | Path) -> int:
  """Scores a file of requests, one a line (blank lines are skipped), into a file of results, one a line.

  Args:
    bundle: directory of the bundle.
    requests: JSONL, see `serve.requests`.
    out: JSONL; it appears only when every request is scored.

  Returns:
    The number of requests.

  Raises:
    UserError: a file or the bundle cannot be read or written, or a line is malformed (the line is named).
  """
  requests, out = Path(requests), Path(out)
  if not requests.is_file():
    raise UserError(f'{requests}: no such file; expected ranking requests, one JSON object a line')
  if out.is_dir() or not out.absolute().parent.is_dir():
    raise UserError(f'{out} cannot be written: expected the name of a file in a directory that exists')
  if out.exists() and out.samefile(requests):
    raise UserError(f'{out} holds the requests; give another --out')
  scorer = Scorer.load(bundle)
  with open(requests, 'rb') as file:
    progress = Progress('score', sum(1 for line in file if line.strip()), 'requests')
  partial, count = out.with_name(f'{out.name}.partial-{os.getpid()}'), 0
  try:
    with open(partial, 'w', encoding='utf-8') as file:
      for count, result in enumerate(scorer._score(_lines(requests)), 1):
        file.write(json.dumps(result) + '\n')
        progress.update(count)
    os.replace(partial, out)
  except OSError as error:
    raise UserError(f'{out} cannot be written ({error.strerror}); give another --out') from error
  finally:
    partial.unlink(missing_ok=True)
  progress.close()
  return count


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        where = f'{path}, line {number}'
        try:
          document = json.loads(line)
        except (ValueError, RecursionError) as error:
          raise UserError(f'{where}: not valid JSON ({error}); expected one request a line') from None
        yield where, document


def _stack(inputs: list[Arrays], users: int) -> Arrays:
  """Stacks the users' inputs; users that pad the batch are zeros, hence empty histories."""
  padding = [{name: np.zeros_like(value) for name, value in inputs[0].items()}] * (users - len(inputs))
  return {name: np.stack([each[name] for each in inputs + padding]) for name in inputs[0]}


def _bucket(count: int, least: int) -> int:
  """The smallest power of two that is at least `count` and `least`."""
  return 1 << (max(count, least) - 1).bit_length()
