"""A run's directory: claims name the setting that differs, files appear whole or not at all."""

import dataclasses
import json
import os

import pytest
import toy

from pinfm_jax import workdir
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.workdir import claim, is_done, read_results, write_json, write_text

SETTINGS = {'data': {'checksum': 'abc', 'simulator': {'users': 10}}, 'steps': 3, 'labels': ('a', 'b')}


def test_the_same_settings_may_claim_again(tmp_path):
  for _ in range(2):
    claim(tmp_path / 'a' / 'b', SETTINGS)
  assert json.loads((tmp_path / 'a' / 'b' / 'settings.json').read_text())['labels'] == ['a', 'b']
  settings = dataclasses.asdict(toy.EXPERIMENT)
  for _ in range(2):  # a whole experiment, with its tuples, survives the way through JSON
    claim(tmp_path / 'c', settings)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'steps': 4}, 'made with steps=3, now it is 4'),
    ({'data': {'checksum': 'abd', 'simulator': {'users': 10}}}, "data.checksum='abc', now it is 'abd'"),
    ({'data': {'checksum': 'abc', 'simulator': {'users': 11}}}, 'data.simulator.users=10, now it is 11'),
    ({'labels': ('b', 'a')}, r"labels=\['a', 'b'\], now it is \['b', 'a'\]"),
    ({'labels': ()}, r"labels=\['a', 'b'\], now it is \[\]"),
    ({'extra': 1}, 'extra=.*, now it is 1'),
    ({'data': {'checksum': 'abc', 'simulator': {'users': 10, 'items': 5}}}, 'data.simulator.items=.*, now it is 5'),
    ({'data': {'checksum': 'abc', 'simulator': {}}}, 'data.simulator'),
    ({'data': {'checksum': 'abc'}}, 'data.simulator.users=10'),
  ],
)
def test_other_settings_are_refused_and_the_difference_is_named(tmp_path, change, words):
  claim(tmp_path, SETTINGS)
  before = (tmp_path / 'settings.json').read_text()
  with pytest.raises(UserError, match=words):
    claim(tmp_path, {**SETTINGS, **change})
  assert (tmp_path / 'settings.json').read_text() == before


def test_an_option_that_is_newer_than_the_run_and_off_is_no_difference(tmp_path):
  claim(tmp_path, SETTINGS)
  claim(tmp_path, {**SETTINGS, 'start_from': '', 'data': {**SETTINGS['data'], 'flag': False, 'count': 0}})
  with pytest.raises(UserError, match="start_from='', now it is 'a'"):
    claim(tmp_path, {**SETTINGS, 'start_from': 'a', 'data': {**SETTINGS['data'], 'flag': False, 'count': 0}})
  with pytest.raises(UserError, match='data.count=0, now it is its default'):  # an option that was there is missing
    claim(tmp_path, {**SETTINGS, 'start_from': '', 'data': {**SETTINGS['data'], 'flag': False}})


def test_a_key_of_a_free_mapping_is_no_newer_option(tmp_path):
  """A label that is not named weighs 1, so 0 is another weight; a simulator's 0 is not its default either."""
  settings = {'finetune': {'label_weights': {'click': 2.0}}, 'data': {'simulator': {'users': 10}}}
  claim(tmp_path, settings)
  with pytest.raises(UserError, match='label_weights.hide=its default, now it is 0.0'):
    claim(tmp_path, {**settings, 'finetune': {'label_weights': {'click': 2.0, 'hide': 0.0}}})
  with pytest.raises(UserError, match='simulator.walk=its default, now it is 0.0'):
    claim(tmp_path, {**settings, 'data': {'simulator': {'users': 10, 'walk': 0.0}}})


def test_the_first_difference_is_the_one_that_is_named(tmp_path):
  claim(tmp_path, {'a': 1, 'b': 2, 'c': 3})
  with pytest.raises(UserError, match='b=2, now it is 5'):
    claim(tmp_path, {'a': 1, 'b': 5, 'c': 6})


def test_work_from_before_other_interaction_blocks_goes_on(tmp_path, toy_run):
  """The settings of the default block were not named then; another block is another run."""
  settings = toy_run.finetune_settings(0)
  assert 'block' not in settings['ranker']
  changed = dataclasses.replace(toy_run, experiment=apply_overrides(toy_run.experiment, {'ranker.block.concat': False}))
  claim(tmp_path, settings)
  claim(tmp_path, settings)
  with pytest.raises(UserError, match='ranker.block'):
    claim(tmp_path, changed.finetune_settings(0))
  claim(tmp_path / 'other', changed.finetune_settings(0))
  with pytest.raises(UserError, match='ranker.block'):
    claim(tmp_path / 'other', settings)


def test_damaged_settings_are_named(tmp_path):
  (tmp_path / 'settings.json').write_text('{"steps"')
  with pytest.raises(UserError, match=r'settings\.json is not valid JSON'):
    claim(tmp_path, SETTINGS)


def test_results_of_a_stage_that_has_not_finished(tmp_path):
  assert not is_done(tmp_path)
  with pytest.raises(UserError, match=r'has no results\.json'):
    read_results(tmp_path)
  write_json(tmp_path / 'results.json', {'auc': 0.5})
  assert is_done(tmp_path)
  assert read_results(tmp_path) == {'auc': 0.5}


def test_a_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'results.json'
  write_json(path, {'auc': 0.5})

  class _PulledPlugError(Exception):
    pass

  def pulled(*_):
    raise _PulledPlugError

  monkeypatch.setattr(workdir.os, 'replace', pulled)
  with pytest.raises(_PulledPlugError):
    write_json(path, {'auc': 0.9})
  assert json.loads(path.read_text()) == {'auc': 0.5}
  monkeypatch.undo()
  write_json(path, {'auc': 0.9})  # what the dead write left is in nobody's way
  assert json.loads(path.read_text()) == {'auc': 0.9}
  assert os.listdir(tmp_path) == ['results.json']


def test_a_value_that_is_no_json_writes_nothing(tmp_path):
  with pytest.raises(TypeError):
    write_json(tmp_path / 'results.json', {'auc': object()})
  assert not os.listdir(tmp_path)


def test_text_is_utf8(tmp_path):
  write_text(tmp_path / 'results.md', 'β ≤ 1\n')
  assert (tmp_path / 'results.md').read_bytes() == 'β ≤ 1\n'.encode()
