"""Dotted overrides and the JSON form of a configuration: every type, every depth, and what is refused."""

import dataclasses
import difflib
import json

import pytest
import toy

from pinfm_jax.config import Arm, Experiment, RankerConfig, TowerConfig
from pinfm_jax.data.simulator import SimulatorConfig
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import apply_overrides, from_dict, parse_assignments, to_dict

BASE = Experiment(name='base')


def _get(config, key):
  for name in key.split('.'):
    config = config[name] if isinstance(config, dict) else getattr(config, name)
  return config


def _groups(config, prefix=''):
  """Every group of settings: (its dotted prefix, its field names)."""
  yield prefix, [field.name for field in dataclasses.fields(config)]
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from _groups(value, f'{prefix}{field.name}.')


FIELDS = [(prefix, name) for prefix, names in _groups(BASE) for name in names]


@pytest.mark.parametrize(
  ('key', 'word', 'expected'),
  [
    ('name', 'other', 'other'),
    ('name', '7', '7'),
    ('pretrain.steps', '12', 12),
    ('model.tables.rows', '80_000_000', 80_000_000),
    ('model.tables.rows', 3.0, 3),
    ('pretrain.update.learning_rate', '1e-3', 1e-3),
    ('pretrain.update.learning_rate', '2', 2.0),
    ('data.pretrain_overlap', 'true', True),
    ('data.pretrain_overlap', 'No', False),
    ('data.pretrain_overlap', True, True),
    ('ranker.mlp', '64,32', (64, 32)),
    ('ranker.mlp', '(64, 32)', (64, 32)),
    ('ranker.mlp', '[64]', (64,)),
    ('ranker.mlp', '64', (64,)),
    ('ranker.mlp', '', ()),
    ('ranker.mlp', [64, 32], (64, 32)),
    ('seeds', '0,1,2', (0, 1, 2)),
    ('finetune.cold_start.age_dropout', '0.5,0', (0.5, 0.0)),
    ('evaluate.labels', 'click,save', ('click', 'save')),
    ('evaluate.labels', "['click']", ('click',)),
    ('evaluate.utility', "{'save': 1, 'hide': -2}", {'save': 1.0, 'hide': -2.0}),
    ('evaluate.utility.save', '0.5', {'save': 0.5}),
    ('data.simulator', "{'users': 10}", {'users': 10}),
    ('data.simulator.users', '10', {'users': 10}),
    ('data.simulator.note', 'plain words', {'note': 'plain words'}),
    ('ranker', "{'cross_layers': 1, 'mlp': [8]}", RankerConfig(cross_layers=1, mlp=(8,))),
    ('ranker', RankerConfig(cross_layers=2), RankerConfig(cross_layers=2)),
  ],
)
def test_a_value_becomes_the_fields_type(key, word, expected):
  changed = apply_overrides(BASE, {key: word})
  got = _get(changed, key.rpartition('.')[0] if key.count('.') > 1 and isinstance(expected, dict) else key)
  assert got == expected
  assert type(got) is type(expected)
  if isinstance(expected, tuple) and expected:
    assert {type(x) for x in got} == {type(x) for x in expected}


def test_only_the_named_setting_changes():
  changed = apply_overrides(BASE, {'model.tower.width': '64', 'pretrain.update.clip_norm': '0'})
  assert changed.model.tower == dataclasses.replace(BASE.model.tower, width=64)
  assert changed.pretrain.update == dataclasses.replace(BASE.pretrain.update, clip_norm=0.0)
  rest = ('name', 'data', 'ranker', 'finetune', 'evaluate', 'serve', 'mesh', 'arms', 'baseline', 'seeds')
  assert all(getattr(changed, name) == getattr(BASE, name) for name in rest)
  assert changed.model.tables == BASE.model.tables
  assert Experiment(name='base') == BASE  # never changed in place


def test_a_key_of_a_mapping_keeps_the_others():
  config = apply_overrides(BASE, {'evaluate.utility': {'save': 1, 'hide': -1}})
  config = apply_overrides(config, {'evaluate.utility.hide': '-3'})
  assert config.evaluate.utility == {'save': 1.0, 'hide': -3.0}


def test_later_overrides_win():
  assert apply_overrides(BASE, {'pretrain.steps': 1, 'pretrain': {'steps': 5}}).pretrain.steps == 5


@pytest.mark.parametrize(('prefix', 'name'), FIELDS, ids=[prefix + name for prefix, name in FIELDS])
def test_an_unknown_key_names_the_nearest_at_every_depth(prefix, name):
  with pytest.raises(UserError) as error:
    apply_overrides(BASE, {f'{prefix}{name}x': '1'})
  message = str(error.value)
  assert f"unknown setting '{prefix}{name}x'" in message
  assert f"nearest is '{name}'" in message


