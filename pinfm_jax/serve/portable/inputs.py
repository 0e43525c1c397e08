"""Makes the inputs of the portable programs from ranking requests, as a client of Triton or ONNX Runtime needs them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pinfm_jax.data.featurize import candidate_inputs, event_inputs
from pinfm_jax.data.tokens import PLAIN, TokenInputs
from pinfm_jax.serve.batches import joined
from pinfm_jax.serve.bundle import TABLES, check_files
from pinfm_jax.serve.items import map_items
from pinfm_jax.serve.manifest import Manifest
from pinfm_jax.serve.portable.export import PortableManifest
from pinfm_jax.serve.requests import RequestParser, ScoringRequest
from pinfm_jax.serve.rows.mapped import MappedRows, RowSource

Arrays = dict[str, np.ndarray]
_EVENTS = ('surface', 'actions', 'mask', 'gap', 'content', 'new')
_CANDIDATES = ('dense', 'sparse', 'embedding', 'gap', 'content', 'new', 'recent_item')


class StackedInputs:
  """Reads requests in the form of `serve.requests` and looks their items up; needs NumPy and no accelerator."""

  def __init__(self, directory: str | Path, manifest: Manifest, rows: RowSource | None = None):
    """Maps tables and items.

    Args:
      directory: what `pinfm export` wrote.
      manifest: what it says of itself.
      rows: where packed rows come from; None = the directory's own tables.
    """
    model = manifest.pinfm
    self.manifest, self._parser = manifest, RequestParser(manifest)
    self._rows = rows or (MappedRows(Path(directory) / TABLES, manifest.tables) if manifest.tables else None)
    items = map_items(Path(directory), model) if model is not None and model.content else None
    self._tokens = PLAIN if model is None else TokenInputs(model.tower.time_gap_buckets, items)

  @classmethod
  def load(cls, directory: str | Path, rows: RowSource | None = None) -> 'StackedInputs':
    """Opens what `pinfm export --format onnx` (or savedmodel) wrote, and checks its files as a bundle's are.

    Raises:
      UserError: no such directory, or a damaged file.
    """
    manifest = PortableManifest.read(directory).bundle
    check_files(Path(directory), manifest.files)
    return cls(directory, manifest, rows)

  def parse(self, document: Any) -> ScoringRequest:
    """Checks a request (a decoded JSON object); raises UserError."""
    return self._parser.parse(document)

  def context(self, requests: Sequence[ScoringRequest], length: int | None = None) -> Arrays:
    """Inputs of `context`: the requests' histories, padded to `length` events or to the longest.

    Raises:
      ValueError: `length` is less than the longest history's window, or more than the model reads.
    """
    longest = max([1, *(r.window.stop - r.window.start for r in requests)])
    length, most = length or longest, self.manifest.schema.history_length
    if not longest <= length <= most:
      raise ValueError(f'got length {length}, expected {longest} (the longest window) to {most} events')
    inputs = [event_inputs(r.history, r.window, length, self._tokens, r.history_content) for r in requests]
    return self._stacked(inputs, _EVENTS)

  def candidates(self, requests: Sequence[ScoringRequest], count: int | None = None) -> Arrays:
    """Inputs of `crossing` but for what `context` gives: the first `count`, or all."""
    count = count or max([1, *(len(r.item_ids) for r in requests)])
    schema, tokens = self.manifest.schema, self._tokens

    def inputs(r: ScoringRequest) -> Arrays:
      content = r.candidate_content(tokens)
      return candidate_inputs(r.candidates, slice(0, count), count, schema, content, tokens, r.last_event_ms, r.content)

    recent = joined([r.recent(schema, tokens) for r in requests]) if schema.recent_length and requests else {}
    return self._stacked([inputs(r) for r in requests], _CANDIDATES) | recent

  def _stacked(self, inputs: list[Arrays], names: tuple[str, ...]) -> Arrays:
    stacked = {name: np.stack([each[name] for each in inputs]) for name in names if name in inputs[0]}
    if self._rows is None:
      return stacked
    return {**stacked, 'rows': self._rows.rows(np.stack([each['item'] for each in inputs]))}
