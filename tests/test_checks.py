"""A setting that cannot work is refused before anything runs, by name and with what is expected."""

import pytest
import toy

from pinfm_jax.checks import check_experiment, check_labels
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import apply_overrides


def test_the_toy_experiment_passes():
  check_experiment(toy.EXPERIMENT)
  check_labels(toy.EXPERIMENT, ('click', 'save', 'hide'))


@pytest.mark.parametrize(
  'setting',
  [
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
  ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_named(setting):
  key, value = setting.split('=')
  with pytest.raises(UserError) as caught:
    check_experiment(apply_overrides(toy.EXPERIMENT, {key: value}))
  message = str(caught.value)
  assert key.split('.')[-1] in message
  assert '\n' not in message


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


def test_a_loss_has_to_be_left():
  changes = {f'pretrain.{name}_weight': 0.0 for name in ('ntl', 'mtl', 'ftl')}
  with pytest.raises(UserError, match='nothing would be learned'):
    check_experiment(apply_overrides(toy.EXPERIMENT, changes))


@pytest.mark.parametrize('axis', ['data', 'fsdp', 'model'])
def test_a_mesh_axis_may_take_what_is_left(axis):
  sizes = {f'mesh.{name}': int(name != axis) for name in ('data', 'fsdp', 'model')}
  check_experiment(apply_overrides(toy.EXPERIMENT, sizes))
