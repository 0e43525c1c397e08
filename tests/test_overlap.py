"""The time split in parts of days, and a tower that reads the fine-tuning days of the users that do not fine-tune."""

from dataclasses import replace

import numpy as np
import pytest
import toy

from pinfm_jax.checks import check_experiment
from pinfm_jax.config import DAY_MS, DataConfig
from pinfm_jax.data.pipeline import Segments
from pinfm_jax.data.splits import pretrained_items, split_by_time
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.stages.context import Run
from pinfm_jax.stages.pretrain import retrieval_of

OVERLAP = replace(toy.EXPERIMENT.data, pretrain_overlap=True, pretrain_overlap_users='others')


def test_parts_of_days_are_counted_back_from_the_end_of_the_last_day(toy_run):
  config = DataConfig(test_days=0.25, validation_days=0.125, finetune_days=1.5)
  split = split_by_time(toy_run.dataset, config)
  end = split.test[1]
  assert end % DAY_MS == 0
  assert split.test[0] == end - DAY_MS // 4
  assert split.validation == (end - 3 * DAY_MS // 8, split.test[0])
  assert split.finetune == (split.validation[0] - 3 * DAY_MS // 2, split.validation[0])
  assert split.pretrain_until == split.finetune[0]
  assert split.until_by_user(3) is None


def test_a_part_of_no_days_is_named(toy_run):
  data = replace(toy_run.experiment.data, validation_days=0)
  run = Run(replace(toy_run.experiment, data=data), toy_run.workdir)
  with pytest.raises(UserError, match='data.validation_days is 0, so there is no validation part'):
    run.requests('validation')
  assert len(run.requests('test'))


def test_an_overlap_with_other_users_never_reads_what_a_ranker_trains_on(toy_run):
  dataset = toy_run.dataset
  split = split_by_time(dataset, OVERLAP)
  begin, end = split.finetune
  trains = {request.user_row for request in dataset.all_requests() if begin <= request.timestamp.min() < end}
  assert set(split.spared.tolist()) == trains
  assert 0 < len(trains) < dataset.num_users
  split = replace(split, spared=split.spared[::2])  # whoever has events here has requests too
  trains = set(split.spared.tolist())
  until_U = split.until_by_user(dataset.num_users)
  segments = Segments.before(dataset, split.pretrain_until, 16, until_U=until_U)
  late = set()
  for row, stop in zip(segments.user_row.tolist(), segments.stop.tolist(), strict=True):
    last = dataset.history(row).timestamp[:stop].max()
    assert last < (begin if row in trains else end)
    if last >= begin:
      late.add(row)
  assert late  # the others' events of these days are there
  whole = Segments.before(dataset, split.pretrain_until, 16)
  assert segments.stop.sum() < whole.stop.sum()


def test_items_that_just_a_spared_user_met_count_as_unseen(toy_run):
  dataset = toy_run.dataset
  split = split_by_time(dataset, OVERLAP)
  until_U = split.until_by_user(dataset.num_users)
  expected = set()
  for row in range(dataset.num_users):
    history = dataset.history(row)
    expected |= set(history.item[history.timestamp < until_U[row]].tolist())
  assert set(pretrained_items(dataset, split.pretrain_until, until_U).tolist()) == expected
  assert len(expected) < len(pretrained_items(dataset, split.pretrain_until))


def test_retrieval_counts_those_items_as_unseen_too(toy_run):
  run = Run(replace(toy_run.experiment, data=OVERLAP), toy_run.workdir)
  catalogue_V = retrieval_of(run, 'test', (5,)).task.catalogue_V
  np.testing.assert_array_equal(catalogue_V, run.pretrained_items)
  assert len(catalogue_V) < len(pretrained_items(run.dataset, run.split.pretrain_until))


def test_the_choice_is_a_setting_of_the_tower_and_is_checked(toy_run):
  other = Run(replace(toy_run.experiment, data=OVERLAP), toy_run.workdir)
  assert other.pretrain_settings(0)['data']['pretrain_overlap_users'] == 'others'
  assert 'pretrain_overlap_users' not in toy_run.pretrain_settings(0)['data']  # earlier towers stay valid
  assert not {'item_dropout', 'eval_metric'} & toy_run.pretrain_settings(0)['pretrain'].keys()
  with pytest.raises(UserError, match="pretrain_overlap_users is 'some'; expected one of: all, others"):
    check_experiment(apply_overrides(toy_run.experiment, {'data.pretrain_overlap_users': 'some'}))
  without = split_by_time(toy_run.dataset, replace(OVERLAP, pretrain_overlap=False))
  assert not len(without.spared)
  np.testing.assert_array_equal(without.finetune, split_by_time(toy_run.dataset, OVERLAP).finetune)
