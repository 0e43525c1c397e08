"""Collects malformed rows: writes them to a file, counts them by reason, and stops when there are too many."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from pinfm_jax.data.preparation.reading import Batch
from pinfm_jax.errors import UserError

_EARLY_STOP_ROWS = 100_000


class RejectLog:
  """The file `rejected.jsonl` while a log is read."""

  def __init__(self, path: Path, kept_beside: Path, max_share: float):
    """Starts an empty file.

    Args:
      path: where the rows are written.
      kept_beside: where the file is copied when there are too many.
      max_share: the share of malformed rows of one kind that is tolerated.
    """
    self._path, self._kept_beside, self._max_share = path, kept_beside, max_share
    self._file = path.open('w', encoding='utf-8')
    self._reasons: dict[str, Counter[str]] = {}
    self.read: Counter[str] = Counter()

  def take(self, kind: str, batch: Batch, reasons: pl.Series) -> None:
    """Notes the malformed rows of a batch.

    Args:
      kind: what the rows are ('events', 'impressions', ..).
      batch: the rows as they were read.
      reasons: per row of the batch's frame why it is malformed, or null.
    """
    counter = self._reasons.setdefault(kind, Counter())
    self.read[kind] += batch.rows
    entries = [(line, reason, {'text': text}) for line, reason, text in batch.broken]
    if reasons.null_count() < len(reasons):
      wrong = np.flatnonzero(reasons.is_not_null().to_numpy())
      rows = batch.frame[wrong].iter_rows(named=True)
      entries += zip(batch.line[wrong].tolist(), reasons[wrong].to_list(), rows, strict=True)
    for line, reason, row in sorted(entries, key=lambda entry: entry[0]):
      counter[reason] += 1
      entry = {'file': batch.file, 'line': line, 'reason': reason, 'row': row}
      self._file.write(json.dumps(entry, ensure_ascii=False, default=str) + '\n')
    if counter.total() > _EARLY_STOP_ROWS:
      self.check(kind)

  def absorb(self, kind: str, text: str, read: int, reasons: Mapping[str, int]) -> None:
    """Takes what another log has written and counted."""
    self._file.write(text)
    self.read[kind] += read
    self._reasons.setdefault(kind, Counter()).update(reasons)

  def check(self, kind: str) -> None:
    """Raises UserError if more than the tolerated share of the rows of this kind so far is malformed."""
    counter, read = self._reasons.get(kind, Counter()), self.read[kind]
    if counter.total() <= self._max_share * read:
      return
    self.keep()
    reason, count = max(counter.items(), key=lambda pair: (pair[1], pair[0]))
    raise UserError(
      f'{counter.total()} of {read} rows of the {kind} are malformed (at most {self._max_share:.1%} allowed), most '
      f'often: {reason} ({count} times); see {self._kept_beside}, mend the log or raise max_rejected_share'
    )

  def keep(self) -> Path:
    """Copies the file beside the data set that will not be made; returns where."""
    self._file.flush()
    shutil.copyfile(self._path, self._kept_beside)
    return self._kept_beside

  def rejected(self, kind: str) -> int:
    """How many rows of this kind were malformed."""
    return self._reasons.get(kind, Counter()).total()

  def by_reason(self) -> dict[str, int]:
    """Malformed rows of all kinds by reason, the commonest first."""
    total = sum(self._reasons.values(), Counter())
    return dict(sorted(total.items(), key=lambda pair: (-pair[1], pair[0])))

  def __enter__(self) -> 'RejectLog':
    return self

  def __exit__(self, *error: object) -> None:
    self._file.close()
