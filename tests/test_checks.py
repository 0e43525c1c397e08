"""A setting that cannot work is refused before anything runs, by name and with what is expected."""

import pytest
import toy

from pinfm_jax.checks import check_experiment, check_labels
from pinfm_jax.errors import UserError
from pinfm_jax.model.interaction.settings import INTERACTIONS
from pinfm_jax.overrides import apply_overrides


def test_the_toy_experiment_passes():
  check_experiment(toy.EXPERIMENT)
  check_labels(toy.EXPERIMENT, ('click', 'save', 'hide'))


@pytest.mark.parametrize(
  'setting',
  [
    'evaluate.ks=',
    'baseline=nobody', 'seeds=1,1', 'seeds=-1', 'evaluate.ks=0,5', 'ranker.mlp=0', 'model.tower.dropout=1.5',
    'ranker.dropout=1', 'data.simulator.seed=-1', 'data.test_days=0', 'data.test_days=-1', 'evaluate.split=tst',
    'data.finetune_days=0.0', 'evaluate.resample=rows', 'challenger=nobody',
    'finetune.init=foo',
    'ranker.sequence=foo', 'model.tower.width=15', 'model.tower.max_positions=3', 'model.tower.dtype=float7',
    'model.tables.rows=0', 'model.tables.rows=2000000000', 'model.tables.width=7', 'pretrain.batch_segments=0',
    'pretrain.log_every=0', 'pretrain.checkpoint_every=0', 'pretrain.steps=0', 'pretrain.window=0',
    'pretrain.temperature=0', 'pretrain.downstream_length=16', 'finetune.history_block=9', 'finetune.epochs=nan',
    'finetune.update.learning_rate=inf', 'finetune.update.beta2=1', 'serve.storage=int3', 'data.simulator.user=3',
    'finetune.epochs=0', 'evaluate.utility.save=nan', 'finetune.history_block=12',
    'finetune.cold_start.age_dropout=1,0',
    'finetune.cold_start.randomise=1.5', 'pretrain.log_q=count', 'pretrain.uniform_negatives=12',
    'pretrain.impression_negatives=5', 'pretrain.sketch_decay=0', 'pretrain.sketch_decay=1.1',
    'pretrain.sketch_width=0', 'pretrain.sketch_width=600000000', 'ranker.transact.length=5', 'ranker.transact.width=3',
    'finetune.ntl_columns=0',
  ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_named(setting):
  key, value = setting.split('=')
  with pytest.raises(UserError) as caught:
    check_experiment(apply_overrides(toy.EXPERIMENT, {key: value}))
  message = str(caught.value)
  assert key.split('.')[-1] in message
  assert '\n' not in message


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'interaction': 'dcnv3'}, 'expected one of: dcnv2, dcnv2_low_rank'),
    ({'block.activation': 'gelu'}, 'expected one of: none, tanh, relu'),
    ({'block.expert_gate': 'top1'}, 'expected one of: softmax, sigmoid'),
    ({'block.rank': 0}, 'ranker.block.rank is 0; expected at least 1'),
    ({'block.ratio': 0.0}, 'ranker.block.ratio is 0.0; expected a positive number'),
    ({'block.deep': (8, 0)}, r'ranker.block.deep is \(8, 0\); expected numbers of at least 1'),
    ({'block.most_field_width': -1}, 'most_field_width is -1'),
    ({'interaction': 'cin', 'cross_layers': 0}, "ranker.cross_layers is 0; ranker.interaction 'cin' needs at least 1"),
    ({'interaction': 'autoint', 'block.heads': 5}, 'token_width 32 is not a multiple of ranker.block.heads 5'),
    ({'interaction': 'finalmlp', 'block.heads': 3}, 'ranker.block.width 512 is not a multiple of ranker.block.heads 3'),
    ({'interaction': 'none', 'block.deep': (8,)}, 'ranker.interaction=mlp'),
    ({'interaction': 'dhen', 'block.ensemble': ()}, 'ranker.block.ensemble is empty; expected some of: dcnv2'),
    ({'interaction': 'dhen', 'block.ensemble': ('dhen',)}, "ranker.block.ensemble names 'dhen'; expected some of"),
    ({'interaction': 'dhen', 'block.ensemble': ('fm', 'fm')}, 'expected each block once'),
    (
      {'interaction': 'dhen', 'block.ensemble': ('autoint',), 'block.heads': 5},
      'ranker.block.token_width 32 is not a multiple of ranker.block.heads 5',
    ),
    (
      {'interaction': 'dhen', 'cross_layers': 2, 'block.ensemble': ('fm',), 'block.token_width': 30},
      'ranker.block.width 512 is not a multiple of ranker.block.token_width 30',
    ),
    (
      {'interaction': 'dhen', 'cross_layers': 2, 'block.ensemble': ('finalmlp',), 'block.first_gate': ('dense_0',)},
      'leave them empty, or set ranker.cross_layers=1',
    ),
  ],
)  # fmt: skip
def test_an_interaction_block_that_cannot_work_is_refused(changes, words):
  experiment = apply_overrides(toy.EXPERIMENT, {f'ranker.{key}': value for key, value in changes.items()})
  with pytest.raises(UserError, match=words) as caught:
    check_experiment(experiment)
  assert '\n' not in str(caught.value)


