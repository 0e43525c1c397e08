"""First half of the Beam preparation: every file becomes canonical rows, split by parts of the users.

A worker reads a file with the row rules of the local preparation. What must be one decision for all files (how ids
are spelled, time units, widths of vectors) is settled before, on the first rows, by the program that starts the
pipeline.
"""

import copy
import io
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import polars as pl

from pinfm_jax.data.preparation.impressions import ImpressionIntake
from pinfm_jax.data.preparation.intake import EventIntake, Shared
from pinfm_jax.data.preparation.reading import read_batches
from pinfm_jax.data.preparation.rejects import RejectLog
from pinfm_jax.data.preparation.spool import BUCKETS, bucket_of, mix

VOCABULARY, SPARSE_VALUES, REJECTS, ROWS = 'vocabulary', 'sparse', 'rejects', 'rows'
_FILE_BITS = 40  # a row's order is the file's number, then its line

Intakes = dict[str, EventIntake | ImpressionIntake]


class ReadFile(beam.DoFn):
  """(kind, file number, path) -> (part, canonical rows); what files tell of names and malformed rows on the side.

  Outputs:
    main: (part, (kind, Arrow bytes, action names, surface names)): codes of the rows are places in these names.
    VOCABULARY: ('action' or 'surface', names).
    SPARSE_VALUES: (feature, values), more than the limit if there are too many to name.
    REJECTS: (kind, file number, JSON lines, rows read, malformed rows by reason).
    ROWS: (kind, good rows).
  """

  def __init__(self, intakes: Intakes, parts: int):
    """Takes intakes that have settled on the first rows; `parts` is the number of parts of the users."""
    self._intakes, self._parts = intakes, parts

  def process(self, element: tuple[str, int, str]) -> Iterator[Any]:
    """Reads one file."""
    kind, number, path = element
    intake, rows = copy.deepcopy(self._intakes[kind]), 0
    wanted = intake.open(Path(path))
    with tempfile.TemporaryDirectory() as scratch:
      kept = Path(scratch) / 'rejected.jsonl'
      # How many malformed rows are too many is decided over all files.
      with RejectLog(kept, kept, max_share=1.0) as rejects:
        for batch in read_batches(Path(path), wanted):
          reasons = pl.Series([], dtype=pl.String)
          if batch.frame.height:
            good, reasons = intake.canonical(batch, number << _FILE_BITS)
            rows += good.height
            yield from self._by_part(kind, good, intake.shared)
          rejects.take(kind, batch, reasons)
      text = kept.read_text(encoding='utf-8')
    yield beam.pvalue.TaggedOutput(REJECTS, (kind, number, text, rejects.read[kind], rejects.by_reason()))
    yield beam.pvalue.TaggedOutput(ROWS, (kind, rows))
    for vocabulary in (intake.shared.actions, intake.shared.surfaces):
      yield beam.pvalue.TaggedOutput(VOCABULARY, (vocabulary.kind, tuple(vocabulary.names)))
    for name, collector in getattr(intake, 'sparse', {}).items():
      yield beam.pvalue.TaggedOutput(SPARSE_VALUES, (name, tuple(collector.values)))

  def _by_part(self, kind: str, good: pl.DataFrame, shared: Shared) -> Iterator[tuple[int, tuple]]:
    part = part_of(mix(good['user_key'].to_numpy()), self._parts)
    names = tuple(shared.actions.names), tuple(shared.surfaces.names)
    for number in np.unique(part).tolist():
      yield number, (kind, packed(good.filter(pl.Series(part == number))), *names)


def part_edges(parts: int) -> np.ndarray:
  """Buckets of users at which the parts begin, and at last their number."""
  return np.linspace(0, BUCKETS, parts + 1).astype(int)


def part_of(mixed: np.ndarray, parts: int) -> np.ndarray:
  """The part of each user."""
  return np.searchsorted(part_edges(parts), bucket_of(mixed), side='right') - 1


def packed(frame: pl.DataFrame) -> bytes:
  """A frame as bytes."""
  buffer = io.BytesIO()
  frame.write_ipc(buffer)
  return buffer.getvalue()


def unpacked(content: bytes) -> pl.DataFrame:
  """The frame of the bytes."""
  return pl.read_ipc(io.BytesIO(content))


def merged_names(pairs: Iterable[tuple[str, Sequence[str]]]) -> dict[str, list[str]]:
  """All names of each kind, sorted."""
  merged: dict[str, set[str]] = {}
  for kind, names in pairs:
    merged.setdefault(kind, set()).update(names)
  return {kind: sorted(names) for kind, names in merged.items()}
