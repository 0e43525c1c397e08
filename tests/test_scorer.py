import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
import toy_bundle

from pinfm_jax.config import InteractionConfig
from pinfm_jax.data.info import IdTypes, SparseFeature
from pinfm_jax.errors import UserError
from pinfm_jax.serve.batches import Sizes
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.serve.fields import read_sparse
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.inspect import inspect
from pinfm_jax.serve.requests import RequestParser
from pinfm_jax.serve.scorer import Scorer, score_file

LENGTHS = [0, 1, 7, 20, 21, 33, 200]


@pytest.fixture(scope='module')
def toy():
  return toy_bundle.make_toy()


@pytest.fixture(scope='module')
def dataset():
  return toy_bundle.ToyDataset(LENGTHS)


@pytest.fixture(scope='module')
def bundle(toy, tmp_path_factory):
  return toy.export(tmp_path_factory.mktemp('bundles') / 'float32', storage='float32')


@pytest.fixture(scope='module')
def scorer(bundle):
  return Scorer.load(bundle)


@pytest.fixture
def requests(dataset):
  return list(dataset_requests(dataset, range(len(LENGTHS)), toy_bundle.LENGTH))


def probabilities(result, names=('click', 'hide')):
  return np.array([[score[name] for name in names] for score in result['scores']])


def scores_of(scorer, document):
  return probabilities(next(iter(scorer.score([document]))))


def test_json_scores_equal_the_training_path(scorer, toy, dataset, requests):
  expected = dataset.expected(toy)
  assert np.ptp(expected, axis=(0, 1)).min() > 0.1  # the comparison can fail
  results = list(scorer.score(requests))
  assert [result['request_id'] for result in results] == [f'r{i}' for i in range(len(LENGTHS))]
  for result, request, scores in zip(results, requests, expected, strict=True):
    assert [s['item_id'] for s in result['scores']] == [c['item_id'] for c in request['candidates']]
    np.testing.assert_allclose(probabilities(result), scores, atol=1e-5)
    utility = probabilities(result, ['utility'])[:, 0]
    np.testing.assert_allclose(utility, scores[:, 0] - 3 * scores[:, 1], atol=1e-5)


def test_whole_histories_score_as_their_newest_events(scorer, dataset, requests):
  whole = list(dataset_requests(dataset, range(len(LENGTHS)), history_length=10_000))
  for document in whole:
    assert document.pop('history_events') == len(document['history'])
  for a, b in zip(scorer.score(whole), scorer.score(requests), strict=True):
    np.testing.assert_allclose(probabilities(a), probabilities(b), atol=1e-6)


def test_batching_and_chunking_change_nothing(bundle, dataset, scorer, requests):
  requests[2]['candidates'] = []
  expected = list(scorer.score(requests))
  small = Scorer(load_bundle(bundle), Sizes(cache_users=3, max_users=2, max_rows=4))
  for a, b in zip(small.score(requests), expected, strict=True):
    assert [s['item_id'] for s in a['scores']] == [s['item_id'] for s in b['scores']]
    if a['scores']:
      np.testing.assert_allclose(probabilities(a), probabilities(b), atol=1e-5)
  assert expected[2] == {'request_id': 'r2', 'scores': []}


def test_nothing_to_score(scorer):
  assert list(scorer.score([])) == []
  empty = {'request_id': 1, 'history': [], 'candidates': []}
  assert list(scorer.score([empty, empty])) == [{'request_id': 1, 'scores': []}] * 2


def test_quantised_tables_change_little(toy, dataset, requests, tmp_path):
  scorer = Scorer.load(toy.export(tmp_path / 'int8', storage='int8'))
  for result, expected in zip(scorer.score(requests), dataset.expected(toy), strict=True):
    np.testing.assert_allclose(probabilities(result), expected, atol=0.02)


def test_a_ranker_without_pinfm(dataset, requests, tmp_path):
  toy = toy_bundle.make_toy('none')
  out = toy.export(tmp_path / 'none')
  assert sorted(p.name for p in out.rglob('*') if p.is_file()) == ['crossing.bin', 'manifest.json', 'parameters.npz']
  for result, expected in zip(Scorer.load(out).score(requests), dataset.expected(toy), strict=True):
    np.testing.assert_allclose(probabilities(result), expected, atol=1e-5)


def test_a_ranker_with_another_interaction_block(dataset, requests, tmp_path):
  block = InteractionConfig(concat=False, width=8, blocks=2, field_norm=True, most_field_width=6)
  toy = toy_bundle.make_toy('none', interaction='final', block=block)
  out = toy.export(tmp_path / 'final')
  assert load_bundle(out).manifest.ranking == toy.ranker
  for result, expected in zip(Scorer.load(out).score(requests), dataset.expected(toy), strict=True):
    np.testing.assert_allclose(probabilities(result), expected, atol=1e-5)
  assert 'parallel MaskNet with DCNv2 on top (2 blocks of width 8, 1 layers of DCNv2)' in inspect(out).text(out)


