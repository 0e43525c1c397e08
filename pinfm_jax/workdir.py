"""A run's directory: which stage's results stand where, and with which settings they were made."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pinfm_jax.errors import UserError

RESULTS = 'results.json'
SETTINGS = 'settings.json'
_FREE = {'simulator', 'options', 'label_weights'}  # mappings in which a missing key is a default and not 'off'


class OtherSettingsError(UserError):
  """A directory holds work that was made with other settings."""


def claim(directory: Path, settings: Mapping[str, Any], started: bool = True) -> None:
  """Makes a stage's directory, or checks that what it holds was made with the same settings.

  Args:
    directory: of the stage.
    settings: everything that the stage's result depends on.
    started: whether anything made with the settings found there may stand; if not, they are replaced.

  An option that is off ('', 0, false, none) and that the settings found there do not name is not a difference: it is
  newer than they are. Keys of mappings that a launch file fills as it likes are no options.

  Raises:
    OtherSettingsError: it was made with other settings; the first differing one is named.
  """
  path = directory / SETTINGS
  settings = json.loads(json.dumps(settings))
  if started and path.exists():
    found, expected = _flat(read_json(path)), _flat(settings)
    for name in (*expected, *found):  # a setting that is no longer there differs too
      newer = name not in found and not expected[name] and _FREE.isdisjoint(name.split('.')[:-1])
      if not newer and found.get(name) != expected.get(name):
        was, now = (repr(values[name]) if name in values else 'its default' for values in (found, expected))
        raise OtherSettingsError(
          f'{directory} was made with {name}={was}, now it is {now}; '
          f'use another --workdir, the old setting, or delete {directory}'
        )
  directory.mkdir(parents=True, exist_ok=True)
  write_json(path, settings)


def is_done(directory: Path) -> bool:
  """Whether the stage in this directory has finished."""
  return (directory / RESULTS).exists()


def is_trained(directory: Path) -> bool:
  """Whether a training stage has finished: its results stand in its directory or, measured on a split, below it."""
  return any(is_done(directory / split) for split in ('', 'validation', 'test'))


def has_work(directory: Path) -> bool:
  """Whether a training stage's directory holds a result or a checkpoint."""
  return is_done(directory) or any((directory / 'checkpoints').glob('[0-9]*'))


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file that appears only when it is complete."""
  write_text(path, json.dumps(value, indent=1, sort_keys=False) + '\n')


def write_text(path: Path, text: str) -> None:
  """Writes a text file that appears only when it is complete."""
  partial = path.with_name(f'{path.name}.partial')
  partial.write_text(text, encoding='utf-8')
  os.replace(partial, path)


def read_results(directory: Path) -> dict[str, float]:
  """A finished stage's named figures.

  Raises:
    UserError: the stage has not finished.
  """
  if not is_done(directory):
    raise UserError(f'{directory} has no {RESULTS}: run that stage first (pinfm run FILE)')
  return read_json(directory / RESULTS)


def read_settings(directory: Path) -> dict[str, Any]:
  """The settings that a stage's directory was claimed with.

  Raises:
    UserError: it was not.
  """
  path = directory / SETTINGS
  if not path.is_file():
    raise UserError(f'{directory} has no {SETTINGS}: expected the directory of a stage of an earlier run')
  return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
  """A JSON file that a stage wrote.

  Raises:
    UserError: it is damaged.
  """
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise UserError(f'{path} is not valid JSON ({error}); delete {path.parent} and run again') from error


def _flat(value: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for name, item in value.items():
    if isinstance(item, Mapping) and item:
      flat |= _flat(item, f'{prefix}{name}.')
    else:
      flat[prefix + name] = item
  return flat


@contextmanager
def only_one(directory: Path, busy: str) -> Iterator[None]:
  """Holds a directory's lock, which ends with the process however it ends.

  Raises:
    UserError: `busy`: another process holds it.
  """
  lock = os.open(directory, os.O_RDONLY)
  try:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(busy) from None
    yield
  finally:
    os.close(lock)
