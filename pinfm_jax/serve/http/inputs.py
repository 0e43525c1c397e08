"""From input tensors to the documents that `pinfm score` takes: `request` as JSON, or one tensor a field.

A field's tensors have a row a user: history_* [U, L], candidate_* [U, C]; what stands behind `history_length` events
or `num_candidates` candidates of a row is padding. Integer surfaces and actions are codes and bits in the manifest's
order; names may be given instead, several actions with commas between.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pinfm_jax.serve.fields import show
from pinfm_jax.serve.http.protocol import HttpError, Tensor
from pinfm_jax.serve.manifest import Manifest

REQUEST = 'request'
_INTEGERS = ('INT64', 'INT32', 'INT16', 'INT8', 'UINT64', 'UINT32', 'UINT16', 'UINT8')
_FLOATS = ('FP32', 'FP64', 'FP16')
_NAMES_OR_CODES = ('BYTES', *_INTEGERS)
_USER = ('request_id', 'timestamp', 'surface', 'history_length', 'history_events', 'num_candidates')


@dataclass(frozen=True)
class InputSpec:
  """A tensor that the model takes: its datatypes, the one to name first, and its shape (letters vary)."""

  name: str
  datatypes: tuple[str, ...]
  shape: tuple[str | int, ...]

  def describe(self) -> dict[str, Any]:
    """The entry of the model's metadata."""
    sizes = [size if isinstance(size, int) else -1 for size in self.shape]
    return {'name': self.name, 'datatype': self.datatypes[0], 'shape': sizes}


def input_specs(manifest: Manifest) -> dict[str, InputSpec]:
  """Every tensor that a bundle takes, `request` first."""
  ids = ('BYTES', *_INTEGERS) if manifest.id_type.item == 'string' else (*_INTEGERS, 'BYTES')
  events, candidates, features = ('U', 'L'), ('U', 'C'), manifest.schema.features
  model = manifest.pinfm
  specs = [
    (REQUEST, ('BYTES',), ('n',)),
    ('request_id', _NAMES_OR_CODES, ('U',)),
    ('timestamp', _INTEGERS, ('U',)),
    ('surface', _NAMES_OR_CODES, ('U',)),
    ('history_length', _INTEGERS, ('U',)),
    ('history_events', _INTEGERS, ('U',)),
    ('num_candidates', _INTEGERS, ('U',)),
    ('history_item_id', ids, events),
    ('history_timestamp', _INTEGERS, events),
    ('history_surface', _NAMES_OR_CODES, events),
    ('history_actions', ('UINT32', *_INTEGERS, 'BYTES'), events),
    ('candidate_item_id', ids, candidates),
    ('candidate_item_created_at', _INTEGERS, candidates),
    ('candidate_timestamp', _INTEGERS, candidates),
    ('candidate_surface', _NAMES_OR_CODES, candidates),
  ]
  specs += [(f'candidate_{name}', (*_FLOATS, *_INTEGERS), candidates) for name in features.dense]
  specs += [(f'candidate_{feature.name}', _NAMES_OR_CODES, candidates) for feature in features.sparse]
  vectors = [(feature.name, feature.width) for feature in features.embedding]
  if manifest.schema.content_width:
    vectors.append(('content', manifest.schema.content_width))
  specs += [(f'candidate_{name}', _FLOATS, (*candidates, width)) for name, width in vectors]
  if model is not None and model.content:
    specs.append(('history_content', _FLOATS, (*events, model.content_width)))
  return {name: InputSpec(name, datatypes, shape) for name, datatypes, shape in specs}