def test_a_typo_in_the_middle_names_the_group():
  with pytest.raises(UserError, match=r"'pretrain\.updat\.clip_norm': PretrainConfig has no 'updat'.*'update'"):
    apply_overrides(BASE, {'pretrain.updat.clip_norm': '1'})
  with pytest.raises(UserError, match="Experiment has no 'finetun'.*nearest is 'finetune'"):
    apply_overrides(BASE, {'finetun.epochs': '1'})


def test_a_name_like_none_still_gets_a_suggestion_and_all_names():
  with pytest.raises(UserError) as error:
    apply_overrides(BASE, {'serve.qqq': '1'})
  assert "nearest is 'storage'" in str(error.value)
  assert difflib.get_close_matches('qqq', ['storage']) == []  # so the default cutoff would have said nothing


@pytest.mark.parametrize(
  ('key', 'word'),
  [
    ('pretrain.steps', 'many'),
    ('pretrain.steps', '1.5'),
    ('pretrain.steps', 1.5),
    ('pretrain.steps', True),
    ('pretrain.steps', float('inf')),
    ('pretrain.steps', None),
    ('pretrain.update.learning_rate', 'fast'),
    ('pretrain.update.learning_rate', False),
    ('data.pretrain_overlap', 'perhaps'),
    ('data.pretrain_overlap', '2'),
    ('name', 3),
    ('ranker.mlp', '64,wide'),
    ('ranker.mlp', '(64,'),
    ('ranker.mlp', 64),
    ('seeds', '0;1'),
    ('evaluate.utility', 'save'),
    ('evaluate.utility', '5'),
    ('evaluate.utility', {'save': 'high'}),
    ('evaluate.utility.save', 'high'),
    ('pretrain', '5'),
    ('pretrain', 'words'),
    ('ranker', {'cross_layers': 'x'}),
    ('arms', "[{'overrides': {}}]"),
  ],
)
def test_a_value_of_the_wrong_type_is_refused_and_named(key, word):
  with pytest.raises(UserError) as error:
    apply_overrides(BASE, {key: word})
  assert key.rpartition('.')[2].removesuffix('s') in str(error.value).lower()
  assert '\n' not in str(error.value)


def test_the_element_of_a_mapping_is_named():
  with pytest.raises(UserError, match=r"'evaluate\.utility\.save' got 'high'; expected a value of type float"):
    apply_overrides(BASE, {'evaluate.utility': {'save': 'high'}})


def test_a_path_below_a_value_is_refused():
  with pytest.raises(UserError, match=r'pretrain\.steps\.more'):
    apply_overrides(BASE, {'pretrain.steps.more': '1'})


def test_the_round_trip_keeps_arms_and_mappings():
  experiment = dataclasses.replace(
    toy.EXPERIMENT,
    arms=(
      Arm('plain', {'ranker.sequence': 'none', 'ranker.mlp': (4, 2)}),
      Arm('full'),
      Arm('half, in a', {'name': 'x'}),
    ),
    seeds=(3, 1),
  )
  values = json.loads(json.dumps(to_dict(experiment)))
  again = from_dict(Experiment, values)
  assert to_dict(again) == to_dict(experiment)
  assert dataclasses.replace(again, arms=()) == dataclasses.replace(experiment, arms=())
  for a, b in zip(again.arms, experiment.arms, strict=True):
    assert (a.name, a.directory) == (b.name, b.directory)
    assert apply_overrides(again, {**a.overrides, 'arms': ()}) == apply_overrides(
      experiment, {**b.overrides, 'arms': ()}
    )


def test_to_dict_copies():
  values = to_dict(toy.EXPERIMENT)
  values['data']['simulator']['users'] = 1
  assert toy.EXPERIMENT.data.simulator == toy.SIMULATOR


def test_from_dict_fills_defaults_and_refuses_the_rest():
  assert from_dict(TowerConfig, {'layers': 2}) == TowerConfig(layers=2)
  with pytest.raises(UserError, match="SimulatorConfig has no 'user'; nearest is 'users'"):
    from_dict(SimulatorConfig, {'user': 3})
  with pytest.raises(UserError, match=r"'pretrain.update.warmup': UpdateConfig has no 'warmup'|'warmup_steps'"):
    from_dict(Experiment, {'name': 'x', 'pretrain': {'update': {'warmup': 3}}})
  with pytest.raises(UserError, match='name'):
    from_dict(Experiment, {})
  with pytest.raises(UserError, match='Experiment'):
    from_dict(Experiment, [])


def test_words_of_the_command_line():
  assert parse_assignments(['a.b=c', 'd = e=f ', 'g=']) == {'a.b': 'c', 'd': 'e=f', 'g': ''}
  for word in ('a.b', '=c', ''):
    with pytest.raises(UserError, match=rf"--set got '{word}'; expected KEY=VALUE"):
      parse_assignments([word])
  with pytest.raises(UserError, match='--option got'):
    parse_assignments(['x'], '--option')
