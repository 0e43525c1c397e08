"""Finds the source column of a canonical name, and says what to do when there is none."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, overload

from pinfm_jax.data.preparation.reading import is_jsonl
from pinfm_jax.errors import UserError


@overload
def source_column(
  path: Path, header: list[str], mapping: Mapping[str, str], name: str, required: Literal[True] = True
) -> str: ...


@overload
def source_column(
  path: Path, header: list[str], mapping: Mapping[str, str], name: str, required: bool
) -> str | None: ...


def source_column(
  path: Path, header: list[str], mapping: Mapping[str, str], name: str, required: bool = True
) -> str | None:
  """The column of `path` that holds the canonical `name`.

  Args:
    path: the file.
    header: its columns.
    mapping: canonical name -> column; a name that is not mapped is its own column.
    name: the canonical name.
    required: whether a name that is neither mapped nor present is an error (a mapped one always is).

  Returns:
    The column, or None if there is none and none is required.

  Raises:
    UserError: there is none; the nearest column is suggested.
  """
  column = mapping.get(name, name)
  if column in header:
    return column
  if not required and name not in mapping:
    return None
  near = nearest(column, header)
  shown = ', '.join(header[:12]) + (', ..' if len(header) > 12 else '')
  raise UserError(
    f'{path} has no column {column!r} for {name}{f", did you mean {near!r}?" if near else ""} (its columns: {shown}); '
    f'map {name} to the right one'
  )


def late_columns(
  path: Path, mapping: Mapping[str, str], found: Iterable[str], optional: Iterable[str]
) -> dict[str, str]:
  """The optional names that the first lines of a JSONL file do not have, but later ones may; empty for other files."""
  if not is_jsonl(path):
    return {}
  return {name: name for name in optional if name not in found and name not in mapping}


def check_mapping(what: str, mapping: Mapping[str, str], known: Iterable[str]) -> None:
  """Raises UserError if a mapping names something that is no canonical name; the nearest is suggested."""
  known = list(known)
  for name in mapping:
    if name not in known:
      near = nearest(name, known)
      hint = f', did you mean {near!r}?' if near else ''
      raise UserError(f'{what} maps {name!r}{hint} (expected: {", ".join(known)})')


def nearest(word: str, words: Iterable[str]) -> str | None:
  """The word most like `word`, or None if none is similar."""
  by_lower = {candidate.lower(): candidate for candidate in words}
  found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
  return by_lower[found[0]] if found else None
