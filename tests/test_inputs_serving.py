"""Bundles of models with time gaps, content and hidden ids: scores equal the training path; what is refused."""

import copy
import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import toy_bundle
from test_bundle import change_manifest

from pinfm_jax.data.tokens import ItemContent, TokenInputs
from pinfm_jax.errors import UserError
from pinfm_jax.serve import items as items_module
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.items import map_items, write_items
from pinfm_jax.serve.manifest import MANIFEST
from pinfm_jax.serve.scorer import Scorer

LENGTHS = [0, 1, 7, 20, 21, 33]
PLAIN = toy_bundle.MODEL
MODEL = replace(PLAIN, tower=replace(PLAIN.tower, time_gap_buckets=12), content=True, content_width=2, id_mask=0.3)
ITEM_FILES = ['items/checksums.bin', 'items/content.bin', 'items/keys.bin', 'items/known.bin']


@pytest.fixture(scope='module')
def toy():
  return toy_bundle.make_toy(model=MODEL)


@pytest.fixture(scope='module')
def dataset():
  return toy_bundle.ToyDataset(LENGTHS)


@pytest.fixture(scope='module')
def bundle(toy, tmp_path_factory):
  return toy.export(tmp_path_factory.mktemp('bundles') / 'bundle', storage='float32')


@pytest.fixture(scope='module')
def scorer(bundle):
  return Scorer.load(bundle)


@pytest.fixture
def requests(dataset):
  return list(dataset_requests(dataset, range(len(LENGTHS)), toy_bundle.LENGTH))


def probabilities(result):
  return np.array([[score[name] for name in ('click', 'hide')] for score in result['scores']])


def scores_of(scorer, document):
  return probabilities(next(iter(scorer.score([document]))))


def test_json_scores_equal_the_training_path(scorer, toy, dataset, requests):
  expected = dataset.expected(toy)
  assert np.ptp(expected, axis=(0, 1)).min() > 0.1  # the comparison can fail
  for result, scores in zip(scorer.score(requests), expected, strict=True):
    np.testing.assert_allclose(probabilities(result), scores, atol=1e-5)


def test_every_option_reaches_the_scores(toy, dataset):
  """Other gaps, other content, or all items known: the training path gives other scores."""
  expected, items = dataset.expected(toy), toy.tokens.items
  run, pairs = jax.jit(toy.module.apply), [(dataset.history(i), dataset.request(i)) for i in range(len(LENGTHS))]
  examples = [(history, request, toy_bundle.content_of(request.item)) for history, request in pairs]
  no_content = replace(items, vectors_VW=np.zeros_like(items.vectors_VW))
  all_known = replace(items, known_V=np.ones_like(items.known_V))
  for tokens in (TokenInputs(3, items), TokenInputs(12, no_content), TokenInputs(12, all_known)):
    batch = toy_bundle.ranking_batch(examples, tokens)
    output = run({'params': toy.params}, *toy_bundle.vectors(toy.rows_GE, batch), batch, toy.stats)
    assert np.abs(np.asarray(jax.nn.sigmoid(output.logits_UCT)) - expected).max() > 1e-3


def test_whole_histories_score_as_their_newest_events(scorer, dataset, requests):
  """The gap before the window's first event is not read: it does not matter whether a client sends what was before."""
  whole = list(dataset_requests(dataset, range(len(LENGTHS)), history_length=10_000))
  for a, b in zip(scorer.score(whole), scorer.score(requests), strict=True):
    np.testing.assert_allclose(probabilities(a), probabilities(b), atol=1e-6)


def test_the_files_and_the_configuration(bundle, toy):
  names = sorted(str(p.relative_to(bundle)) for p in (bundle / 'items').iterdir())
  assert names == ITEM_FILES
  opened = load_bundle(bundle, whole_below=0)  # tables and content are sampled
  assert opened.manifest.pinfm == MODEL
  items = toy.tokens.items
  for found, expected in zip(
    (opened.items.keys_V, opened.items.vectors_VW, opened.items.known_V),
    (items.keys_V, items.vectors_VW, items.known_V),
    strict=True,
  ):
    np.testing.assert_array_equal(found, expected)
    assert isinstance(found.base, np.memmap)


