"""The model card of a bundle: what it was trained on, how, how well it does, and what it cannot do.

It states what the run knows and nothing else. What is missing is said to be missing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


@dataclass(frozen=True)
class DataFacts:
  """What is known of the data.

  Attributes:
    source: where they come from.
    licence: their terms; None = none stated.
    notes: of the preparation.
    checksum: of the prepared data set.
    counts: name to number: users, items, events, impressions, requests.
    days: part of the split to its first and last millisecond (the second is exclusive).
    actions, surfaces, labels, features: their names.
  """

  source: str
  licence: str | None
  notes: str
  checksum: str
  counts: Mapping[str, int]
  days: Mapping[str, tuple[int, int]]
  actions: Sequence[str]
  surfaces: Sequence[str]
  labels: Sequence[str]
  features: Sequence[str]


@dataclass(frozen=True)
class ModelFacts:
  """What is known of the model.

  Attributes:
    name: of the experiment.
    arm: which ranker of the experiment; empty = a pretrained tower without one.
    seed: of the training.
    version: of pinfm_jax.
    storage: of the tables; None for a ranker without PinFM.
    rounding: how rows were rounded to it, in words; empty = they were not.
    parameters: part of the model to its number of parameters.
    sizes: what to its size, in words (tower, tables, window, ..).
    pretraining, finetuning: setting to value; empty = there was none.
    utility: weight of each label.
    catalogue: items that `pinfm recommend` ranks; None = the bundle has no catalogue.
  """

  name: str
  arm: str
  seed: int
  version: str
  storage: str | None
  parameters: Mapping[str, int]
  sizes: Mapping[str, str]
  pretraining: Mapping[str, Any]
  finetuning: Mapping[str, Any]
  utility: Mapping[str, float] = field(default_factory=dict)
  catalogue: int | None = None
  rounding: str = ''

  @property
  def part(self) -> str:
    """What of the experiment it is."""
    return self.arm or 'pretrained tower'


def model_card(data: DataFacts, model: ModelFacts, results: str, split: str, seeds: int) -> str:
  """The card as Markdown.

  Args:
    data: what it was trained on.
    model: what it is.
    results: the evaluation's tables as Markdown; empty if it was not evaluated.
    split: what they were measured on.
    seeds: over how many they were.
  """
  parts = [
    f'# Model card: {model.name}, {model.part}',
    _about(model),
    '## Data\n\n' + _data(data, bool(model.arm)),
    '## Model\n\n' + _model(model),
    '## Training\n\n' + _training(model),
    '## Results\n\n' + _results(model, results, split, seeds),
    '## Limits\n\n' + _limits(model, results, seeds),
    '## Licence\n\n' + _licence(data),
    '## How to load it\n\n' + _loading(model),
  ]
  return '\n\n'.join(parts) + '\n'


def _about(model: ModelFacts) -> str:
  kind = 'A multi-task ranking model'
  kind += ' with a PinFM tower that reads the user history' if model.storage else ' without a user-sequence module'
  if not model.arm:
    kind = 'A PinFM tower that reads the user history, without a ranking model'
  return f'{kind}, exported by pinfm_jax {model.version}; seed {model.seed}. This card is generated from the run.'


def _data(data: DataFacts, with_ranker: bool) -> str:
  labels = f' Labels: {_list(data.labels)}.' if with_ranker else ''
  days = [(name, _days(first, last)) for name, (first, last) in data.days.items() if last > first]
  lines = [
    f'- Source: {data.source}.' + (f' {data.notes}' if data.notes else ''),
    f'- Terms: {data.licence or "none stated"}.',
    '- Counts: ' + ', '.join(f'{number:,} {name}' for name, number in data.counts.items()) + '.',
    *(f'- {name[0].upper()}{name[1:]}: {words} (UTC).' for name, words in days),
    f'- Actions: {_list(data.actions)}. Surfaces: {_list(data.surfaces)}.{labels}',
    *([f'- Features of the ranker: {_list(data.features)}.'] if with_ranker else []),
    f'- Checksum of the prepared data set: `{data.checksum}`.',
  ]
  return '\n'.join(lines)


def _model(model: ModelFacts) -> str:
  lines = [f'- {name[0].upper()}{name[1:]}: {words}.' for name, words in model.sizes.items()]
  counted = ', '.join(f'{name} {number:,}' for name, number in model.parameters.items())
  lines.append(f'- Parameters: {counted}; {sum(model.parameters.values()):,} in all.')
  if model.storage:
    rounding = f', rounded {model.rounding}' if model.rounding else ''
    lines.append(f'- The tables are stored as {model.storage}, converted after training{rounding}.')
  if model.arm:
    weights = ', '.join(f'{label} {weight:+g}' for label, weight in model.utility.items())
    lines.append(f'- Utility that orders a request: {weights or "none; the labels are predicted side by side"}.')
  if model.catalogue is not None:
    lines.append(f'- Catalogue for recommendation: {model.catalogue:,} items.')
  return '\n'.join(lines)


def _training(model: ModelFacts) -> str:
  stages = (('Pretraining', model.pretraining), ('Fine-tuning', model.finetuning))
  lines = [f'- {name}: {", ".join(f"{k} {_value(v)}" for k, v in settings.items()) or "none"}.'
           for name, settings in stages]  # fmt: skip
  return '\n'.join(lines)


def _results(model: ModelFacts, results: str, split: str, seeds: int) -> str:
  if not results:
    return 'The run has not been evaluated: nothing is known of the quality of this model.'
  tables = re.sub(r'\n{3,}', '\n\n', results.strip())
  protocol = f'Measured on the {split} split over {seeds} seed{"s" if seeds > 1 else ""}'
  if model.storage and model.storage != 'float32':
    protocol += f', with float32 tables (before they were stored as {model.storage})'
  return f'{protocol}. The row of this model is *{model.part}*.\n\n{tables}'


def _limits(model: ModelFacts, results: str, seeds: int) -> str:
  lines = []
  if results and seeds == 1:
    lines.append('- One training run was measured: intervals are about users, how much another run differs is unknown.')
  if model.storage:
    lines += [
      '- It tells users apart by their histories alone. A user without events gets '
      f'{"the scores of an empty history, and " if model.arm else ""}no recommendations.',
      '- An item that training never saw has an id vector that means nothing'
      f'{"; see the table by item age, if there is one" if model.arm else ""}.',
    ]
  if model.arm:
    lines.append(
      '- Labels are what was logged under an earlier ranker: what was never shown has no labels, and the order of '
      'exposure is not corrected for.'
    )
  lines += [
    '- Nothing was measured for groups of people, for safety of content, or for other feeds than the one above.',
    '- Interests and items change: the figures hold for the data above.',
  ]
  return '\n'.join(lines)


def _licence(data: DataFacts) -> str:
  return (
    'The code that made it is under Apache-2.0. The parameters were learned from the data above, whose terms '
    f'({data.licence or "none stated"}) decide what may be done with them.'
  )


def _loading(model: ModelFacts) -> str:
  lines = ['pinfm score BUNDLE requests.jsonl --out scores.jsonl'] if model.arm else []
  if model.catalogue is not None:
    lines.append(f'pinfm recommend BUNDLE --history {"requests" if model.arm else "users"}.jsonl --top 20')
  user = '{"request_id": 1, "history": [..], "candidates": []}'
  call = 'scorer.score(requests)' if model.arm else f'scorer.users([scorer.parse({user})])'
  python = f'In Python: `scorer = pinfm_jax.serve.scorer.Scorer.load(BUNDLE)`, `{call}`.'
  commands = '\n'.join(['```bash', *lines, '```', '', python])
  return f'With pinfm_jax {model.version} or a later version installed:\n\n{commands}'


def _list(names: Sequence[str], most: int = 40) -> str:
  shown = ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
  return shown or 'none'


def _value(value: Any) -> str:
  if isinstance(value, Mapping):
    return ' '.join(f'{k}={v:g}' for k, v in value.items()) or 'none'
  if isinstance(value, tuple | list):
    return '/'.join(map(str, value)) or 'none'
  return f'{value:,}' if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _days(first_ms: int, last_ms: int) -> str:
  """The UTC days from the first millisecond to before the last."""
  first, last = (datetime.fromtimestamp(ms / 1000, UTC).strftime('%Y-%m-%d') for ms in (first_ms, last_ms - 1))
  return first if first == last else f'{first} to {last}'
