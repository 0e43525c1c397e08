"""Scores ranking requests with a bundle: exported programs, mapped rows, and the featurizing code of training."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pinfm_jax.data.featurize import joined_candidates
from pinfm_jax.data.tokens import PLAIN, TokenInputs
from pinfm_jax.errors import UserError
from pinfm_jax.files import complete_file
from pinfm_jax.model.hashing import key_words
from pinfm_jax.progress import Progress
from pinfm_jax.serve import batches
from pinfm_jax.serve.batches import DEFAULT_SIZES, Sizes
from pinfm_jax.serve.bundle import Bundle, load_bundle
from pinfm_jax.serve.cache import Arrays, SlotCache, Window
from pinfm_jax.serve.documents import count_documents, read_documents
from pinfm_jax.serve.fields import show
from pinfm_jax.serve.pool import Pool, empty_pool, slot_bytes
from pinfm_jax.serve.requests import RequestParser, ScoringRequest
from pinfm_jax.serve.results import result_document, score_names, with_utility
from pinfm_jax.serve.rows.mapped import RowSource


class Scorer:
  """Scores requests in batches; every call of a program has one of few sizes, so that few programs are compiled.

  The keys and values of users are kept (`serve.cache`): a history that was seen before costs nothing, appended events
  cost themselves. Scores equal those of a pass over the whole window, up to rounding. One thread at a time may use it,
  `parse` excepted, which any thread may call.

  Attributes:
    bundle: what is served.
    cache: counts `hits`, `extended`, `misses` (of requests) and `evicted` (of slots).
  """

  def __init__(self, bundle: Bundle, sizes: Sizes = DEFAULT_SIZES):
    """Puts the parameters and an empty pool on the device.

    Args:
      bundle: an opened bundle.
      sizes: what bounds its memory.
    """
    self.bundle, self._sizes = bundle, sizes
    manifest = bundle.manifest
    self._parser = RequestParser(manifest)
    self._params, self._stats = jax.device_put((bundle.params, bundle.stats))
    self._programs = {
      name: jax.jit(program.call, donate_argnums=1 if name in ('context', 'extend') else ())
      for name, program in bundle.programs.items()
    }
    self._user_rows = jax.jit(lambda user_PO, slot_U: user_PO[slot_U])
    model, length = manifest.pinfm, manifest.schema.history_length
    self._tokens = TokenInputs(model.tower.time_gap_buckets, bundle.items) if model is not None else PLAIN
    slots = sizes.slots(slot_bytes(model, manifest.ranking, length)) if model is not None else 0
    appended = min(batches.MOST_APPENDED, length) if 'extend' in self._programs else 0
    self.cache = SlotCache(slots, appended)
    self._pool: Pool | None = None
    self._most_users = min(sizes.max_users, slots) if slots else sizes.max_users
    self._reset()

  @classmethod
  def load(cls, path: str | Path, rows: RowSource | None = None, sizes: Sizes = DEFAULT_SIZES) -> 'Scorer':
    """Opens and checks the bundle in the directory `path` (see `load_bundle`)."""
    return cls(load_bundle(path, rows=rows), sizes)

  def parse(self, document: Any) -> ScoringRequest:
    """Checks one decoded JSON object (see `serve.requests`).

    Raises:
      UserError: it is malformed; the message says where in the request.
    """
    return self._parser.parse(document)

  def score(self, requests: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Scores requests in the form of `serve.requests`.

    Args:
      requests: decoded JSON objects; read no further ahead than a batch needs.

    Yields:
      See `results`; in the order of the requests.

    Raises:
      UserError: a malformed request; the message has its number, counted from 1.
    """
    return self._score((f'request {i}', request) for i, request in enumerate(requests, 1))

  def results(self, requests: Sequence[ScoringRequest]) -> list[dict[str, Any]]:
    """Scores checked requests, any number of them.

    Returns:
      {"request_id", "scores": [{"item_id", <label>: probability, ..., "utility"}, ...]} for each request, in the order
      of its candidates; "utility" only if the bundle has utility weights.
    """
    manifest = self.bundle.manifest
    names, scored = score_names(manifest), zip(requests, self.probabilities(requests), strict=True)
    return [result_document(request, names, with_utility(scores_CT, manifest)) for request, scores_CT in scored]

  def probabilities(self, requests: Sequence[ScoringRequest]) -> list[np.ndarray]:
    """Probabilities, float32 [C, labels], of each of any number of requests.

    Raises:
      UserError: the bundle is a tower alone.
    """
    self.check_ranks()
    width = len(self.bundle.manifest.schema.labels)
    return self._crossed(requests, 'crossing', (self._params, self._stats), width)

  def pairs(self, requests: Sequence[ScoringRequest]) -> list[np.ndarray]:
    """PinFM's output at the candidates' positions, unit-length float32 [C, O], of each request.

    Raises:
      UserError: the ranker has no PinFM, or the bundle is a tower alone.
    """
    self.check_ranks()
    return self._crossed(requests, 'pairs', (self._params,), self._output_width())

  def users(self, requests: Sequence[ScoringRequest]) -> np.ndarray:
    """H of each request's last event, float32 [n, O], unit-length but with `dot_product`; zeros for an empty history.

    Raises:
      UserError: the ranker has no PinFM.
    """
    out = np.zeros((len(requests), self._output_width()), np.float32)
    for start in range(0, len(requests), self._most_users):
      slot_U = self._slots(requests[start : start + self._most_users])
      rows = self._user_rows(self._pool['user'], np.pad(slot_U, (0, self._most_users - len(slot_U))))
      out[start : start + len(slot_U)] = np.asarray(rows)[: len(slot_U)]
    return out

  def items(self, keys: np.ndarray) -> Arrays:
    """Vectors of items.

    Args:
      keys: uint64 item keys [n] (`data.events.id_key`); an item that training never saw is fine.

    Returns:
      target: z, float32 [n, O], which H is compared with, unit-length but with `dot_product`.
      vector: E, float32 [n, V].

    Raises:
      UserError: the ranker has no PinFM.
    """
    width, tables = self._output_width(), self.bundle.manifest.tables
    widths = {'target': width, 'vector': tables.sub_tables * tables.width}
    out = {name: np.zeros((len(keys), size), np.float32) for name, size in widths.items()}
    for start in range(0, len(keys), batches.ITEMS[-1]):
      some = np.asarray(keys[start : start + batches.ITEMS[-1]], np.uint64)
      size = next(size for size in batches.ITEMS if size >= len(some))
      inputs = {'rows': self.bundle.rows.rows(key_words(some)), **self._tokens_of(some)}
      inputs = {name: np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)]) for name, x in inputs.items()}
      for name, rows in self._programs['items'](self._params, inputs).items():
        out[name][start : start + len(some)] = np.asarray(rows)[: len(some)]
    return out

  def check_ranks(self) -> None:
    """Raises UserError if the bundle is a tower alone, which scores no candidates."""
    if not self.bundle.manifest.ranks:
      raise UserError(
        f'{self.bundle.path} is a tower without a ranker: it scores no candidates; `pinfm recommend` and '
        '`pinfm embed` with --users or --items take it'
      )

  def forget(self) -> None:
    """Forgets all users: the next request of each is computed from its events."""
    self.cache.clear()
    self._parser.forget()

  def warm_up(self) -> int:
    """Compiles every program in every size that scoring and `users` call, so that no request waits for it.

    JAX's persistent compilation cache, where it is set, makes the next start quick.

    Returns:
      How many.
    """
    empty, calls = self.parse({'request_id': 0, 'history': [], 'candidates': []}), []
    if self._pool is not None:
      window = self._with_rows([empty.model_window(self._tokens).columns])
      length = self.bundle.manifest.schema.history_length
      for name, lengths in (('context', batches.event_sizes(length)), ('extend', batches.appended_sizes(length))):
        if name in self._programs:
          calls += [(self._warm_events, name, window, u, k) for u in self._event_rows(name) for k in lengths]
      calls.append((self.users, [empty]))
    if self.bundle.manifest.ranks:
      candidates, recent = self._candidates([empty]), self._recent([empty])
      calls += [(self._warm_crossing, candidates, recent, size) for size in self._sizes.tiles()]
    for function, *arguments in calls:
      function(*arguments)
    return len(calls)

  def _score(self, requests: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """`score` of requests that each come with the words that say where they stand."""
    batch: list[ScoringRequest] = []
    for where, document in requests:
      try:
        request = self.parse(document)
      except UserError as error:
        name = document.get('request_id') if isinstance(document, dict) else None
        raise UserError(f'{where}{f" ({show(name)})" if name is not None else ""}: {error}') from None
      if batch and not self._fits(batch, request):
        yield from self.results(batch)
        batch = []
      batch.append(request)
    yield from self.results(batch)

  def _fits(self, batch: list[ScoringRequest], request: ScoringRequest) -> bool:
    rows = sum(len(r.item_ids) for r in batch) + len(request.item_ids)
    return len(batch) < self._most_users and rows <= self._sizes.batch_rows

  def _crossed(
    self, requests: Sequence[ScoringRequest], program: str, arguments: tuple, width: int
  ) -> list[np.ndarray]:
    """A crossing program's output [C, width] of each request."""
    out = [np.zeros((0, width), np.float32) for _ in requests]
    batch: list[int] = []
    for place, request in enumerate(requests):
      if not request.item_ids:  # nothing to score, and no context to keep
        continue
      if batch and not self._fits([requests[i] for i in batch], request):
        self._cross_batch(requests, batch, program, arguments, out)
        batch = []
      batch.append(place)
    if batch:
      self._cross_batch(requests, batch, program, arguments, out)
    return out

  def _cross_batch(
    self, requests: Sequence[ScoringRequest], batch: list[int], program: str, arguments: tuple, out: list[np.ndarray]
  ) -> None:
    """Fills in `out` at the places `batch`."""
    some = [requests[place] for place in batch]
    flat, count_U = self._candidates(some), np.array([len(request.item_ids) for request in some])
    pooled, recent = self._pool is not None, self._recent(some)
    slot_U = self._slots(some) if pooled else None
    # Where nothing of the users is read, a candidate's does not matter: all are one user's.
    tiled = count_U if pooled or recent else np.array([count_U.sum()])
    first_U, calls = np.cumsum(tiled) - tiled, []
    for group in self._sizes.tile_groups(tiled):
      place_MT = first_U[group.user_M][:, None] + group.places
      inputs = {name: column[place_MT] for name, column in flat.items()} | {'mask': group.mask}
      inputs |= {name: column[group.user_M] for name, column in recent.items()}
      users = (self._pool, slot_U[group.user_M]) if pooled else ()
      calls.append((place_MT[group.mask], group.mask, self._programs[program](*arguments, *users, inputs)))
    scores = np.empty((len(flat['item']), out[batch[0]].shape[1]), np.float32)
    for places, mask, found in calls:  # after all are queued
      scores[places] = np.asarray(found)[mask]
    for place, part in zip(batch, np.split(scores, np.cumsum(count_U)[:-1]), strict=True):
      out[place] = part

  def _candidates(self, requests: Sequence[ScoringRequest]) -> Arrays:
    """Inputs of all the requests' candidates, one after another."""
    schema = self.bundle.manifest.schema
    content = [r.candidate_content(self._tokens) for r in requests] if schema.content_width else None
    own = [r.content for r in requests] if content and self._tokens.items else None
    flat = joined_candidates(
      [r.candidates for r in requests],
      schema,
      np.concatenate(content) if content else None,
      self._tokens,
      [r.last_event_ms for r in requests],
      np.concatenate(own) if own else None,
    )
    if self.bundle.rows is not None:
      flat['rows'] = self.bundle.rows.rows(flat['item'])
    return flat

  def _recent(self, requests: Sequence[ScoringRequest]) -> Arrays:
    """What TransAct reads of the requests' users, [U, L, ...]; nothing without it."""
    schema = self.bundle.manifest.schema
    return batches.joined([r.recent(schema, self._tokens) for r in requests]) if schema.recent_length else {}

  def _tokens_of(self, keys: np.ndarray) -> Arrays:
    return self._tokens.items.inputs(keys) if self._tokens.items else {}

  def _slots(self, requests: Sequence[ScoringRequest]) -> np.ndarray:
    """Slots of the requests' users, whose keys and values are computed where they are not held: int32 [U]."""
    windows = [request.model_window(self._tokens) for request in requests]
    slot_U, whole, appended = self.cache.assign(windows)
    length = self.bundle.manifest.schema.history_length
    try:
      self._compute('context', [(slot_U[i], windows[i], 0) for i in whole], batches.event_sizes(length))
      self._compute('extend', [(slot_U[i], windows[i], held) for i, held in appended], batches.appended_sizes(length))
    except BaseException:
      self._reset()  # the slots do not hold what the cache believes, or the pool is gone
      raise
    return slot_U

  def _compute(self, program: str, work: list[tuple[int, Window, int]], lengths: Sequence[int]) -> None:
    """Runs the context pass of windows from an event on, into their slots."""
    for longest, shorter in zip(lengths, (-1, *lengths), strict=False):
      some = [each for each in work if shorter < len(each[1]) - each[2] <= longest]
      for rows in batches.cut(len(some), self._event_rows(program)):
        part, some = some[:rows], some[rows:]
        flat = self._with_rows([{name: c[held:] for name, c in w.columns.items()} for _, w, held in part])
        inputs = batches.padded(flat, [len(window) - held for _, window, held in part], rows, longest)
        slot_U = np.full(rows, self.cache.slots, np.int32)  # padding is dropped
        slot_U[: len(part)] = [slot for slot, *_ in part]
        self._pool = self._programs[program](self._params, self._pool, slot_U, inputs)

  def _with_rows(self, parts: list[Arrays]) -> Arrays:
    """Columns of events, one window's after another's, with the rows of their items."""
    flat = batches.joined(parts)
    flat['rows'] = self.bundle.rows.rows(flat.pop('item'))
    return flat

  def _event_rows(self, program: str) -> tuple[int, ...]:
    sizes = batches.CONTEXT_USERS if program == 'context' else batches.APPENDED_USERS
    return tuple(size for size in sizes if size <= max(self._most_users, sizes[0]))

  def _warm_crossing(self, candidates: Arrays, recent: Arrays, size: tuple[int, int]) -> None:
    inputs = {name: np.zeros((*size, *column.shape[1:]), column.dtype) for name, column in candidates.items()}
    inputs |= {name: np.repeat(column, size[0], axis=0) for name, column in recent.items()}
    inputs['mask'] = np.zeros(size, bool)
    users = () if self._pool is None else (self._pool, np.zeros(size[0], np.int32))
    self._programs['crossing'](self._params, self._stats, *users, inputs).block_until_ready()

  def _warm_events(self, program: str, window: Arrays, rows: int, length: int) -> None:
    slot_U = np.full(rows, self.cache.slots, np.int32)
    inputs = batches.padded(window, [0], rows, length)
    self._pool = self._programs[program](self._params, self._pool, slot_U, inputs)
    jax.block_until_ready(self._pool)

  def _reset(self) -> None:
    """An empty pool, and a cache that knows it."""
    self.cache.clear()
    if self.cache.slots:
      self._pool = None  # before the new one takes its memory
      manifest = self.bundle.manifest
      try:
        self._pool = empty_pool(manifest.pinfm, manifest.ranking, manifest.schema.history_length, self.cache.slots)
      except (jax.errors.JaxRuntimeError, MemoryError, OverflowError) as error:
        raise UserError(
          f'the keys and values of {self.cache.slots} users do not fit in memory ({str(error)[:80]}): set fewer '
          'cache_users'
        ) from error

  def _output_width(self) -> int:
    if self._pool is None:
      raise UserError(f'{self.bundle.path} holds a ranker without PinFM: it has no vectors of users or items')
    return self.bundle.manifest.pinfm.tower.output_width


def score_file(bundle: str | Path, requests: str | Path, out: str | Path, rows: RowSource | None = None) -> int:
  """Scores a file of requests into a file of results, one a line.

  Args:
    bundle: directory of the bundle.
    requests: one a line (blank lines are skipped), or one list; see `serve.requests`.
    out: JSONL; it appears only when every request is scored.
    rows: where table rows come from; None = the bundle's own tables.

  Returns:
    The number of requests.

  Raises:
    UserError: a file or the bundle cannot be read or written, or a request is malformed (its line is named).
  """
  requests, out = Path(requests), Path(out)
  if not requests.is_file():
    raise UserError(f'{requests}: no such file; expected ranking requests, one JSON object a line')
  with complete_file(out, requests) as partial, open(partial, 'w', encoding='utf-8') as file:
    scorer, count = Scorer.load(bundle, rows), 0
    scorer.check_ranks()
    progress = Progress('score', count_documents(requests), 'requests')
    for count, result in enumerate(scorer._score(read_documents(requests)), 1):
      file.write(json.dumps(result) + '\n')
      progress.update(count)
  progress.close()
  return count
