"""Bodies of the Open Inference Protocol, and tensors to documents: round trips and malformed input."""

import gzip
import json
import zlib

import numpy as np
import pytest
import toy_bundle
from hypothesis import given
from hypothesis import strategies as st

from pinfm_jax.data.info import IdTypes
from pinfm_jax.errors import UserError
from pinfm_jax.serve.bundle import manifest_of
from pinfm_jax.serve.http.inputs import InputReader
from pinfm_jax.serve.http.outputs import OutputWriter
from pinfm_jax.serve.http.protocol import (
  HEADER_LENGTH,
  HttpError,
  Tensor,
  bytes_array,
  decode_request,
  encode_response,
  inflate,
)

ARRAYS = {
  'BOOL': np.array([[True], [False]]),
  'INT8': np.array([-128, 127], np.int8),
  'INT64': np.array([[-(2**63), 2**63 - 1]]),
  'UINT64': np.array([2**64 - 1], np.uint64),
  'UINT32': np.array([2**32 - 1, 0], np.uint32),
  'FP16': np.array([1.5, -2], np.float16),
  'FP32': np.array([[0.1, -3e38]], np.float32),
  'FP64': np.array([0.1]),
  'BYTES': bytes_array([b'', 'ünï'.encode(), b'a,b'], (3, 1)),
}


def encode(tensors, binary):
  """A request body as a client makes it: the layout of an answer, with `outputs` called `inputs`."""
  body, headers = encode_response({}, [(tensor, binary) for tensor in tensors])
  length = int(headers.get(HEADER_LENGTH, len(body)))
  header = body[:length].replace(b'"outputs"', b'"inputs"', 1)
  return header + body[length:], str(len(header)) if binary else None


@pytest.mark.parametrize('binary', [False, True])
def test_tensors_survive_the_round_trip(binary):
  tensors = [Tensor(f't{i}', datatype, array) for i, (datatype, array) in enumerate(ARRAYS.items())]
  request = decode_request(*encode(tensors, binary))
  assert list(request.inputs) == [tensor.name for tensor in tensors]
  for tensor in tensors:
    got = request.inputs[tensor.name]
    assert got.datatype == tensor.datatype
    np.testing.assert_array_equal(got.array, tensor.array)
    assert got.array.dtype == tensor.array.dtype
  assert (request.id, request.outputs, request.binary, request.timeout_s) == ('', None, False, None)


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_any_bytes_survive(values):
  tensor = Tensor('x', 'BYTES', bytes_array(values, (len(values),)))
  got = decode_request(*encode([tensor], True)).inputs['x'].array
  assert got.tolist() == values


def test_json_may_be_nested_or_flat_and_nan_is_null_in_answers():
  flat, nested = [1, 2, 3, 4, 5, 6], [[1, 2], [3, 4], [5, 6]]
  for data in (flat, nested):
    body = json.dumps({'inputs': [{'name': 'x', 'shape': [3, 2], 'datatype': 'INT32', 'data': data}]})
    np.testing.assert_array_equal(decode_request(body.encode(), None).inputs['x'].array, nested)
  body, _ = encode_response({'id': 'a'}, [(Tensor('y', 'FP32', np.array([np.nan, 1], np.float32)), False)])
  assert json.loads(body) == {
    'id': 'a',
    'outputs': [{'name': 'y', 'datatype': 'FP32', 'shape': [2], 'data': [None, 1]}],
  }


def test_outputs_and_parameters():
  document = {
    'id': 'q',
    'inputs': [],
    'parameters': {'timeout': 250_000, 'binary_data_output': True},
    'outputs': [{'name': 'a', 'parameters': {'binary_data': False}}, {'name': 'b'}],
  }
  request = decode_request(json.dumps(document).encode(), None)
  assert (request.id, request.timeout_s, request.binary) == ('q', 0.25, True)
  assert request.outputs == {'a': False, 'b': True}


