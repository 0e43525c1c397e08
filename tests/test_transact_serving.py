"""Bundles of rankers with TransAct: their scores equal the training path, whatever the pool holds of a user."""

from dataclasses import replace

import numpy as np
import pytest
import toy_bundle
from test_portable import Onnx
from test_portable import scores as portable_scores

from pinfm_jax.config import TransActConfig
from pinfm_jax.errors import UserError
from pinfm_jax.serve.batches import Sizes
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.serve.convert import refresh_bundle
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.portable.export import export_portable
from pinfm_jax.serve.scorer import Scorer

LENGTHS = [0, 1, 7, 20, 33, 60]
LENGTH = 25  # more than the window of 20 events that PinFM reads
TRANSACT = TransActConfig(length=LENGTH, width=4, heads=3, feedforward=6, outputs=3, item_buckets=50)
CONTENT = replace(toy_bundle.MODEL, content=True, content_width=2)
KINDS = {'pinfm': ('pinfm', toy_bundle.MODEL), 'content': ('pinfm', CONTENT), 'none': ('none', toy_bundle.MODEL)}


@pytest.fixture(scope='module')
def dataset():
  return toy_bundle.ToyDataset(LENGTHS)


@pytest.fixture(scope='module', params=KINDS)
def served(request, dataset, tmp_path_factory):
  """A ranker's name, the scores of its training path, and its bundle's scorer."""
  sequence, model = KINDS[request.param]
  toy = toy_bundle.make_toy(sequence, model, transact=TRANSACT)
  path = toy.export(tmp_path_factory.mktemp('bundles') / 'bundle', storage='float32')
  return (
    toy,
    dataset.expected(toy),
    Scorer(load_bundle(path), Sizes(max_users=8, max_rows=16)),
  )  # few programs to compile


def _documents(dataset, events=LENGTH):
  return list(dataset_requests(dataset, range(len(LENGTHS)), events))


def _probabilities(results):
  return np.array([[[score[name] for name in ('click', 'hide')] for score in result['scores']] for result in results])


def test_json_scores_equal_the_training_path(served, dataset):
  toy, expected, scorer = served
  assert np.ptp(expected, axis=(0, 1)).min() > 0.1  # the comparison can fail
  np.testing.assert_allclose(_probabilities(scorer.score(_documents(dataset))), expected, atol=1e-5)
  whole = _documents(dataset, 10_000)
  np.testing.assert_allclose(_probabilities(scorer.score(whole)), expected, atol=1e-5)
  # One request after another, in other tiles: nothing is read of another user.
  alone = np.concatenate([_probabilities(scorer.score([document])) for document in reversed(whole)])
  np.testing.assert_allclose(alone[::-1], expected, atol=1e-5)
  assert toy.schema == scorer.bundle.manifest.schema


def test_the_module_reaches_the_scores(served, dataset):
  """An event that only TransAct reads, since it is older than PinFM's window, changes the scores."""
  _, expected, scorer = served
  document = _documents(dataset)[-1]
  document['history'][0]['item_id'] = 'item/0' if document['history'][0]['item_id'] != 'item/0' else 'item/1'
  found = _probabilities(scorer.score([document]))[0]
  assert np.abs(found - expected[-1]).max() > 1e-5
  assert np.abs(found - expected[-1]).max() < 0.5


def test_appended_events_are_exact(served, dataset):
  """A user whose keys and values are extended gets the scores of one that is computed whole."""
  _, _, scorer = served
  document = _documents(dataset)[3]
  history = document['history']
  scorer.forget()
  earlier = [dict(document, history=history[:k], history_events=k) for k in (10, 12, 17)]
  found = _probabilities([next(scorer.score([each])) for each in (*earlier, document)])
  extended = scorer.cache.extended
  scorer.forget()
  whole = _probabilities(scorer.score([*earlier, document]))
  np.testing.assert_allclose(found, whole, atol=1e-5)
  if scorer.bundle.manifest.tables:
    assert extended >= 3


def test_a_client_must_send_what_the_module_reads(served, dataset):
  _, _, scorer = served
  document = dict(_documents(dataset, 24)[-1])
  with pytest.raises(UserError, match=r'got 24 events in history, of 60 .*reads the newest 25, .* best the newest 25'):
    next(scorer.score([document]))


def test_onnx_scores_equal_the_training_path(served, dataset, tmp_path):
  pytest.importorskip('onnx')
  toy, expected, _ = served
  path = export_portable(tmp_path / 'onnx', toy.trained(), 'onnx', storage='float32')
  client, documents = Onnx(path), _documents(dataset)
  np.testing.assert_allclose(portable_scores(client, path, documents), expected, atol=1e-5)
  inputs = client.portable.programs['crossing']['inputs']
  assert inputs['recent_events'] == {'type': 'int32', 'shape': ['U', LENGTH]}
  assert not any(name.startswith('recent') for name in client.portable.programs.get('pairs', {'inputs': ()})['inputs'])


def test_a_bundle_is_lowered_again_from_its_configuration(dataset, tmp_path):
  toy = toy_bundle.make_toy('none', transact=TRANSACT)
  path = refresh_bundle(toy.export(tmp_path / 'bundle'), tmp_path / 'again')
  found = Scorer(load_bundle(path), Sizes(max_users=8, max_rows=16)).score(_documents(dataset))
  np.testing.assert_allclose(_probabilities(found), dataset.expected(toy), atol=1e-5)


@pytest.mark.slow
def test_warming_up_compiles_what_scoring_calls(served, dataset):
  _, expected, scorer = served
  scorer.forget()
  assert scorer.warm_up() > 0
  np.testing.assert_allclose(_probabilities(scorer.score(_documents(dataset))), expected, atol=1e-5)


def test_a_ranker_without_pinfm_cannot_be_exported_with_content(tmp_path):
  toy = toy_bundle.make_toy('none', CONTENT, transact=TRANSACT)
  with pytest.raises(UserError, match='train it with model.content=false'):
    toy.export(tmp_path / 'bundle')


def test_an_older_schema_has_no_such_module(tmp_path):
  path = toy_bundle.make_toy('none').export(tmp_path / 'bundle')
  schema = load_bundle(path).manifest.schema
  assert (schema.recent_length, schema.recent_buckets, schema.most_events) == (0, 0, schema.history_length)