def test_every_interaction_block_passes_with_the_default_settings():
  for name in INTERACTIONS:
    check_experiment(apply_overrides(toy.EXPERIMENT, {'ranker.interaction': name}))


@pytest.mark.parametrize('key', ['mesh.fsdp', 'serve.storage', 'data.min_candidates', 'evaluate.split'])
def test_an_arm_may_not_change_what_arms_share(key):
  arms = (*toy.EXPERIMENT.arms, toy.Arm('other', {key: 3}))
  with pytest.raises(UserError, match=f"arm 'other' changes {key}"):
    check_experiment(toy.replace(toy.EXPERIMENT, arms=arms))


def test_an_arm_is_checked_like_the_experiment():
  arms = (*toy.EXPERIMENT.arms, toy.Arm('wide', {'ranker.sequence': 'lstm'}))
  with pytest.raises(UserError, match='lstm'):
    check_experiment(toy.replace(toy.EXPERIMENT, arms=arms))


@pytest.mark.parametrize('key', ['main_label', 'utility.sav', 'labels'])
def test_labels_are_those_of_the_data(key):
  value = {'main_label': 'sav', 'utility.sav': '1', 'labels': 'sav'}[key]
  experiment = apply_overrides(toy.EXPERIMENT, {f'evaluate.{key}': value})
  with pytest.raises(UserError, match="'sav'; the data set's labels are: click, save"):
    check_labels(experiment, ('click', 'save', 'hide'))


@pytest.mark.parametrize('other', ['pretrain.positive_actions=', 'pretrain.ntl_weight=0'])
def test_impression_negatives_need_a_positive_set_and_the_next_token_loss(other):
  key, value = other.split('=')
  with pytest.raises(UserError, match=key.split('.')[-1]):
    check_experiment(apply_overrides(toy.EXPERIMENT, {'pretrain.impression_negatives': '2', key: value}))


def test_windows_have_positions_to_stand_at():
  longer = {'pretrain.ftl_weight': 0.0, 'pretrain.downstream_length': toy.EXPERIMENT.model.tower.max_positions}
  check_experiment(apply_overrides(toy.EXPERIMENT, longer))
  longer['pretrain.downstream_length'] += 1
  with pytest.raises(UserError, match=r'downstream_length is \d+: model.tower.max_positions \d+ must be at least'):
    check_experiment(apply_overrides(toy.EXPERIMENT, longer))


def test_a_loss_has_to_be_left():
  changes = {f'pretrain.{name}_weight': 0.0 for name in ('ntl', 'mtl', 'ftl')}
  with pytest.raises(UserError, match='nothing would be learned'):
    check_experiment(apply_overrides(toy.EXPERIMENT, changes))


@pytest.mark.parametrize('axis', ['data', 'fsdp', 'model'])
def test_a_mesh_axis_may_take_what_is_left(axis):
  sizes = {f'mesh.{name}': int(name != axis) for name in ('data', 'fsdp', 'model')}
  check_experiment(apply_overrides(toy.EXPERIMENT, sizes))