ONE = {'name': 'x', 'shape': [1], 'datatype': 'INT64', 'data': [1]}
BAD = [
  (b'{', 'not valid JSON'),
  (b'[' * 100_000, 'not valid JSON'),
  (b'\xff', 'not valid JSON'),
  ([], 'expected an inference request'),
  ({}, 'got inputs None, expected a list'),
  ({'inputs': [1]}, r'got inputs \[1\], expected a list of objects'),
  ({'inputs': [], 'id': 5}, 'got id 5, expected a string'),
  ({'inputs': [], 'parameters': 5}, 'got parameters 5 of the request'),
  ({'inputs': [], 'parameters': {'timeout': -1}}, 'got timeout -1, expected microseconds'),
  ({'inputs': [], 'parameters': {'timeout': True}}, 'got timeout True'),
  ({'inputs': [], 'outputs': [{}]}, 'got the name None of an output'),
  ({'inputs': [], 'outputs': [{'name': 'a', 'parameters': {'binary_data': 1}}]}, 'got binary_data 1, expected true'),
  ({'inputs': [], 'outputs': [{'name': 'a', 'parameters': {'classification': 3}}]}, 'asks for classification'),
  ({'inputs': [], 'outputs': [{'name': 'a', 'parameters': {'shared_memory_region': 'r'}}]}, 'shared memory'),
  ({'inputs': [ONE, ONE]}, "input 'x' is given twice"),
  ({'inputs': [ONE | {'name': ''}]}, "got the name '' of an input"),
  ({'inputs': [ONE | {'datatype': 'INT7'}]}, "got datatype 'INT7' of the input 'x', expected one of BOOL"),
  ({'inputs': [ONE | {'shape': [-1]}]}, r'got shape \[-1\]'),
  ({'inputs': [ONE | {'shape': [True]}]}, r'got shape \[True\]'),
  ({'inputs': [ONE | {'shape': [1] * 9}]}, 'got shape'),
  ({'inputs': [ONE | {'shape': [2]}]}, r'has 1 elements, but its shape \[2\] needs 2'),
  ({'inputs': [ONE | {'shape': [2, 2], 'data': [[1, 2, 3], [4]]}]}, 'has 2 elements'),
  ({'inputs': [ONE | {'data': None}]}, 'got data None'),
  ({'inputs': [ONE | {'data': [1.5]}]}, 'got 1.5 in the input .x., expected INT64'),
  ({'inputs': [ONE | {'data': [True]}]}, 'got True'),
  ({'inputs': [ONE | {'data': [None]}]}, 'got None'),
  ({'inputs': [ONE | {'data': [2**63]}]}, 'outside the range of INT64'),
  ({'inputs': [ONE | {'datatype': 'BYTES'}]}, 'got 1 in the input .x., expected BYTES'),
  ({'inputs': [ONE | {'parameters': {'binary_data_size': 8}}]}, 'both data and binary_data_size'),
]


@pytest.mark.parametrize(('document', 'message'), BAD)
def test_malformed_bodies_are_refused(document, message):
  body = document if isinstance(document, bytes) else json.dumps(document).encode()
  with pytest.raises(HttpError, match=message) as error:
    decode_request(body, None)
  assert error.value.status == 400
  assert '\n' not in error.value.message


@pytest.mark.parametrize(
  ('size', 'datatype', 'octets', 'message'),
  [
    (8, 'INT64', b'1234567', 'got binary_data_size 8 of the input .x., but 7 bytes are left'),
    (7, 'INT64', b'1234567', 'has 7 bytes, but its shape .1. of INT64 needs 8'),
    (8, 'INT64', b'123456789', '1 bytes follow the last binary tensor'),
    (-1, 'INT64', b'', 'got binary_data_size -1'),
    (6, 'BYTES', b'\x09\0\0\0ab', 'element 0 is longer than what is left'),
    (3, 'BYTES', b'\x01\0\0', 'element 0 is longer'),
    (8, 'BYTES', b'\0\0\0\0\0\0\0\0', 'has 2 elements, but its shape needs 1'),
  ],
)
def test_malformed_binary_tensors_are_refused(size, datatype, octets, message):
  entry = {'name': 'x', 'shape': [1], 'datatype': datatype, 'parameters': {'binary_data_size': size}}
  header = json.dumps({'inputs': [entry]}).encode()
  with pytest.raises(HttpError, match=message):
    decode_request(header + octets, str(len(header)))


@pytest.mark.parametrize('length', ['-1', '1.5', '', '²', '99'])
def test_a_wrong_header_length_is_refused(length):
  with pytest.raises(HttpError, match='got Inference-Header-Content-Length'):
    decode_request(b'{"inputs": []}', length)


