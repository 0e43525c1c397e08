"""Bodies of the Open Inference Protocol v2 over HTTP: JSON tensors, and the binary tensor extension."""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pinfm_jax.serve.fields import show

HEADER_LENGTH = 'Inference-Header-Content-Length'
_DTYPES = {
  'BOOL': np.dtype('?'),
  **{
    f'{sign}INT{bits}': np.dtype(f'<{sign.lower() or "i"}{bits // 8}') for sign in ('U', '') for bits in (8, 16, 32, 64)
  },
  **{f'FP{bits}': np.dtype(f'<f{bits // 8}') for bits in (16, 32, 64)},
}
_DATATYPES = (*_DTYPES, 'BYTES')
_MOST_DIMENSIONS, _LARGEST_DIMENSION = 8, 1 << 31


class HttpError(Exception):
  """An answer that is an error: its status, one line of text, and headers."""

  def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
    super().__init__(message)
    self.status, self.message, self.headers = status, message, dict(headers or {})


@dataclass(frozen=True)
class Tensor:
  """A named tensor; BYTES is an object array of `bytes`."""

  name: str
  datatype: str
  array: np.ndarray


@dataclass(frozen=True)
class InferRequest:
  """A decoded request.

  Attributes:
    id: given back; '' if there is none.
    inputs: by name.
    outputs: name -> whether in binary; None = the model's default outputs.
    binary: whether outputs that do not say so are in binary.
    timeout_s: how long the client waits, None = it did not say.
  """

  id: str
  inputs: Mapping[str, Tensor]
  outputs: Mapping[str, bool] | None
  binary: bool
  timeout_s: float | None


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
  """The body without its Content-Encoding.

  Args:
    body: as received.
    encoding: 'gzip', 'deflate' or 'identity'.
    limit: the most bytes that may come out.

  Raises:
    HttpError: 400 damaged, 413 beyond the limit, 415 another encoding.
  """
  if encoding in ('', 'identity'):
    return body
  if encoding not in ('gzip', 'deflate'):
    raise HttpError(415, f'got Content-Encoding {show(encoding)}, expected gzip, deflate or none')
  stream = zlib.decompressobj(31 if encoding == 'gzip' else 15)
  try:
    content = stream.decompress(body, limit + 1)
  except zlib.error as error:
    raise HttpError(400, f'the body is not valid {encoding} ({error})') from None
  if len(content) > limit:
    raise HttpError(413, f'the body has more than {limit} bytes after decompression; send fewer requests at once')
  if not stream.eof or stream.unused_data:
    raise HttpError(400, f'the body is not one whole {encoding} stream')
  return content


def decode_request(body: bytes, header_length: str | None) -> InferRequest:
  """Decodes the body of an inference request.

  Args:
    body: JSON, or JSON followed by the binary tensors.
    header_length: the header Inference-Header-Content-Length, bytes of the JSON part; None = all.

  Raises:
    HttpError: 400, anything wrong with it.
  """
  length = len(body)
  if header_length is not None:
    sane = header_length.isascii() and header_length.isdigit() and len(header_length) < 20
    length = int(header_length) if sane else -1
    if not 0 <= length <= len(body):
      raise HttpError(
        400, f'got {HEADER_LENGTH} {show(header_length)}, expected 0 to the {len(body)} bytes of the body'
      )
  document = _json_object(body[:length])
  parameters = _parameters(document, 'the request')
  inputs, rest = {}, memoryview(body)[length:]
  for value in _list(document, 'inputs'):
    tensor, used = _tensor(value, rest)
    if tensor.name in inputs:
      raise HttpError(400, f'the input {show(tensor.name)} is given twice')
    inputs[tensor.name], rest = tensor, rest[used:]
  if len(rest):
    raise HttpError(400, f'{len(rest)} bytes follow the last binary tensor; the sum of binary_data_size is too small')
  binary = _flag(parameters, 'binary_data_output', False)
  outputs = None
  if document.get('outputs'):
    outputs = dict(_requested(output, binary) for output in _list(document, 'outputs'))
  identity = document.get('id', '')
  if not isinstance(identity, str):
    raise HttpError(400, f'got id {show(identity)}, expected a string')
  return InferRequest(identity, inputs, outputs, binary, _timeout(parameters))


def encode_response(about: Mapping[str, Any], outputs: Sequence[tuple[Tensor, bool]]) -> tuple[bytes, dict[str, str]]:
  """Encodes an answer.

  Args:
    about: model_name, model_version and id.
    outputs: tensors, each with whether it travels in binary.

  Returns:
    The body and its headers.
  """
  listed, parts = [], []
  for tensor, binary in outputs:
    entry = {'name': tensor.name, 'datatype': tensor.datatype, 'shape': list(tensor.array.shape)}
    if binary:
      parts.append(_octets(tensor))
      entry['parameters'] = {'binary_data_size': len(parts[-1])}
    else:
      entry['data'] = _values(tensor)
    listed.append(entry)
  header = json.dumps({**about, 'outputs': listed}, allow_nan=False).encode()
  if not parts:
    return header, {'Content-Type': 'application/json'}
  headers = {'Content-Type': 'application/octet-stream', HEADER_LENGTH: str(len(header))}
  return b''.join([header, *parts]), headers


def bytes_array(values: Sequence[bytes], shape: tuple[int, ...]) -> np.ndarray:
  """An object array of byte strings."""
  array = np.empty(len(values), object)
  array[:] = values
  return array.reshape(shape)


def _json_object(text: bytes) -> dict:
  try:
    document = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise HttpError(400, f'the body is not valid JSON ({error})') from None
  if not isinstance(document, dict):
    raise HttpError(400, f'got {show(document)}, expected an inference request (a JSON object)')
  return document


