"""The bundle of a tower alone: it recommends and embeds as the ranker's bundle does, and scores no candidates."""

import json
from dataclasses import replace

import numpy as np
import pytest
import toy_bundle

from pinfm_jax.cli import main
from pinfm_jax.config import RankerConfig
from pinfm_jax.data.featurize import FeatureSchema
from pinfm_jax.data.info import Features
from pinfm_jax.errors import UserError
from pinfm_jax.pretrained import load_pretrained
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.serve.convert import refresh_bundle
from pinfm_jax.serve.delta import apply_delta, export_delta
from pinfm_jax.serve.from_dataset import dataset_requests, dataset_users
from pinfm_jax.serve.inspect import inspect
from pinfm_jax.serve.scorer import Scorer
from pinfm_jax.serve.server import ServerSettings, open_scorer
from pinfm_jax.train.finetune import feature_spec

LENGTHS = [0, 1, 7, 20, 33]


@pytest.fixture(scope='module')
def toy():
  return toy_bundle.make_toy()


@pytest.fixture(scope='module')
def tower(toy):
  """What the toy's tower is exported from."""
  schema = FeatureSchema(Features(), 0, 2, item_buckets=0, history_length=toy_bundle.LENGTH, labels=())
  parts = {'schema': schema, 'spec': feature_spec(schema), 'ranker_config': RankerConfig(), 'stats': None}
  items = toy_bundle.ToyDataset(LENGTHS).items
  return toy.trained(**parts, params={'pinfm': toy.params['pinfm']}, utility={}, catalogue=items)


@pytest.fixture(scope='module')
def bundle(tower, tmp_path_factory):
  from pinfm_jax.serve.bundle import export_bundle

  return export_bundle(tmp_path_factory.mktemp('bundles') / 'tower', tower)


@pytest.fixture
def users():
  """Users of every length, as a file has them."""
  return list(dataset_users(toy_bundle.ToyDataset(LENGTHS), range(5), LENGTHS))


def test_its_vectors_are_those_of_the_ranker_it_is_in(bundle, toy, users, tmp_path):
  towers, ranker = Scorer.load(bundle), Scorer.load(toy.export(tmp_path / 'ranker'))
  vectors, expected = (scorer.users([scorer.parse(user) for user in users]) for scorer in (towers, ranker))
  np.testing.assert_array_equal(vectors[0], 0)
  assert np.linalg.norm(vectors[1:], axis=1) == pytest.approx(1.0, rel=1e-5)
  np.testing.assert_allclose(vectors, expected, atol=1e-6)
  keys = toy_bundle.ToyDataset(LENGTHS).items['item_key'].to_numpy()
  for name, found in towers.items(keys).items():
    np.testing.assert_allclose(found, ranker.items(keys)[name], atol=1e-6)
  longer = {**users[2], 'history': [*users[2]['history'], users[2]['history'][0] | {'timestamp': 1_800_000_000_000}]}
  before = towers.cache.extended
  appended = towers.users([towers.parse(longer)])
  assert towers.cache.extended == before + 1  # just the new event was computed
  towers.forget()
  np.testing.assert_allclose(appended, towers.users([towers.parse(longer)]), atol=1e-5)


def test_it_recommends_and_says_what_it_is(bundle, users, tmp_path, capsys):
  file = tmp_path / 'users.jsonl'
  file.write_text('\n'.join(map(json.dumps, users)))
  assert main(['recommend', str(bundle), '--history', str(file), '--top', '3']) == 0
  found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [len(user['items']) for user in found] == [0, 3, 3, 3, 3]
  facts = inspect(bundle)
  assert facts.facts['ranker'] is None
  assert facts.facts['parameters'].keys() == {'pinfm', 'tables'}
  assert set(load_bundle(bundle).programs) == {'context', 'extend', 'items'}
  titles = dict(facts.lines)
  assert 'without a ranker' in titles['model']
  assert 'ranker' not in titles['parameters']
  assert 'labels' not in titles
  pretrained = load_pretrained(bundle)
  assert pretrained.params.keys() == load_bundle(bundle).params['pinfm'].keys()


def test_whole_requests_are_users_too_and_kinds_do_not_mix(bundle, tower, toy, tmp_path, capsys):
  requests = list(dataset_requests(toy_bundle.ToyDataset(LENGTHS), range(5), toy_bundle.LENGTH))
  (tmp_path / 'requests.jsonl').write_text('\n'.join(map(json.dumps, requests)))
  arguments = [str(bundle), '--out', str(tmp_path / 'out.parquet')]
  assert main(['embed', *arguments, '--users', str(tmp_path / 'requests.jsonl')]) == 0
  assert main(['embed', *arguments, '--pairs', str(tmp_path / 'requests.jsonl')]) == 2
  assert 'tower without a ranker' in capsys.readouterr().err
  ranker = toy.export(tmp_path / 'ranker')
  with pytest.raises(UserError, match='is a ranker, and this is a tower without one'):
    export_delta(tmp_path / 'delta', ranker, tower, 'int4')
  with pytest.raises(UserError, match='is a tower without a ranker, and this is a ranker'):
    export_delta(tmp_path / 'delta', bundle, toy.trained(), 'int4')


def test_candidates_are_refused(bundle, users, tmp_path, capsys):
  scorer = Scorer.load(bundle)
  requests = [scorer.parse({**users[2], 'candidates': [{'item_id': 'item/1'}]})]
  for call in (scorer.results, scorer.pairs, scorer.probabilities):
    with pytest.raises(UserError, match='tower without a ranker'):
      call(requests)
  with pytest.raises(UserError, match='tower without a ranker'):
    open_scorer(bundle, ServerSettings())
  assert main(['export', str(bundle), '--format', 'onnx', '--out', str(tmp_path / 'onnx')]) == 2
  assert 'export it as a bundle' in capsys.readouterr().err
  assert main(['export', str(bundle), '--tower', '--storage', 'int8', '--out', str(tmp_path / 'int8')]) == 2
  assert '--tower belongs to a run' in capsys.readouterr().err


def test_every_program_is_compiled_before_the_first_user(bundle, users):
  scorer = Scorer.load(bundle)
  assert scorer.warm_up() > 0
  sizes = {name: program._cache_size() for name, program in scorer._programs.items()}
  scorer.users([scorer.parse(user) for user in users])
  assert {name: program._cache_size() for name, program in scorer._programs.items()} == sizes


def test_it_is_lowered_again_and_updated(bundle, tower, users, tmp_path):
  expected = _users(bundle, users)
  np.testing.assert_array_equal(_users(refresh_bundle(bundle, tmp_path / 'again'), users), expected)
  rows_GE = tower.rows_GE.copy()
  rows_GE[:50] += 1
  delta = export_delta(tmp_path / 'delta', bundle, replace(tower, rows_GE=rows_GE), 'int4')
  assert 0 < delta.rows <= 50
  apply_delta(bundle, tmp_path / 'delta', tmp_path / 'new')
  assert np.abs(_users(tmp_path / 'new', users) - expected).max() > 1e-3


def _users(bundle, users):
  scorer = Scorer.load(bundle)
  return scorer.users([scorer.parse(user) for user in users])