def test_missing_features_are_missing_values(scorer, requests):
  document = requests[3]
  bare = copy.deepcopy(document)
  for candidate in bare['candidates']:
    for name in ('price', 'rating', 'country', 'campaign', 'picture', 'content', 'surface', 'item_created_at'):
      candidate.pop(name, None)
  spelled = copy.deepcopy(bare)
  for candidate in spelled['candidates']:
    candidate |= {'price': None, 'rating': float('nan'), 'country': 'unknown', 'campaign': {'index': 0}}
    candidate |= {'picture': [0, 0, 0], 'content': None, 'surface': None, 'item_created_at': None}
  np.testing.assert_array_equal(scores_of(scorer, bare), scores_of(scorer, spelled))
  assert np.abs(scores_of(scorer, bare) - scores_of(scorer, document)).max() > 1e-3


def test_history_is_sorted_and_merged_as_in_preparation(scorer, requests):
  document = requests[2]
  expected = scores_of(scorer, document)
  del document['history_events']
  event = document['history'][3]
  event['actions'] = ['click', 'save']
  changed = scores_of(scorer, document)
  rows = [{**event, 'actions': [name]} for name in event['actions']]  # as raw log rows, one an action
  document['history'] = [*document['history'][4:], *document['history'][:3], *rows]
  np.testing.assert_allclose(scores_of(scorer, document), changed, atol=1e-6)
  assert not np.allclose(changed, expected, atol=1e-4)


def test_times_as_iso_and_the_requests_own_surface(scorer, requests):
  document = requests[1]
  for candidate in document['candidates']:
    candidate |= {'timestamp': 1_700_100_000_000, 'surface': 'search', 'item_created_at': 1_700_000_000_000}
  expected = scores_of(scorer, document)
  for candidate in document['candidates']:
    del candidate['timestamp'], candidate['surface']
    candidate['item_created_at'] = '2023-11-14T22:13:20'
  document |= {'timestamp': '2023-11-16T03:00:00+01:00', 'surface': 'search', 'user_id': 5}
  np.testing.assert_array_equal(scores_of(scorer, document), expected)


def test_a_history_without_times_keeps_its_order(scorer, requests):
  document = requests[2]
  expected = scores_of(scorer, document)
  for event in document['history']:
    del event['timestamp']
  np.testing.assert_array_equal(scores_of(scorer, document), expected)
  document['history'].reverse()
  assert not np.allclose(scores_of(scorer, document), expected, atol=1e-5)


BAD = [
  ({'request_id': None}, 'got request_id None, expected a string or an integer'),
  ({'histroy': []}, "field 'histroy', which a request does not have; the nearest is 'history'"),
  ({'history': None}, 'got history None, expected a list'),
  ({'history': [7]}, r'history event 0: got 7, expected an event \(a JSON object\)'),
  ({'history_events': 1}, 'got history_events 1, expected the number of all events'),
  ({'timestamp': -1}, 'got timestamp -1, expected milliseconds'),
  ({'timestamp': 'noon'}, "got timestamp 'noon', expected milliseconds since 1970 or an ISO time"),
  ({'surface': 'serach'}, "got the surface 'serach', expected one of feed, search"),
]
BAD_EVENT = [
  ({'actions': ['clik']}, "history event 1: got the action 'clik', expected one of click, save, hide"),
  ({'surface': None}, 'history event 1: got the surface None, expected one of feed, search'),
  ({'item_id': 3}, 'history event 1: got item_id 3, expected a string'),
  ({'timestamp': None}, 'history event 1 has no timestamp but others have'),
]
BAD_CANDIDATE = [
  ({'pirce': 1}, "candidate 1: got the field 'pirce', which a candidate does not have; the nearest is 'price'"),
  ({'price': 'dear'}, "candidate 1: got price 'dear', expected a finite number"),
  ({'price': 10**400}, 'candidate 1: got price 1000'),
  ({'country': ['de']}, r"candidate 1: got country \['de'\], expected a string"),
  ({'campaign': {'index': 17}}, 'candidate 1: got campaign index 17, expected an integer from 0 to 16'),
  ({'picture': [1, 2]}, r'candidate 1: got picture \[1, 2\], expected a list of 3 numbers'),
  ({'content': [1, float('inf')]}, 'candidate 1: got content with a value that is not finite'),
  ({'item_id': ''}, 'candidate 1: got an id of 0 bytes'),
  ({'item_id': '\ud800'}, 'candidate 1: got the id .*no valid Unicode'),
  ({'campaign': '\ud800'}, 'candidate 1: got campaign .*no valid Unicode'),
]


def test_integer_ids(scorer):
  manifest = dataclasses.replace(scorer.bundle.manifest, id_type=IdTypes('integer', 'integer'))
  parser = RequestParser(manifest)

  def parse(ids):
    return parser.parse({'request_id': 1, 'history': [], 'candidates': [{'item_id': i} for i in ids]})

  assert parse([5, '5', -1]).candidates.item.tolist() == [5, 5, 2**64 - 1]
  for bad in ('5.0', 5.0, True, None, ' 5', '٥'):
    with pytest.raises(UserError, match='candidate 0: got item_id .* expected an integer'):
      parse([bad])
  with pytest.raises(UserError, match='expected a 64-bit integer'):
    parse([2**63])


