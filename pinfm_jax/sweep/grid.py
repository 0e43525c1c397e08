"""Grids of settings: `key=a,b key2=c,d` becomes one arm for each combination."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pinfm_jax.checks import ARM_GROUPS
from pinfm_jax.config import Arm
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import apply_overrides, parse_assignments

_CLOSING = {'(': ')', '[': ']', '{': '}'}


@dataclass(frozen=True)
class Axis:
  """A setting and the values that it takes: `texts` as the user wrote them, `values` as the field's type."""

  key: str
  texts: tuple[str, ...]
  values: tuple[Any, ...]


def parse_grid(words: Sequence[str], experiment: Any, groups: tuple[str, ...] = ARM_GROUPS) -> tuple[Axis, ...]:
  """Reads the words of `--grid`.

  Values stand between commas and are read like those of --set. A value that holds commas itself (a tuple) stands in
  brackets: `ranker.mlp=(64,32),(128,64)`; `()` is the empty tuple, `''` the empty text.

  Args:
    words: 'key=a,b', one a setting.
    experiment: whose settings they are (a frozen dataclass).
    groups: what a setting may begin with.

  Returns:
    One axis a word, in order.

  Raises:
    UserError: a word without '=', a key given twice, an unknown setting, one that arms cannot change, an empty value,
      a value of the wrong type, or the same value twice.
  """
  keys = [word.partition('=')[0].strip() for word in words]
  for key in keys:
    if keys.count(key) > 1:
      raise UserError(f'--grid got {key} twice; give all its values at once: {key}=A,B')
  return tuple(_axis(key, text, experiment, groups) for key, text in parse_assignments(words, '--grid').items())


def grid_arms(arms: Sequence[Arm], axes: Sequence[Axis]) -> tuple[Arm, ...]:
  """Every arm with every combination of the axes' values; the grid's values win over the arm's own.

  An arm without a name is named by the grid's settings alone; without axes the arms stay as they are.
  """
  if not axes:
    return tuple(arms)
  result = []
  for arm in arms:
    for places in itertools.product(*(range(len(axis.values)) for axis in axes)):
      chosen = list(zip(axes, places, strict=True))
      name = ' '.join([arm.name, *(f'{axis.key}={axis.texts[place]}' for axis, place in chosen)]).strip()
      overrides = {**arm.overrides, **{axis.key: axis.values[place] for axis, place in chosen}}
      result.append(dataclasses.replace(arm, name=name, overrides=overrides))
  return tuple(result)


def settings_text(overrides: Mapping[str, Any]) -> str:
  """'ranker.mlp=(64,32) finetune.epochs=2' of an arm's overrides."""
  return ' '.join(f'{key}={_text(value)}' for key, value in overrides.items())


def _axis(key: str, text: str, experiment: Any, groups: tuple[str, ...]) -> Axis:
  texts = _split(key, text)
  values = tuple(_value(key, part, experiment) for part in texts)
  for place, value in enumerate(values):
    if value in values[:place]:
      raise UserError(f'--grid {key} got {texts[place]} twice; give each value once')
  if not key.startswith(groups):
    raise UserError(
      f'--grid changes {key}, but all runs of a sweep share data, evaluation and seeds; it may change '
      f'{", ".join(f"{group}*" for group in groups)}: set the rest with --set'
    )
  return Axis(key, texts, values)


def _split(key: str, text: str) -> tuple[str, ...]:
  """Parts between the commas that stand in no bracket and no quotes."""
  parts, depth, quote = [''], [], ''
  for c in text:
    if quote:
      quote = '' if c == quote else quote
    elif c in '\'"':
      quote = c
    elif c in _CLOSING:
      depth.append(_CLOSING[c])
    elif depth and c == depth[-1]:
      depth.pop()
    elif c == ',' and not depth:
      parts.append('')
      continue
    parts[-1] += c
  if depth or quote:
    raise UserError(f"--grid {key} got '{text}', where {quote or depth[-1]} is missing at the end; close it")
  parts = [part.strip() for part in parts]
  if '' in parts:
    raise UserError(f"--grid {key} got '{text}' with an empty value; expected {key}=A,B (empty text: '', tuple: ())")
  return tuple(parts)


def _value(key: str, text: str, experiment: Any) -> Any:
  bare = text[1:-1].strip().rstrip(',') if text[0] in '([\'"' else text  # a tuple without brackets is what --set takes
  bare = text if text[0] in '([' and any(quote in bare for quote in '\'"') else bare  # quoted parts need them
  changed = apply_overrides(experiment, {key: bare})
  for name in key.split('.'):
    changed = changed[name] if isinstance(changed, Mapping) else getattr(changed, name)
  return changed


def _text(value: Any) -> str:
  if isinstance(value, tuple | list):
    return f'({",".join(map(str, value))})'
  return str(value)