@pytest.mark.parametrize('whole_below', [0, 1 << 30])
@pytest.mark.parametrize('name', ['items/content.bin', 'items/keys.bin', 'items/checksums.bin'])
def test_damaged_content_is_refused(bundle, tmp_path, name, whole_below):
  broken = shutil.copytree(bundle, tmp_path / 'copy')
  octets = bytearray((broken / name).read_bytes())
  octets[len(octets) // 2] ^= 1
  (broken / name).write_bytes(octets)
  with pytest.raises(UserError, match='damaged'):
    load_bundle(broken, whole_below)


def test_an_older_bundle_lacks_the_new_fields(tmp_path):
  """A manifest from before these options reads as a model without them."""
  path = toy_bundle.make_toy().export(tmp_path / 'old', storage='int8')
  document = json.loads((path / MANIFEST).read_text())
  for name in ('content', 'content_width', 'id_mask'):
    del document['model'][name]
  del document['model']['tower']['time_gap_buckets']
  change_manifest(path, model=document['model'])
  opened = load_bundle(path)
  assert opened.items is None
  assert (opened.manifest.pinfm.content, opened.manifest.pinfm.tower.time_gap_buckets) == (False, 0)
  assert list(Scorer(opened).score([])) == []


def test_the_requests_own_content_wins(scorer, requests):
  document = requests[2]
  expected = scores_of(scorer, document)
  same = copy.deepcopy(document)
  keys = [toy_bundle.id_key(event['item_id'], 'string') for event in same['history']]
  for event, content in zip(same['history'], toy_bundle.content_of(np.array(keys, np.uint64)).tolist(), strict=True):
    event['content'] = content
  np.testing.assert_array_equal(scores_of(scorer, same), expected)
  same['history'][1]['content'] = [-1.0, 2.0]
  assert np.abs(scores_of(scorer, same) - expected).max() > 1e-4
  del same['history'][1]['content']  # just one event lacks it: it is looked up
  np.testing.assert_array_equal(scores_of(scorer, same), expected)


def test_a_candidate_without_content_has_what_the_bundle_knows(scorer, requests):
  document = requests[3]
  expected = scores_of(scorer, document)
  for candidate in document['candidates']:
    del candidate['content']
  np.testing.assert_allclose(scores_of(scorer, document), expected, atol=1e-3)  # float16 in the ranker's own feature
  document['candidates'][0]['content'] = [-1.0, 2.0]
  changed = scores_of(scorer, document)
  assert np.abs(changed[0] - expected[0]).max() > 1e-3
  np.testing.assert_allclose(changed[1:], expected[1:], atol=1e-3)


def test_new_items_are_read_by_their_content_alone(scorer, requests):
  """Two ids that training never saw score alike but for the ranker's own id feature; so put them into the history."""
  document = requests[2]
  event = document['history'][3] | {'content': [1.0, 0.5]}
  scores = []
  for name in ('never seen', 'nor this'):
    document['history'][3] = event | {'item_id': name}
    scores.append(scores_of(scorer, document))
  np.testing.assert_array_equal(*scores)
  document['history'][3] |= {'content': [-1.0, 0.5]}
  assert np.abs(scores_of(scorer, document) - scores[0]).max() > 1e-4


def test_the_time_since_the_last_event_changes_scores(scorer, requests):
  document = requests[2]
  for candidate in document['candidates']:
    del candidate['timestamp']
    candidate.pop('item_created_at', None)
  last = document['history'][-1]['timestamp']
  at = lambda seconds: scores_of(scorer, document | {'timestamp': last + 1000 * seconds})
  np.testing.assert_array_equal(at(40), at(50))  # one bucket
  assert np.abs(at(40) - at(400)).max() > 1e-4


def test_requests_without_times_are_refused(scorer, requests):
  document = copy.deepcopy(requests[2])
  for event in document['history']:
    del event['timestamp']
  with pytest.raises(UserError, match='request 1 .* history has no timestamps, but the model of this bundle reads'):
    scores_of(scorer, document)
  document = copy.deepcopy(requests[2])
  del document['timestamp']
  for candidate in document['candidates']:
    del candidate['timestamp']
    candidate.pop('item_created_at', None)
  with pytest.raises(UserError, match='request 1 .*candidate 0: the request has no timestamp, but the model'):
    scores_of(scorer, document)
  del requests[2]['history'][0]['timestamp']
  with pytest.raises(UserError, match='history event 0 has no timestamp but others have'):
    scores_of(scorer, requests[2])


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ([1, 2, 3], r'history event 1: got content \[1, 2, 3\], expected a list of 2 numbers'),
    ([1, float('nan')], 'history event 1: got content with a value that is not finite'),
    ('x', "history event 1: got content 'x', expected a list of 2 numbers"),
  ],
)
def test_bad_content_of_an_event_is_refused(scorer, requests, content, message):
  requests[2]['history'][1]['content'] = content
  with pytest.raises(UserError, match=message):
    scores_of(scorer, requests[2])


def test_items_that_do_not_fit_are_refused(tmp_path):
  items = toy_bundle.catalogue(MODEL)
  for wrong in (None, replace(items, known_V=None), replace(items, vectors_VW=items.vectors_VW[:, :1])):
    with pytest.raises(ValueError, match='needs the content of its items and which of them training saw'):
      write_items(tmp_path, wrong, MODEL)
  write_items(tmp_path, items, MODEL)
  with pytest.raises(UserError, match='content.bin does not hold 40 items: export the bundle again'):
    map_items(tmp_path, replace(MODEL, content_width=3))


def test_an_empty_catalogue(tmp_path):
  items = toy_bundle.catalogue(MODEL)
  empty = ItemContent(items.keys_V[:0], items.vectors_VW[:0], items.known_V[:0])
  assert write_items(tmp_path, empty, MODEL) == [items_module.KEYS, items_module.CONTENT, items_module.KNOWN]
  assert map_items(tmp_path, MODEL).inputs(items.keys_V)['new'].all()