def one_line_error(scorer, document, message):
  with pytest.raises(UserError, match=message) as error:
    list(scorer.score([document]))
  assert str(error.value).startswith('request 1')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(('change', 'message'), BAD)
def test_bad_requests_are_refused(scorer, requests, change, message):
  one_line_error(scorer, requests[2] | change, message)


@pytest.mark.parametrize(('change', 'message'), BAD_EVENT)
def test_bad_events_are_refused(scorer, requests, change, message):
  requests[2]['history'][1] |= change
  one_line_error(scorer, requests[2], message)


@pytest.mark.parametrize(('change', 'message'), BAD_CANDIDATE)
def test_bad_candidates_are_refused(scorer, requests, change, message):
  requests[2]['candidates'][1] |= change
  one_line_error(scorer, requests[2], message)


def test_a_whole_number_as_a_float_is_the_same_category():
  numbers = SparseFeature('size', 'vocabulary', 4, ('4', '5', '4.5'))
  assert [read_sparse(numbers, value) for value in (4, 4.0, '4', 4.5, 5.0, 6.0)] == [1, 1, 1, 3, 2, 0]
  assert read_sparse(SparseFeature('size', 'vocabulary', 2, ('4.0',)), 4.0) == 1


def test_ages_need_a_time(scorer, requests):
  document = requests[2]
  del document['timestamp'], document['candidates'][1]['timestamp']
  one_line_error(scorer, document, 'candidate 1: got item_created_at, but the age needs the time of the request')


def test_score_file(bundle, scorer, requests, tmp_path, monkeypatch):
  monkeypatch.setattr(Scorer, 'load', lambda *_: scorer)  # what it compiled is used again
  source, out = tmp_path / 'requests.jsonl', tmp_path / 'scores.jsonl'
  lines = [json.dumps(request) for request in requests]
  source.write_text(lines[0] + '\n\n' + '\n'.join(lines[1:]))
  assert score_file(bundle, source, out) == len(requests)
  written = [json.loads(line) for line in out.read_text().splitlines()]
  for a, b in zip(written, scorer.score(requests), strict=True):
    assert a['request_id'] == b['request_id']
    np.testing.assert_allclose(probabilities(a), probabilities(b), atol=1e-6)
  source.write_text(json.dumps(requests, indent=1))  # as one list: the other commands on a bundle read it too
  assert score_file(bundle, source, out) == len(requests)
  assert [json.loads(line) for line in out.read_text().splitlines()] == written


def test_a_bad_line_stops_the_file_and_leaves_nothing(bundle, requests, tmp_path):
  source, out = tmp_path / 'requests.jsonl', tmp_path / 'scores.jsonl'
  source.write_text(json.dumps(requests[0]) + '\n\n{"request_id": "x"')
  with pytest.raises(UserError, match='requests.jsonl, line 3: not valid JSON'):
    score_file(bundle, source, out)
  source.write_text(json.dumps(requests[0]) + '\n' + json.dumps(requests[1] | {'history': 0}))
  with pytest.raises(UserError, match=r"requests.jsonl, line 2 \('r1'\): got history 0, expected a list"):
    score_file(bundle, source, out)
  assert list(tmp_path.iterdir()) == [source]
  with pytest.raises(UserError, match='no such file'):
    score_file(bundle, tmp_path / 'nothing.jsonl', out)
  with pytest.raises(UserError, match='holds the input'):
    score_file(bundle, source, source)


def test_nothing_compiles_after_the_warm_up(bundle, requests):
  scorer = Scorer(load_bundle(bundle), Sizes(cache_users=4, max_users=3, max_rows=16))
  assert scorer.warm_up() > 0
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, _, **__: compiled.append(name) if name.endswith('backend_compile_duration') else None
  )
  try:
    for some in (requests[:1], requests, requests[::-1], requests[2:4]):
      scorer.results([scorer.parse(document) for document in some])
      longer = [d | {'candidates': d['candidates'] * 9} for d in some]
      scorer.results([scorer.parse(document) for document in longer])
      scorer.users([scorer.parse(document) for document in some])
    shorter = copy.deepcopy(requests[2])
    for events in (2, 3, 6):
      shorter |= {'history': requests[2]['history'][:events], 'history_events': events}
      scorer.results([scorer.parse(shorter)])
    assert scorer.cache.extended == 2
    assert scorer.cache.evicted > 0
    assert compiled == []
    scorer.items(np.arange(3, dtype=np.uint64))  # the listener hears
    assert compiled
  finally:
    jax.monitoring.clear_event_listeners()


def test_ten_thousand_candidates(scorer, requests):
  document = requests[3]
  expected = scores_of(scorer, document)
  document['candidates'] = document['candidates'] * 2000
  found = scores_of(scorer, document).reshape(2000, *expected.shape)
  np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1e-6)