def _list(document: Mapping, name: str) -> list:
  value = document.get(name)
  if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
    raise HttpError(400, f'got {name} {show(value)}, expected a list of objects')
  return value


def _parameters(document: Mapping, what: str) -> Mapping:
  value = document.get('parameters', {})
  if not isinstance(value, dict):
    raise HttpError(400, f'got parameters {show(value)} of {what}, expected an object')
  for name in value:
    if name.startswith('shared_memory'):
      raise HttpError(400, f'{what} asks for shared memory, which this server does not have; send tensors in the body')
  return value


def _flag(parameters: Mapping, name: str, default: bool) -> bool:
  value = parameters.get(name, default)
  if not isinstance(value, bool):
    raise HttpError(400, f'got {name} {show(value)}, expected true or false')
  return value


def _timeout(parameters: Mapping) -> float | None:
  value = parameters.get('timeout', 0)
  if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
    raise HttpError(400, f'got timeout {show(value)}, expected microseconds, 0 = the default')
  return value / 1e6 or None


def _requested(output: Mapping, binary: bool) -> tuple[str, bool]:
  name = _name(output, 'an output')
  parameters = _parameters(output, f'the output {show(name)}')
  if parameters.get('classification'):
    raise HttpError(400, f'the output {show(name)} asks for classification; expected the scores themselves')
  return name, _flag(parameters, 'binary_data', binary)


def _name(entry: Mapping, what: str) -> str:
  name = entry.get('name')
  if not isinstance(name, str) or not name:
    raise HttpError(400, f'got the name {show(name)} of {what}, expected a string')
  return name


def _tensor(entry: Mapping, rest: memoryview) -> tuple[Tensor, int]:
  """One input, and how many bytes of the binary part it used."""
  name = _name(entry, 'an input')
  where = f'the input {show(name)}'
  datatype, shape = entry.get('datatype'), entry.get('shape')
  if datatype not in _DATATYPES:
    raise HttpError(400, f'got datatype {show(datatype)} of {where}, expected one of {", ".join(_DATATYPES)}')
  sizes_fit = isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS
  if not sizes_fit or not all(type(n) is int and 0 <= n < _LARGEST_DIMENSION for n in shape):
    raise HttpError(400, f'got shape {show(shape)} of {where}, expected a list of sizes')
  size = _parameters(entry, where).get('binary_data_size')
  if size is None:
    return Tensor(name, datatype, _from_json(entry.get('data'), datatype, shape, where)), 0
  if 'data' in entry:
    raise HttpError(400, f'{where} has both data and binary_data_size; expected one of them')
  if type(size) is not int or not 0 <= size <= len(rest):
    raise HttpError(400, f'got binary_data_size {show(size)} of {where}, but {len(rest)} bytes are left in the body')
  return Tensor(name, datatype, _from_octets(rest[:size], datatype, shape, where)), size


def _from_octets(octets: memoryview, datatype: str, shape: list[int], where: str) -> np.ndarray:
  count = math.prod(shape)
  if datatype == 'BYTES':
    return bytes_array(_split(octets, count, where), tuple(shape))
  dtype = _DTYPES[datatype]
  if len(octets) != count * dtype.itemsize:
    raise HttpError(400, f'{where} has {len(octets)} bytes, but its shape {shape} of {datatype} needs '
                         f'{count * dtype.itemsize}')  # fmt: skip
  return np.frombuffer(octets, dtype).reshape(shape)


def _split(octets: memoryview, count: int, where: str) -> list[bytes]:
  """Elements that each follow their length, a little-endian uint32."""
  values, at = [], 0
  while at < len(octets):
    end = at + 4 + int.from_bytes(octets[at : at + 4], 'little')
    if end > len(octets):
      raise HttpError(400, f'{where}: element {len(values)} is longer than what is left of binary_data_size')
    values.append(bytes(octets[at + 4 : end]))
    at = end
  if len(values) != count:
    raise HttpError(400, f'{where} has {len(values)} elements, but its shape needs {count}')
  return values


def _from_json(data: Any, datatype: str, shape: list[int], where: str) -> np.ndarray:
  if not isinstance(data, list):
    raise HttpError(400, f'got data {show(data)} of {where}, expected a list')
  values = data
  for size in shape[1:]:  # nested as the shape says, or flat
    if values and all(isinstance(value, list) and len(value) == size for value in values):
      values = [inner for value in values for inner in value]
  count = math.prod(shape)
  if len(values) != count:
    raise HttpError(400, f'{where} has {len(values)} elements, but its shape {shape} needs {count}')
  kinds = {'BYTES': (str,), 'BOOL': (bool,)}.get(datatype, (int, float) if datatype.startswith('FP') else (int,))
  wrong = next((value for value in values if type(value) not in kinds), None)
  if wrong is not None or None in values:
    raise HttpError(400, f'got {show(wrong)} in {where}, expected {datatype}')
  if datatype == 'BYTES':
    return bytes_array([value.encode('utf-8', 'surrogatepass') for value in values], tuple(shape))
  try:
    return np.array(values, _DTYPES[datatype]).reshape(shape)
  except OverflowError:
    raise HttpError(400, f'{where} has a value outside the range of {datatype}') from None


def _octets(tensor: Tensor) -> bytes:
  if tensor.datatype == 'BYTES':
    return b''.join(len(value).to_bytes(4, 'little') + value for value in tensor.array.ravel())
  return np.ascontiguousarray(tensor.array, _DTYPES[tensor.datatype]).tobytes()


def _values(tensor: Tensor) -> list:
  values = tensor.array.ravel().tolist()
  if tensor.datatype == 'BYTES':
    return [value.decode() for value in values]
  return [None if value != value else value for value in values]