class InputReader:
  """Turns input tensors into documents."""

  def __init__(self, manifest: Manifest):
    """Takes names and vocabularies."""
    self.specs = input_specs(manifest)
    self._actions, self._surfaces = manifest.actions, manifest.surfaces
    sparse = {f'candidate_{feature.name}' for feature in manifest.schema.features.sparse}
    readers: dict[str, Callable[[np.ndarray], list]] = dict.fromkeys(sparse, _optional_text)
    readers |= {'history_actions': self._action_names, 'candidate_item_created_at': _optional_time}
    readers |= dict.fromkeys(('surface', 'history_surface', 'candidate_surface'), self._surface_names)
    vectors = (f'candidate_{feature.name}' for feature in manifest.schema.features.embedding)
    readers |= dict.fromkeys((*vectors, 'candidate_content', 'history_content'), _optional_vectors)
    self._readers = readers

  def documents(self, inputs: Mapping[str, Tensor], request_id: str) -> list[Any]:
    """The requests that the tensors hold.

    Args:
      inputs: `request` alone, or a tensor a field.
      request_id: names the requests if the tensors do not, with '/' and the number of the row.

    Raises:
      HttpError: 400, tensors that are unknown, of another datatype, or that do not fit together.
    """
    for name, tensor in inputs.items():
      if name not in self.specs:
        near = difflib.get_close_matches(name, list(self.specs), n=1, cutoff=0.0)[0]
        raise HttpError(400, f"got the input {show(name)}, which the model does not have; the nearest is '{near}'")
      spec = self.specs[name]
      if tensor.datatype not in spec.datatypes:
        expected = ', '.join(spec.datatypes)
        raise HttpError(400, f"got the datatype {tensor.datatype} of the input '{name}', expected one of {expected}")
    if REQUEST in inputs:
      if len(inputs) > 1:
        other = next(name for name in inputs if name != REQUEST)
        raise HttpError(400, f"got '{REQUEST}' and '{other}'; expected whole requests or a tensor a field, not both")
      return [_document(i, text) for i, text in enumerate(inputs[REQUEST].array.ravel())]
    self._check_shapes(inputs)
    columns = {name: self._column(name, _without_padding(name, inputs)) for name in inputs}
    users = inputs['candidate_item_id'].array.shape[0]
    columns.setdefault('request_id', [f'{request_id}/{u}' for u in range(users)])
    return [_user(columns, u) for u in range(users)]

  def _check_shapes(self, inputs: Mapping[str, Tensor]) -> None:
    for name in ('candidate_item_id', 'history_item_id'):
      if name not in inputs:
        raise HttpError(400, f"expected the input '{REQUEST}', or tensors with '{name}' among them")
    sizes: dict[str, tuple[int, str]] = {}
    for name, tensor in inputs.items():
      spec, shape = self.specs[name], tensor.array.shape
      described = ', '.join(map(str, spec.shape))
      if len(shape) != len(spec.shape):
        raise HttpError(400, f"got the shape {list(shape)} of the input '{name}', expected [{described}]")
      for letter, size in zip(spec.shape, shape, strict=True):
        if isinstance(letter, int):
          known, expected = letter, f'[{described}]'
        else:
          known, other = sizes.setdefault(letter, (size, name))
          expected = f'[{described}] with {letter} = {known}, as in {other}'
        if size != known:
          raise HttpError(400, f"got the shape {list(shape)} of the input '{name}', expected {expected}")
    for name, whole in (('history_length', 'history_item_id'), ('num_candidates', 'candidate_item_id')):
      if name in inputs and len(counts := inputs[name].array):
        most = inputs[whole].array.shape[1]
        if counts.min() < 0 or counts.max() > most:
          raise HttpError(400, f"the input '{name}' has values outside 0 to {most}, the width of {whole}")

  def _column(self, name: str, array: np.ndarray) -> list:
    if array.dtype == object:
      texts = [_text(value, name) for value in array.ravel()]
      array = np.array(texts, object).reshape(array.shape)
    try:
      return self._readers.get(name, np.ndarray.tolist)(array)
    except IndexError:
      raise HttpError(400, f"the input '{name}' has a code that the model does not have") from None

  def _surface_names(self, array: np.ndarray) -> list:
    if array.dtype == object:
      return _optional_text(array)
    return _nested(array, lambda code: None if code == -1 else _at(self._surfaces, code))

  def _action_names(self, array: np.ndarray) -> list:
    if array.dtype == object:
      return _nested(array, lambda text: text.split(',') if text else [])
    names = {int(bits): self._of_bits(int(bits)) for bits in np.unique(array)}
    return _nested(array, names.__getitem__)

  def _of_bits(self, bits: int) -> list[str]:
    return (
      [_at(self._actions, bit) for bit in range(max(bits.bit_length(), 0)) if bits >> bit & 1]
      if bits >= 0
      else _at((), -1)
    )


def _without_padding(name: str, inputs: Mapping[str, Tensor]) -> np.ndarray:
  """The tensor with zeros or empty text behind the real events or candidates: any padding will do."""
  array = inputs[name].array
  for prefix, lengths in (('history_', 'history_length'), ('candidate_', 'num_candidates')):
    if name.startswith(prefix) and array.ndim > 1 and lengths in inputs:
      array = array.copy()
      array[np.arange(array.shape[1]) >= inputs[lengths].array[:, None]] = b'' if array.dtype == object else 0
  return array


def _document(i: int, text: bytes) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise HttpError(
      400, f'request {i}: not valid JSON ({error}); expected what `pinfm score` takes, as a string'
    ) from None


def _user(columns: Mapping[str, list], u: int) -> dict[str, Any]:
  """The document of one row of the tensors."""
  document = {name: columns[name][u] for name in _USER if name in columns}
  events = document.pop('history_length', len(columns['history_item_id'][u]))
  candidates = document.pop('num_candidates', len(columns['candidate_item_id'][u]))
  if document.get('surface', '') is None:
    del document['surface']
  return document | {
    'history': _rows(columns, 'history_', u, events),
    'candidates': _rows(columns, 'candidate_', u, candidates),
  }


def _rows(columns: Mapping[str, list], prefix: str, u: int, count: int) -> list[dict[str, Any]]:
  named = {
    name.removeprefix(prefix): column[u][:count]
    for name, column in columns.items()
    if name.startswith(prefix) and name not in _USER
  }
  return [dict(zip(named, values, strict=True)) for values in zip(*named.values(), strict=True)]


def _text(value: bytes, name: str) -> str:
  try:
    return value.decode()
  except UnicodeDecodeError as error:
    raise HttpError(400, f"the input '{name}' has an element that is not UTF-8 ({error})") from None


def _nested(array: np.ndarray, function: Callable[[Any], Any]) -> list:
  """`tolist` of the array with the function applied to each element."""
  return array.tolist() if not array.size else _map(array.tolist(), function)


def _map(values: list, function: Callable[[Any], Any]) -> list:
  return [_map(value, function) if isinstance(value, list) else function(value) for value in values]


def _optional_text(array: np.ndarray) -> list:
  return _nested(array, lambda text: None if text == '' else text)


def _optional_time(array: np.ndarray) -> list:
  return _nested(array, lambda time: None if time < 0 else time)


def _optional_vectors(array: np.ndarray) -> list:
  missing = np.isnan(array).any(axis=-1)
  return [
    [None if absent else vector for vector, absent in zip(row, gone, strict=True)]
    for row, gone in zip(array.tolist(), missing.tolist(), strict=True)
  ]


def _at(names: tuple[str, ...], code: int) -> str:
  if not 0 <= code < len(names):
    raise IndexError(code)
  return names[code]
