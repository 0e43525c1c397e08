"""What a bundle's scorer has to give, straight from the Flax module and float32 tables: for the tests of serving."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import toy_bundle

from pinfm_jax.data.featurize import candidate_inputs, event_inputs
from pinfm_jax.data.tokens import TokenInputs
from pinfm_jax.model.hashing import hash_rows, key_words
from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.model.ranker import CandidateBatch
from pinfm_jax.serve.manifest import Manifest
from pinfm_jax.serve.requests import RequestParser, ScoringRequest

LENGTH = toy_bundle.LENGTH


@dataclass(frozen=True)
class OpenedBundle:
  """What the commands read of an opened bundle."""

  path: Path
  manifest: Manifest


class OracleScorer:
  """`users`, `items` and `pairs` of a toy ranker; padded to few sizes, so that little is compiled."""

  def __init__(self, toy: toy_bundle.Toy, bundle: Any):
    self.bundle, self._toy = bundle, toy
    self.parse = RequestParser(bundle.manifest).parse

  @cached_property
  def tokens(self) -> TokenInputs:
    return self._toy.tokens

  def users(self, requests: list[ScoringRequest]) -> np.ndarray:
    return np.concatenate([self._context(request).user_UO for request in requests])

  def items(self, keys: np.ndarray) -> dict[str, np.ndarray]:
    more = self.tokens.items.inputs(keys) if self.tokens.items else {}
    arguments = (self._rows(keys), more.get('content'), more.get('new'))
    z, e = self._toy.module.apply({'params': self._toy.params}, *arguments, method='item_vectors')
    return {'target': np.asarray(z), 'vector': np.asarray(e)}

  def pairs(self, requests: list[ScoringRequest]) -> list[np.ndarray]:
    return [self._pairs(request) for request in requests]

  def _pairs(self, request: ScoringRequest) -> np.ndarray:
    count = len(request.item_ids)
    content = None if request.content is None else np.zeros_like(request.content)
    arguments = (content, self.tokens, request.last_event_ms, request.content)
    columns = candidate_inputs(request.candidates, slice(0, 8), 8, toy_bundle.SCHEMA, *arguments)
    names = ('item', 'mask', 'age_hours', 'dense', 'sparse', 'embedding', 'gap', 'content', 'new')
    batch = CandidateBatch(*(columns[name][None] if name in columns else None for name in names))
    out = self._apply('pairs', self._rows(columns['item'])[None], self._context(request), batch)
    assert count <= 8
    return np.asarray(out)[0, :count]

  def _context(self, request: ScoringRequest) -> Any:
    columns = event_inputs(request.history, request.window, LENGTH, self.tokens, request.history_content)
    columns = {name: column[None] for name, column in columns.items()}
    plain = (columns[name] for name in ('item', 'surface', 'actions', 'mask'))
    more = {'gap_UL': columns.get('gap'), 'content_ULW': columns.get('content'), 'hidden_id_UL': columns.get('new')}
    batch = EventBatch(*plain, **more)
    return self._apply('context', self._rows(columns['item']), batch)

  def _apply(self, method: str, *arguments: Any) -> Any:
    return self._jitted(method, self._toy.params, *arguments)

  @cached_property
  def _jitted(self) -> Any:
    def apply(method: str, params: Any, *arguments: Any) -> Any:
      return self._toy.module.apply({'params': params}, *arguments, method=method)

    return jax.jit(apply, static_argnums=0)

  def _rows(self, keys_or_words: np.ndarray) -> np.ndarray:
    words = key_words(keys_or_words) if keys_or_words.dtype == np.uint64 else keys_or_words
    return self._toy.rows_GE[hash_rows(words, 2, 50, 3)].reshape(*words.shape[:-1], 16)
