"""`pinfm bench serving`: the users' cache, the server under load, the tables, and what int4 costs in quality."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pinfm_jax.bench.results import Figure, Findings, environment, make_directory, write_findings
from pinfm_jax.errors import UserError

PARTS = ('cache', 'load', 'rows', 'int4')
_ALWAYS = ('cache', 'load')  # the tables of `rows` take 13 GB of disk, and int4 needs a finished run: ask for them


def bench_serving(
  out: str | Path,
  parts: Sequence[str] | None = None,
  quick: bool = False,
  workdir: str | Path | None = None,
  keep: bool = False,
) -> Findings:
  """Measures some parts of serving.

  Args:
    out: directory of results.json, results.md and a plot a part.
    parts: some of PARTS; None = cache and load, and int4 where there is a workdir.
    quick: tiny sizes, of which nothing is asked.
    workdir: of a finished run, for int4.
    keep: leave the bundle of the part `rows` there.

  Raises:
    UserError: a part that does not exist or lacks what it needs, or no directory.
  """
  if parts is None:
    parts = (*_ALWAYS, *(['int4'] if workdir else []))
  _check(parts, workdir)
  directory, machine = make_directory(out), environment()
  figures: list[Figure] = []
  notes: list[str] = []
  for part in parts:
    found, said = _measure(part, directory, quick, workdir, keep)
    figures += found
    notes += said
  if quick:
    figures = [replace(figure, at_most=None, at_least=None) for figure in figures]
  settings = {'parts': ','.join(parts), 'quick': quick} | ({'workdir': str(workdir)} if 'int4' in parts else {})
  findings = Findings('Serving', settings, figures, notes, machine)
  write_findings(findings, directory)
  return findings


def _measure(
  part: str, directory: Path, quick: bool, workdir: str | Path | None, keep: bool
) -> tuple[list[Figure], list[str]]:
  # Imported where they are used: the server's part needs packages that the others do without.
  if part == 'cache':
    from pinfm_jax.bench.serving_cache import FULL_CACHE, QUICK_CACHE, cache_notes, measure_cache

    sizes = QUICK_CACHE if quick else FULL_CACHE
    return measure_cache(directory, sizes), cache_notes(sizes)
  if part == 'load':
    from pinfm_jax.bench.serving_load import FULL_LOAD, QUICK_LOAD, measure_load

    return measure_load(directory, QUICK_LOAD if quick else FULL_LOAD), []
  if part == 'rows':
    from pinfm_jax.bench.serving_rows import FULL_ROWS, QUICK_ROWS, measure_rows, rows_notes

    sizes = QUICK_ROWS if quick else FULL_ROWS
    return measure_rows(directory, sizes, keep), rows_notes(sizes)
  from pinfm_jax.bench.serving_int4 import Int4Sizes, measure_int4

  return measure_int4(directory, Int4Sizes(workdir, resamples=50 if quick else 1000)), []


def _check(parts: Sequence[str], workdir: str | Path | None) -> None:
  unknown = [part for part in parts if part not in PARTS]
  if unknown:
    raise UserError(f"--parts names '{unknown[0]}'; expected some of: {','.join(PARTS)}")
  if 'int4' in parts and workdir is None:
    raise UserError('the part int4 needs a finished run: give --workdir DIR')
  if 'load' in parts and importlib.util.find_spec('uvicorn') is None:
    raise UserError("the part load needs the server: pip install 'pinfm_jax[serve]', or give --parts cache")