def test_compressed_bodies():
  body = b'x' * 1000
  for encoding, packed in (('gzip', gzip.compress(body)), ('deflate', zlib.compress(body)), ('identity', body)):
    assert inflate(packed, encoding, 1000) == body
  for packed, limit, status in (
    (gzip.compress(body), 999, 413),
    (gzip.compress(body)[:-1], 1000, 400),
    (gzip.compress(body) + b'!', 1000, 400),
    (b'junk', 1000, 400),
  ):
    with pytest.raises(HttpError) as error:
      inflate(packed, 'gzip', limit)
    assert error.value.status == status
  with pytest.raises(HttpError, match='expected gzip, deflate or none') as error:
    inflate(body, 'br', 1000)
  assert error.value.status == 415


@pytest.fixture(scope='module')
def manifest():
  return manifest_of(toy_bundle.make_toy('none').trained(), None, ())


def tensors(**arrays):
  made = {}
  for name, array in arrays.items():
    array = np.asarray(array)
    if array.dtype.kind in 'UO':
      array = bytes_array([t if isinstance(t, bytes) else t.encode() for t in array.ravel()], array.shape)
    names = {'O': 'BYTES', 'f': f'FP{array.dtype.itemsize * 8}', 'i': 'INT64', 'u': 'UINT32', 'b': 'BOOL'}
    made[name] = Tensor(name, names[array.dtype.kind], array)
  return made


FULL = {
  'timestamp': [10, 20],
  'surface': ['feed', ''],
  'history_item_id': [['a', 'b'], ['c', '']],
  'history_timestamp': [[1, 2], [3, 0]],
  'history_surface': [[0, 1], [1, 0]],
  'history_actions': np.array([[5, 0], [2, 0]], np.uint32),
  'history_length': [2, 1],
  'history_events': [7, 1],
  'candidate_item_id': [['x'], ['y']],
  'candidate_item_created_at': [[5], [-1]],
  'candidate_price': np.array([[1.5], [2]], np.float32),
  'candidate_country': [['de'], ['']],
  'candidate_campaign': [[3], [4]],
  'candidate_picture': np.array([[[1, 2, 3]], [[0, np.nan, 0]]], np.float32),
  'candidate_content': np.array([[[1, 2]], [[np.nan, 0]]], np.float32),
}


def test_a_tensor_a_field_is_the_same_as_a_document(manifest):
  got = InputReader(manifest).documents(tensors(**FULL), 'q')
  assert got[0] == {
    'request_id': 'q/0', 'timestamp': 10, 'surface': 'feed', 'history_events': 7,
    'history': [{'item_id': 'a', 'timestamp': 1, 'surface': 'feed', 'actions': ['click', 'hide']},
                {'item_id': 'b', 'timestamp': 2, 'surface': 'search', 'actions': []}],
    'candidates': [{'item_id': 'x', 'item_created_at': 5, 'price': 1.5, 'country': 'de', 'campaign': 3,
                    'picture': [1, 2, 3], 'content': [1, 2]}],
  }  # fmt: skip
  assert got[1] == {
    'request_id': 'q/1', 'timestamp': 20, 'history_events': 1,
    'history': [{'item_id': 'c', 'timestamp': 3, 'surface': 'search', 'actions': ['save']}],
    'candidates': [{'item_id': 'y', 'item_created_at': None, 'price': 2, 'country': None, 'campaign': 4,
                    'picture': None, 'content': None}],
  }  # fmt: skip


def test_names_of_actions_and_padding_of_candidates(manifest):
  got = InputReader(manifest).documents(
    tensors(
      history_item_id=np.zeros((1, 2), '<U1'), history_actions=[['click,save', '']], history_length=[2],
      candidate_item_id=[['x', 'y']], num_candidates=[1], request_id=['mine'],
    ), 'q',
  )  # fmt: skip
  assert [event['actions'] for event in got[0]['history']] == [['click', 'save'], []]
  assert got[0]['candidates'] == [{'item_id': 'x'}]
  assert got[0]['request_id'] == 'mine'


