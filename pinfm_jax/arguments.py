"""What several command lines read in the same way."""

import argparse
from collections.abc import Callable, Collection

from pinfm_jax.errors import UserError


def numbers(text: str) -> tuple[int, ...]:
  """Reads distinct numbers with commas between them, for `argparse`."""
  try:
    return tuple(dict.fromkeys(int(part) for part in text.split(',')))
  except ValueError:
    raise argparse.ArgumentTypeError(f"got '{text}'; expected numbers, as 0,1,2") from None


def some(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
  """Reads some of the known names with commas between them, for `argparse`."""

  def read(text: str) -> tuple[str, ...]:
    names = tuple(text.split(','))
    for name in names:
      if name not in known:
        raise argparse.ArgumentTypeError(f"got '{name}'; expected some of {', '.join(known)}")
    return names

  return read


def first_seeds(count: int) -> tuple[int, ...]:
  """The seeds that `--seeds COUNT` asks for; raises UserError."""
  if count < 1:
    raise UserError(f'--seeds is {count}; expected the number of seeds, at least 1')
  return tuple(range(count))


def folder_name(name: str) -> str:
  """Checks the `--name` of a folder; raises UserError."""
  if not name or name.startswith('.') or '/' in name:
    raise UserError(f"--name got '{name}'; expected the name of a folder")
  return name
