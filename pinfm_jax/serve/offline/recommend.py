"""Ranks a whole catalogue for users by their representation: H of the last event against z of every item.

The score is <H, z>, which pretraining makes large for a user and the next item (PinFM section 3.1): the cosine of two
unit vectors, or a plain inner product (`model.tower.dot_product`). It is a retrieval score, not a probability: `pinfm
score` ranks few candidates with all features. The catalogue passes through in chunks, so that memory does not grow
with it.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.files import complete_file
from pinfm_jax.progress import Progress
from pinfm_jax.serve.catalogue import CATALOGUE, ItemFile
from pinfm_jax.serve.documents import in_batches, user_requests
from pinfm_jax.serve.requests import ScoringRequest

Array = jax.Array
MOST_TOP = 10_000
_CHUNK = 1 << 14  # items whose vectors are on the device at a time
_TILE = 256  # users that are scored at a time: 16 MiB of scores
_USERS = 1 << 14  # users of a pass over the catalogue, fewer if each gets many items
_PLACES = 1 << 22  # items of all users of a pass: 20 bytes each
_ENCODE = 256  # users that the context pass reads at a time


@dataclass(frozen=True)
class Best:
  """The best items of Q users so far, k each, best first; -inf and row -1 where there are fewer.

  Attributes:
    score_Qk: float32.
    key_Qk: uint64 item keys.
    row_Qk: int64 rows of the items' file.
  """

  score_Qk: np.ndarray  # noqa: N815
  key_Qk: np.ndarray  # noqa: N815
  row_Qk: np.ndarray  # noqa: N815

  @classmethod
  def none(cls, users: int, top: int) -> 'Best':
    """Nothing found yet."""
    shape = (users, top)
    return cls(np.full(shape, -np.inf, np.float32), np.zeros(shape, np.uint64), np.full(shape, -1, np.int64))

  def merged(self, later: 'Best') -> 'Best':
    """The best of both. A tie goes to the item that stands first; an item that is in both counts once."""
    score, key, row = (
      np.concatenate([getattr(self, name), getattr(later, name)], axis=1) for name in ('score_Qk', 'key_Qk', 'row_Qk')
    )
    by_key = np.where(row < 0, np.uint64(0), key).argsort(axis=1, kind='stable')
    sorted_key, sorted_row = (np.take_along_axis(x, by_key, 1) for x in (key, row))
    again = (sorted_key[:, 1:] == sorted_key[:, :-1]) & (sorted_row[:, 1:] >= 0) & (sorted_row[:, :-1] >= 0)
    users, places = np.nonzero(again)
    score[users, by_key[users, places + 1]] = -np.inf
    order = np.argsort(-score, axis=1, kind='stable')[:, : self.score_Qk.shape[1]]
    score, key, row = (np.take_along_axis(x, order, 1) for x in (score, key, row))
    return Best(score, key, np.where(score == -np.inf, -1, row))


def best_items(
  user_QO: np.ndarray,
  seen: list[np.ndarray],
  items: ItemFile,
  encode: Callable[[np.ndarray], Any],
  top: int,
  on_items: Callable[[int], None] = lambda done: None,
) -> Best:
  """The `top` items of a catalogue for each user, by <user, item>.

  An item that stands in the file twice counts once, where it stands first. Ties go to the item that stands first.

  Args:
    user_QO: representations of the users.
    seen: uint64 keys that a user is not given, for each user.
    items: the catalogue.
    encode: uint64 keys [n] -> item representations [n, O].
    top: how many.
    on_items: called with the number of items that are done.
  """
  chunk = max(_CHUNK, 1 << (top - 1).bit_length())
  tiles = [slice(start, start + _TILE) for start in range(0, len(user_QO), _TILE)]
  found = [Best.none(len(user_QO[tile]), top) for tile in tiles]
  vectors = [jnp.asarray(_padded(user_QO[tile], _TILE)) for tile in tiles]
  done = 0
  for keys, _ in items.blocks():
    for start in range(0, len(keys), chunk):
      part = keys[start : start + chunk]
      first = np.sort(np.unique(part, return_index=True)[1])
      distinct, rows = part[first], done + start + first
      z_nO = jnp.asarray(_padded(np.asarray(encode(distinct), np.float32), chunk))
      by_key = np.argsort(distinct)
      for i, tile in enumerate(tiles):
        barred = _barred(seen[tile], distinct, by_key)
        score, place = map(np.asarray, _chunk_best(vectors[i], z_nO, len(distinct), barred, top))
        score, place = score[: len(user_QO[tile])], place[: len(user_QO[tile])]
        place = np.minimum(place, len(distinct) - 1)  # padding, whose score is -inf
        found[i] = found[i].merged(Best(score, distinct[place], np.where(score == -np.inf, -1, rows[place])))
      on_items(done + start + len(part))
    done += len(keys)
  return Best(*(np.concatenate([getattr(b, name) for b in found]) for name in ('score_Qk', 'key_Qk', 'row_Qk')))


def recommend(
  scorer: Any,
  requests: list[ScoringRequest],
  items: ItemFile,
  top: int,
  exclude_seen: bool,
  on_items: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
  """{"request_id", "items": [{"item_id", "score"}, ..]} of each user, best first.

  A user without events has no representation and gets no items.

  Args:
    scorer: of the bundle.
    requests: the users.
    items: the catalogue.
    top: how many.
    exclude_seen: leave out the items of the history given.
    on_items: see `best_items`.
  """
  known = [request for request in requests if len(request.history)]
  parts = [np.asarray(scorer.users(part), np.float32) for part in in_batches(known, _ENCODE)]
  found = Best.none(0, top)
  if known:
    none = np.zeros(0, np.uint64)
    seen = [np.unique(request.history.item) if exclude_seen else none for request in known]
    found = best_items(np.concatenate(parts), seen, items, lambda keys: scorer.items(keys)['target'], top, on_items)
  rows = np.unique(found.row_Qk[found.row_Qk >= 0])
  ids, places = np.array(items.ids(rows), object), iter(range(len(known)))
  for request in requests:
    chosen = []
    if len(request.history):
      place = next(places)
      row_k = found.row_Qk[place][found.row_Qk[place] >= 0]
      named = ids[np.searchsorted(rows, row_k)].tolist()
      chosen = [{'item_id': i, 'score': s} for i, s in zip(named, found.score_Qk[place].tolist(), strict=False)]
    yield {'request_id': request.request_id, 'items': chosen}


def recommend_file(
  scorer: Any,
  history: Path,
  top: int = 20,
  catalogue: Path | None = None,
  exclude_seen: bool = False,
  out: Path | None = None,
) -> int:
  """Recommends to every user of a file, one line of JSON a user, in the file's order.

  Args:
    scorer: of the bundle.
    history: users (`documents.user_requests`).
    top: items for each.
    catalogue: which items there are (`ItemFile`); None = those of the bundle.
    exclude_seen: leave out the items of the history given.
    out: where to write; it appears only when it is complete. None = standard output.

  Returns:
    The number of users.

  Raises:
    UserError: a file that cannot be read or written, a malformed user, or a bundle that cannot recommend.
  """
  if not 1 <= top <= MOST_TOP:
    raise UserError(f'got --top {top}, expected 1 to {MOST_TOP}; `pinfm embed` writes the vectors to rank more with')
  items = catalogue_of(scorer.bundle, catalogue)
  if out is None:
    return _write(scorer, history, items, top, exclude_seen, sys.stdout)
  with complete_file(out, history) as partial_out, open(partial_out, 'w', encoding='utf-8') as file:
    return _write(scorer, history, items, top, exclude_seen, file)


def catalogue_of(bundle: Any, file: Path | None) -> ItemFile:
  """The items to rank: those of a file, or of the bundle.

  Raises:
    UserError: the ranker has no user representation, or there is no catalogue.
  """
  if bundle.manifest.tables is None:
    raise UserError(f'{bundle.path} is a ranker without PinFM: it has no user representation to recommend with')
  id_type = bundle.manifest.id_type.item
  if file is not None:
    return ItemFile(file, id_type)
  if CATALOGUE not in {entry.name for entry in bundle.manifest.files}:
    raise UserError(
      f'{bundle.path} has no catalogue (an older version exported it); give --catalogue FILE, or export it again'
    )
  return ItemFile(bundle.path / CATALOGUE, id_type, keyed=True)


def _write(scorer: Any, history: Path, items: ItemFile, top: int, exclude_seen: bool, file: TextIO) -> int:
  users, at_once = 0, max(1, min(_USERS, _PLACES // top))
  for part in in_batches(user_requests(scorer, history), at_once):
    label = f'recommend to users {users + 1} to {users + len(part)}'
    progress = Progress(label, items.count(), 'items')
    for result in recommend(scorer, part, items, top, exclude_seen, progress.update):
      file.write(json.dumps(result, ensure_ascii=False) + '\n')
    progress.close()
    users += len(part)
  return users


@partial(jax.jit, static_argnames='top')
def _chunk_best(
  user_QO: Array, item_nO: Array, count: int, barred: tuple[Array, Array], top: int
) -> tuple[Array, Array]:
  """The best items of a chunk, of which the first `count` are real, without the pairs (user, item) that are barred."""
  score_Qn = jnp.einsum('qo,no->qn', user_QO, item_nO, precision='highest')
  score_Qn = jnp.where(jnp.arange(item_nO.shape[0]) < count, score_Qn, -jnp.inf)
  score_Qn = score_Qn.at[barred].set(-jnp.inf, mode='drop')
  return jax.lax.top_k(score_Qn, top)  # of equal scores the first


def _barred(seen: list[np.ndarray], keys: np.ndarray, by_key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Pairs of a user of the tile and an item of the chunk that the user has seen, padded to a power of two."""
  user = np.repeat(np.arange(len(seen)), [len(s) for s in seen])
  wanted = np.concatenate(seen)
  place = np.minimum(np.searchsorted(keys, wanted, sorter=by_key), len(keys) - 1)
  item = by_key[place]
  hit = keys[item] == wanted
  size = 1 << (max(int(hit.sum()), 64) - 1).bit_length()  # few sizes, so few programs
  pairs = np.full((2, size), np.iinfo(np.int32).max, np.int32)  # beyond both: dropped
  pairs[0, : hit.sum()], pairs[1, : hit.sum()] = user[hit], item[hit]
  return pairs[0], pairs[1]


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
  return np.pad(array, ((0, rows - len(array)), (0, 0)))