def test_padding_may_be_anything(manifest):
  """What stands behind `history_length` and `num_candidates` is never looked at."""
  padded = dict(FULL) | {
    'history_surface': [[0, 1], [1, -7]],
    'history_actions': np.array([[5, 0], [2, 2**32 - 1]], np.uint32),
    'num_candidates': [1, 0],
    'candidate_item_id': np.array([[b'x'], [b'\xff']], object),
    'candidate_surface': [[0], [99]],
  }
  got = InputReader(manifest).documents(tensors(**padded), 'q')
  plain = InputReader(manifest).documents(tensors(**FULL), 'q')
  assert got[0] == plain[0] | {'candidates': [plain[0]['candidates'][0] | {'surface': 'feed'}]}
  assert got[1] == plain[1] | {'candidates': []}


def test_empty_tensors(manifest):
  reader = InputReader(manifest)
  none = reader.documents(
    tensors(history_item_id=np.zeros((0, 3), '<U1'), candidate_item_id=np.zeros((0, 2), '<U1')), ''
  )
  assert none == []
  empty = tensors(
    history_item_id=np.zeros((1, 0), '<U1'), history_actions=np.zeros((1, 0), np.uint32),
    candidate_item_id=np.zeros((1, 0), '<U1'), candidate_picture=np.zeros((1, 0, 3), np.float32),
  )  # fmt: skip
  assert reader.documents(empty, '') == [{'request_id': '/0', 'history': [], 'candidates': []}]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'candidate_pirce': [[1.0], [2.0]]}, "input 'candidate_pirce', which .* the nearest is 'candidate_price'"),
    ({'candidate_price': [['1'], ['2']]}, "datatype BYTES of the input 'candidate_price', expected one of FP32"),
    ({'candidate_price': [1.0, 2.0]}, r"shape \[2\] of the input 'candidate_price', expected \[U, C\]"),
    ({'candidate_price': [[1.0, 2.0]] * 2}, r"expected \[U, C\] with C = 1, as in candidate_item_id"),
    ({'candidate_picture': np.zeros((2, 1, 4))}, r'shape \[2, 1, 4\] .* expected \[U, C, 3\]'),
    ({'timestamp': [1]}, r"the shape .* expected \[U\] with U = |input 'surface'"),
    ({'history_length': [3, 0]}, "input 'history_length' has values outside 0 to 2"),
    ({'num_candidates': [-1, 0]}, "input 'num_candidates' has values outside 0 to 1"),
    ({'history_surface': [[2, 0], [0, 0]]}, "input 'history_surface' has a code that the model does not have"),
    ({'history_actions': [[8, 0], [0, 0]]}, "input 'history_actions' has a code"),
    ({'history_actions': [[-1, 0], [0, 0]]}, "input 'history_actions' has a code"),
    ({'request': ['{}']}, "got 'request' and '"),
  ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(manifest, change, message):
  with pytest.raises(HttpError, match=message) as error:
    InputReader(manifest).documents(tensors(**(FULL | change)), 'q')
  assert error.value.status == 400


def test_missing_tensors_and_wrong_text(manifest):
  reader = InputReader(manifest)
  with pytest.raises(HttpError, match="expected the input 'request', or tensors with 'candidate_item_id'"):
    reader.documents({}, 'q')
  wrong = tensors(**FULL)
  wrong['surface'].array[0] = b'\xff'
  with pytest.raises(HttpError, match="input 'surface' has an element that is not UTF-8"):
    reader.documents(wrong, 'q')
  with pytest.raises(HttpError, match='request 1: not valid JSON'):
    reader.documents(tensors(request=['{}', '{']), 'q')


def test_a_label_may_not_be_called_as_another_output(manifest):
  from dataclasses import replace

  for name in ('response', 'utility'):
    schema = replace(manifest.schema, labels=('click', name))
    with pytest.raises(UserError, match=f"has the label '{name}'"):
      OutputWriter(replace(manifest, schema=schema, utility={}))


def test_integer_ids_come_first_in_the_metadata(manifest):
  from dataclasses import replace

  kinds = {}
  for kind in ('string', 'integer'):
    specs = InputReader(replace(manifest, id_type=IdTypes('integer', kind))).specs
    kinds[kind] = specs['candidate_item_id'].describe()
  assert kinds == {
    'string': {'name': 'candidate_item_id', 'datatype': 'BYTES', 'shape': [-1, -1]},
    'integer': {'name': 'candidate_item_id', 'datatype': 'INT64', 'shape': [-1, -1]},
  }
