"""Dotted overrides of a configuration (`pretrain.steps=10`) and its JSON form; unknown keys name the nearest one."""

import ast
import dataclasses
import difflib
import json
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pinfm_jax.errors import UserError

T = TypeVar('T')


def apply_overrides(config: T, overrides: Mapping[str, Any]) -> T:
  """Returns the configuration with some fields replaced.

  Args:
    config: a frozen dataclass, possibly of nested ones.
    overrides: dotted field name -> new value; a string is read as a value of the field's type.

  Raises:
    UserError: an unknown field (the nearest known name is suggested), or a value that does not fit the field.
  """
  for key, value in overrides.items():
    config = _replace(config, key.split('.'), value, key)
  return config


def parse_assignments(assignments: Iterable[str], option: str = '--set') -> dict[str, str]:
  """Splits command line words `a.b=c` into a mapping; `option` names where they came from.

  Raises:
    UserError: a word without '='.
  """
  result = {}
  for word in assignments:
    key, equals, value = word.partition('=')
    if not equals or not key:
      raise UserError(f"{option} got '{word}'; expected KEY=VALUE")
    result[key.strip()] = value.strip()
  return result


def to_dict(config: Any) -> dict[str, Any]:
  """The configuration as plain JSON values."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
  """Rebuilds a configuration from `to_dict`'s form.

  Raises:
    UserError: an unknown field or a value that does not fit.
  """
  if not isinstance(values, Mapping):
    raise UserError(f'{kind.__name__} got {values!r}; expected settings by name, or set one of them (GROUP.NAME=VALUE)')
  hints = _hints(kind)
  fields = {}
  for name, value in values.items():
    if name not in hints:
      raise UserError(_unknown(name, name, kind, hints))
    fields[name] = coerce(value, hints[name], f'{kind.__name__}.{name}')
  try:
    return kind(**fields)
  except TypeError as e:  # a field without a default is not given
    raise UserError(f'{kind.__name__} got {sorted(fields)}: {e}') from e


def _replace(config: Any, path: list[str], value: Any, key: str) -> Any:
  name, rest = path[0], path[1:]
  if not dataclasses.is_dataclass(config):
    raise UserError(f"'{key}' goes into '{name}', but what stands before it is no group of settings; drop that part")
  hints = _hints(type(config))
  if name not in hints:
    raise UserError(_unknown(name, key, type(config), hints))
  current = getattr(config, name)
  if rest and isinstance(current, Mapping):  # a free mapping, such as utility weights: any name may be set
    new = {**current, '.'.join(rest): coerce(value, typing.get_args(hints[name])[1], key)}
  else:
    new = _replace(current, rest, value, key) if rest else coerce(value, hints[name], key)
  return dataclasses.replace(config, **{name: new})


def _hints(kind: type) -> dict[str, Any]:
  return typing.get_type_hints(kind)


def _unknown(name: str, key: str, kind: type, known: Mapping[str, Any]) -> str:
  near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
  return f"unknown setting '{key}': {kind.__name__} has no '{name}'; nearest is '{near[0]}' (all: {', '.join(known)})"


def coerce(value: Any, kind: Any, key: str) -> Any:
  """Reads `value` (a string of the command line, a JSON value or a Python one) as the annotated type.

  Raises:
    UserError: it does not fit; `key` names the setting.
  """
  try:
    return _convert(value, kind, key)
  except (ValueError, TypeError, SyntaxError, OverflowError) as e:
    name = getattr(kind, '__name__', str(kind))
    raise UserError(f"setting '{key}' got {value!r}; expected a value of type {name}") from e


def _convert(value: Any, kind: Any, key: str) -> Any:
  origin = typing.get_origin(kind)
  if dataclasses.is_dataclass(kind):
    if isinstance(value, kind):
      return value
    return from_dict(kind, literal(value))
  if kind is Any:
    return literal(value)
  if kind is bool:
    return _boolean(value)
  if kind in (int, float):
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and value != int(value)):
      raise ValueError(value)
    return kind(value.replace('_', '')) if isinstance(value, str) else kind(value)
  if kind is str:
    if not isinstance(value, str):
      raise ValueError(value)
    return value
  if origin is tuple:
    item = typing.get_args(kind)[0]
    parts = _sequence(value)
    return tuple(coerce(part, item, key) for part in parts)
  if origin is not None and issubclass(origin, Mapping):
    inner = typing.get_args(kind)[1]
    items = literal(value)
    return {str(k): coerce(v, inner, f'{key}.{k}') for k, v in dict(items).items()}
  raise TypeError(f'no way to read a {kind}')


def _boolean(value: Any) -> bool:
  words = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}
  if isinstance(value, bool):
    return value
  if str(value).lower() not in words:
    raise ValueError(value)
  return words[str(value).lower()]


def _sequence(value: Any) -> list[Any]:
  if not isinstance(value, str):
    return list(value)
  text = value.strip()
  if text.startswith(('[', '(')):
    return list(ast.literal_eval(text))
  return [part for part in text.split(',') if part]


def literal(value: Any) -> Any:
  """A command line word as a number, list or other Python literal if it reads as one, else as it is."""
  if not isinstance(value, str):
    return value
  try:
    return ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return value
