"""Ids, vocabularies and binary records."""

import hashlib

import numpy as np
import polars as pl
import pytest

from pinfm_jax.data.events import MAX_ACTIONS, Vocabulary, id_key, id_keys
from pinfm_jax.data.records import (
  History,
  Request,
  decode_history,
  decode_request,
  encode_histories,
  encode_requests,
  pack_bits,
  unpack_bits,
)
from pinfm_jax.errors import UserError


def _history(rng: np.random.Generator, n: int) -> History:
  return History(
    np.sort(rng.integers(0, 2**50, n)),
    rng.integers(0, 2**64, n, dtype=np.uint64),
    rng.integers(0, 2**16, n).astype(np.uint16),
    rng.integers(0, 2**32, n, dtype=np.uint32),
  )


def _request(rng: np.random.Generator, c: int, widths=(3, 2, 4), labels=5, reference=True) -> Request:
  dense = rng.normal(size=(c, widths[0])).astype(np.float32)
  dense[rng.random(dense.shape) < 0.3] = np.nan
  return Request(
    7,
    3,
    rng.integers(0, 2**50, c),
    rng.integers(0, 2**64, c, dtype=np.uint64),
    rng.integers(-1, 2**50, c),
    rng.integers(0, 2**16, c).astype(np.uint16),
    rng.integers(0, 2, (c, labels)).astype(np.uint8),
    dense,
    rng.integers(0, 9, (c, widths[1])).astype(np.int32),
    rng.normal(size=(c, widths[2])).astype(np.float32),
    rng.random((c, labels)).astype(np.float32) if reference else None,
  )


def encode_history(history: History) -> bytes:
  return next(encode_histories(history, np.array([0, len(history)])))


def encode_request(request: Request) -> bytes:
  rows, ends = np.array([request.user_row]), np.array([request.history_end])
  return next(encode_requests(request, rows, ends, np.array([0, len(request)])))


def _assert_same(a, b):
  for name in a.__dataclass_fields__:
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert (getattr(a, name) is None) == (getattr(b, name) is None)


@pytest.mark.parametrize('n', [0, 1, 17])
def test_history_survives_its_record(n):
  history = _history(np.random.default_rng(n), n)
  _assert_same(decode_history(encode_history(history)), history)


@pytest.mark.parametrize('reference', [True, False])
@pytest.mark.parametrize('widths', [(3, 2, 4), (0, 0, 0), (0, 1, 0)])
def test_request_survives_its_record(widths, reference):
  request = _request(np.random.default_rng(1), 6, widths, reference=reference)
  _assert_same(decode_request(encode_request(request)), request)


def test_layout_is_the_documented_one():
  history = History(np.array([258]), np.array([3], np.uint64), np.array([4], np.uint16), np.array([5], np.uint32))
  expected = b'PFH1' + b'\1\0\0\0' + b'\2\1' + b'\0' * 6 + b'\3' + b'\0' * 7 + b'\4\0' + b'\5\0\0\0'
  assert encode_history(history) == expected


def test_many_are_encoded_like_one_by_one():
  rng = np.random.default_rng(2)
  history = _history(rng, 9)
  offsets = np.array([0, 4, 4, 9])
  parts = [(0, 4), (4, 4), (4, 9)]
  alone = [History(*(getattr(history, f)[a:b] for f in history.__dataclass_fields__)) for a, b in parts]
  assert list(encode_histories(history, offsets)) == [encode_history(part) for part in alone]
  request = _request(rng, 9)
  records = encode_requests(request, np.array([1, 2, 3]), np.array([4, 5, 6]), offsets)
  decoded = [decode_request(record) for record in records]
  assert [(r.user_row, r.history_end, len(r)) for r in decoded] == [(1, 4, 4), (2, 5, 0), (3, 6, 5)]
  np.testing.assert_array_equal(decoded[2].sparse, request.sparse[4:9])


def test_damaged_records_are_refused():
  rng = np.random.default_rng(3)
  for record, decode in (
    (encode_history(_history(rng, 4)), decode_history),
    (encode_request(_request(rng, 4)), decode_request),
  ):
    for damaged in (b'', record[:3], record[:-1], record + b'\0', b'XXXX' + record[4:]):
      with pytest.raises(ValueError):
        decode(damaged)


def test_bits():
  flags = np.random.default_rng(4).integers(0, 2, (20, 32)).astype(np.uint8)
  np.testing.assert_array_equal(unpack_bits(pack_bits(flags), 32), flags)
  assert pack_bits(np.array([[0, 1, 1]])).tolist() == [6]


def test_integer_keys_are_two_s_complement():
  values = [0, 5, -1, 2**63 - 1, -(2**63)]
  expected = [0, 5, 2**64 - 1, 2**63 - 1, 2**63]
  assert [id_key(v, 'integer') for v in values] == expected
  assert id_keys(np.array(values), 'integer').tolist() == expected
  assert id_keys(pl.Series(['5', '-1']), 'integer').tolist() == [5, 2**64 - 1]


def test_string_keys_are_blake2b():
  values = ['a', 'é', 'a', 'x' * 512]
  expected = [int.from_bytes(hashlib.blake2b(v.encode(), digest_size=8).digest(), 'little') for v in values]
  assert [id_key(v, 'string') for v in values] == expected
  assert id_keys(values, 'string').tolist() == expected


@pytest.mark.parametrize(
  ('value', 'kind'),
  [
    ('x', 'integer'),
    (2**63, 'integer'),
    (1.5, 'integer'),
    ('', 'string'),
    ('x' * 513, 'string'),
    ('\ud800', 'string'),
    (1, 'int'),
  ],
)
def test_bad_ids(value, kind):
  with pytest.raises(UserError):
    id_key(value, kind)
  if value != '\ud800':  # half of a surrogate pair does not fit into a series at all
    with pytest.raises(UserError):
      id_keys(pl.Series([value]), kind)


def test_missing_ids_are_refused():
  with pytest.raises(UserError, match='missing'):
    id_keys(pl.Series(['a', None]), 'string')


def test_vocabulary_renumbers_what_it_discovers():
  vocabulary = Vocabulary.of('surface', 10, None)
  vocabulary.add(['b'])
  vocabulary.add(['c', 'a', 'b'])
  names, code = vocabulary.final()
  assert names == ['a', 'b', 'c']
  assert {name: names[code[i]] for i, name in enumerate(vocabulary.names)} == {name: name for name in names}


def test_vocabulary_sorts_numbers_as_numbers_and_keeps_a_given_order():
  discovered = Vocabulary.of('surface', 10, None)
  discovered.add(['10', '9', '-1'])
  assert discovered.final()[0] == ['-1', '9', '10']
  given = Vocabulary.of('surface', 10, ['z', 'a'])
  given.add(['new'])
  assert given.final()[0] == ['z', 'a']


def test_vocabulary_limits():
  vocabulary = Vocabulary.of('action', MAX_ACTIONS, None)
  with pytest.raises(UserError, match='at most 32'):
    vocabulary.add([str(i) for i in range(33)])
  with pytest.raises(UserError, match='twice'):
    Vocabulary.of('action', MAX_ACTIONS, ['a', 'a'])
