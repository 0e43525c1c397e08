"""Requests read column by column are what they are value by value, and anything unusual is left to the slower way."""

import copy
import dataclasses
import time

import numpy as np
import pytest
import toy_bundle

from pinfm_jax.data.info import IdTypes
from pinfm_jax.errors import UserError
from pinfm_jax.serve import columns
from pinfm_jax.serve.bundle import manifest_of
from pinfm_jax.serve.columns import UnusualError
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.requests import RequestParser


@pytest.fixture(scope='module')
def manifest():
  toy = toy_bundle.Toy(toy_bundle.RankerConfig(sequence='none'), {}, None, None)
  return manifest_of(toy.trained(), None, ())


@pytest.fixture
def documents():
  return list(dataset_requests(toy_bundle.ToyDataset([0, 1, 7, 20, 33]), range(5), 10_000))


def slow(parser):
  """A parser that reads value by value."""

  def never(*_):
    raise UnusualError

  parser._plain_history = parser._plain_candidates = never
  return parser


def outcome(parser, document):
  try:
    return parser.parse(document)
  except UserError as error:
    return str(error)


def same(a, b):
  if isinstance(a, str) or isinstance(b, str):
    return a == b
  pairs = [(getattr(a.history, f), getattr(b.history, f)) for f in ('timestamp', 'item', 'surface', 'actions')]
  names = ('timestamp', 'item', 'created_at', 'surface', 'dense', 'sparse', 'embedding')
  pairs += [(getattr(a.candidates, f), getattr(b.candidates, f)) for f in names]
  pairs += [(a.content, b.content)]
  for x, y in pairs:
    np.testing.assert_array_equal(x, y)
    assert x.dtype == y.dtype
    assert x.shape == y.shape
  return (a.request_id, a.item_ids, a.window) == (b.request_id, b.item_ids, b.window)


VALUES = (
  None, True, 0, 1, 1.0, -1, 2.5, float('nan'), float('inf'), 10**30, 10**400, 3.5e38, '', 'de', 'click', 'feed',
  '2024-01-01',
  [], ['click'], ['click', 'save'], ['nothing'], [['click']], [1.0, 2.0], [1, float('nan')], [1, 2, 3], {'index': 2},
  {'index': 99}, {},
)  # fmt: skip


def test_random_changes_are_read_alike(manifest, documents):
  rng, wrong, plain = np.random.default_rng(0), 0, 0
  for _ in range(600):
    document = copy.deepcopy(documents[rng.integers(0, len(documents))])
    for _ in range(rng.integers(0, 3)):
      rows = document['candidates'] if rng.random() < 0.6 or not document['history'] else document['history']
      row = rows[rng.integers(0, len(rows))]
      name = rng.choice([*row, 'price', 'unknown', 'content', 'surface'])
      if rng.random() < 0.3:
        row.pop(str(name), None)
      else:
        row[str(name)] = VALUES[rng.integers(0, len(VALUES))]
    if rng.random() < 0.1:
      rng.shuffle(document['history'])
    quick, exact = RequestParser(manifest), slow(RequestParser(manifest))
    found, expected = outcome(quick, document), outcome(exact, document)
    assert same(found, expected), (found, expected)
    wrong += isinstance(found, str)
    plain += not isinstance(found, str)
  assert min(wrong, plain) > 100


def test_integer_ids_and_untimed_histories(manifest, documents):
  manifest = dataclasses.replace(manifest, id_type=IdTypes('integer', 'integer'))
  document = documents[3]
  for number, row in enumerate((*document['history'], *document['candidates'])):
    row['item_id'] = (-1) ** number * number
  for event in document['history']:
    del event['timestamp']
  assert same(outcome(RequestParser(manifest), document), outcome(slow(RequestParser(manifest)), document))
  document['candidates'][2]['item_id'] = 2**63
  assert 'expected a 64-bit integer' in outcome(RequestParser(manifest), document)


def test_plain_requests_are_read_by_columns(manifest, documents):
  parser = RequestParser(manifest)
  for document in documents[1:]:
    parser._plain_history(document['history'])
    parser._plain_candidates(document['candidates'], None, 0)


@pytest.mark.parametrize(
  'call',
  [
    lambda: columns.keys([True], 'integer'),
    lambda: columns.keys(['5'], 'integer'),
    lambda: columns.keys(['x', ''], 'string'),
    lambda: columns.times([-1], 0),
    lambda: columns.times([True], 0),
    lambda: columns.names(['a'], {'b': 1}, 0),
    lambda: columns.names([None], {'b': 1}, None),
    lambda: columns.name_sets([['a']], {'b': 1}),
    lambda: columns.numbers([{'x': float('inf')}], ['x']),
    lambda: columns.vectors([[1, float('nan')]], 2, 0),
    lambda: columns.vectors([[1]], 2, 0),
    lambda: columns.plain_objects([{'x': 1}], {'y': 1}),
  ],
)
def test_the_unusual_is_left_to_the_slower_way(call):
  with pytest.raises(UnusualError):
    call()


def test_a_repeated_history_is_not_read_again(manifest, documents, monkeypatch):
  parser = RequestParser(manifest)
  first = parser.parse(documents[4])
  monkeypatch.setattr(parser, '_plain_history', None)
  again = parser.parse(copy.deepcopy(documents[4]) | {'candidates': []})
  assert again.history is first.history
  assert again.windows is first.windows
  late = documents[4] | {'timestamp': int(first.history.timestamp[-1]), 'candidates': []}
  with pytest.raises(UserError, match="is not before the request's timestamp"):
    parser.parse(late)
  parser.forget()
  with pytest.raises(TypeError):
    parser.parse(documents[4])


def test_columns_are_faster(manifest, documents):
  document = documents[4] | {'candidates': documents[4]['candidates'] * 200}

  def seconds(parser):
    begin = time.process_time()
    for _ in range(3):
      parser.parse(document)
    return time.process_time() - begin

  quick, exact = RequestParser(manifest), slow(RequestParser(manifest))
  assert min(seconds(quick) for _ in range(3)) < 0.8 * min(seconds(exact) for _ in range(3))
