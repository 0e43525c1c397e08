"""Time gaps and content on the host: exact bucket edges, lookups, and data that cannot give them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from pinfm_jax.checks import check_experiment
from pinfm_jax.config import PinFMConfig, TowerConfig
from pinfm_jax.data.featurize import candidate_inputs, event_inputs, history_inputs
from pinfm_jax.data.info import TimeKnown
from pinfm_jax.data.pipeline import Segments
from pinfm_jax.data.tokens import (
  ItemContent,
  TokenInputs,
  check_hidden_actions,
  check_tokens,
  event_gaps,
  gap_bucket,
  request_gap,
  unit_half,
)
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import apply_overrides

BUCKETS = 8
KEYS = np.array([3, 7, 2**63 + 5], np.uint64)
CONTENT = np.array([[3, 4], [0, 0], [-1, 0]], np.float32)
ITEMS = ItemContent(KEYS, unit_half(CONTENT), np.array([True, False, True]))


def oracle(gap_ms, buckets):
  """Counts the powers of two that fit, in Python's integers."""
  seconds, bucket = max(int(gap_ms), 0) // 1000, 1
  while seconds >= 2 ** (bucket - 1):
    bucket += 1
  return min(bucket, buckets - 1)


@given(st.integers(-(10**12), 2**52), st.integers(3, 64))
def test_buckets_are_powers_of_two_of_seconds(gap_ms, buckets):
  assert gap_bucket(np.array([gap_ms]), buckets)[0] == oracle(gap_ms, buckets)


def test_the_edges_of_the_buckets():
  edges = {0: 1, 999: 1, 1000: 2, 1999: 2, 2000: 3, 3999: 3, 4000: 4, 7999: 4, 8000: 5, -5: 1}
  assert {gap: int(gap_bucket(np.array(gap), 64)) for gap in edges} == edges
  for power in range(45):  # both sides of every edge
    at = 1000 * 2**power
    assert gap_bucket(np.array([at - 1, at]), 64).tolist() == [power + 1, power + 2]
  assert gap_bucket(np.array([2**50]), BUCKETS) == BUCKETS - 1
  assert gap_bucket(np.array([17 * 365 * 86_400_000]), 32) == 30  # 32 buckets tell gaps of up to 17 years apart


def test_a_windows_first_event_has_no_gap(toy_run):
  history = max(toy_run.dataset.histories(), key=len)
  whole = event_gaps(history.timestamp, BUCKETS)
  tokens = TokenInputs(BUCKETS)
  inputs = event_inputs(history, slice(5, 12), 10, tokens)
  np.testing.assert_array_equal(inputs['gap'], [0, *whole[6:12], 0, 0, 0])
  assert np.all(whole[1:] > 0)
  assert len(set(whole.tolist())) > 3


def test_event_gaps_of_short_histories():
  assert event_gaps(np.zeros(0, np.int64), BUCKETS).tolist() == []
  assert event_gaps(np.array([7]), BUCKETS).tolist() == [0]
  assert event_gaps(np.array([7, 7, 3007]), BUCKETS).tolist() == [0, 1, 3]


def test_the_candidates_gap_is_the_requests_and_the_histories_do_not_depend_on_it(toy_run):
  requests = replace(toy_run.requests('test'), tokens=TokenInputs(64))
  seen = 0
  for i in range(40):
    example, request = requests[i], toy_run.dataset.request(int(requests.request_row[i]))
    mask = example['candidate_mask']
    assert not example['candidate_gap'][~mask].any()
    history = toy_run.dataset.history(request.user_row)
    if not request.history_end:
      assert not example['candidate_gap'].any()
      continue
    gap = int(request.timestamp.min() - history.timestamp[request.history_end - 1])
    assert set(example['candidate_gap'][mask]) == {oracle(gap, 64)}
    expected = history_inputs(history, request.history_end, 8, 4, TokenInputs(64))['gap']
    np.testing.assert_array_equal(example['history_gap'], expected)
    seen += 1
  assert seen > 10
  assert request_gap(np.array([5000, 9000]), None, BUCKETS) == 0
  assert request_gap(np.zeros(0, np.int64), 5, BUCKETS) == 0


def test_content_is_looked_up_by_key():
  found = ITEMS.inputs(np.array([2**63 + 5, 3, 7, 0, 2**64 - 1, 8], np.uint64))
  expected = [[-1, 0], [0.6, 0.8], [0, 0], [0, 0], [0, 0], [0, 0]]
  np.testing.assert_array_equal(found['content'], np.array(expected, np.float16))
  np.testing.assert_array_equal(found['new'], [False, False, True, True, True, True])
  assert 'new' not in ItemContent(KEYS, ITEMS.vectors_VW).inputs(KEYS)
  nothing = ItemContent(KEYS[:0], ITEMS.vectors_VW[:0], ITEMS.known_V[:0]).inputs(KEYS)
  assert not nothing['content'].any()
  assert nothing['new'].all()


def test_content_that_comes_with_an_item_wins():
  own = np.array([[np.nan, np.nan], [0, 5], [1, 1], [0, 0]], np.float32)
  found = ITEMS.inputs(np.array([3, 3, 99, 3], np.uint64), own)
  expected = np.array([[0.6, 0.8], [0, 1], [0.5**0.5, 0.5**0.5], [0, 0]], np.float16)
  np.testing.assert_array_equal(found['content'], expected)
  np.testing.assert_array_equal(found['new'], [False, False, True, False])


def test_vectors_get_unit_length_whatever_their_size():
  vectors = np.array([[3e38, 3e38], [1e-30, 0], [np.nan, 1], [0, 0], [np.inf, 1]], np.float32)
  expected = np.array([[0.5**0.5, 0.5**0.5], [1, 0], [0, 0], [0, 0], [0, 0]], np.float16)
  np.testing.assert_array_equal(unit_half(vectors), expected)


def test_items_of_a_data_set_and_those_first_seen_after_training():
  content = pl.Series('content', [[3.0, 4.0], None, [-2.0, 0.0]], dtype=pl.Array(pl.Float32, 2))
  frame = pl.DataFrame({'item_key': KEYS, 'first_seen': [10, 20, 30], 'content': content})
  dataset = SimpleNamespace(items=frame, info=SimpleNamespace(content_width=2))
  items = ItemContent.of(dataset, 20)
  np.testing.assert_array_equal(items.vectors_VW, unit_half(CONTENT))
  np.testing.assert_array_equal(items.known_V, [True, False, False])
  assert ItemContent.of(dataset).known_V is None


def test_the_pipeline_gives_the_content_of_its_items(toy_run):
  tokens = TokenInputs(items=ItemContent.of(toy_run.dataset, toy_run.split.finetune[1]))
  segments = Segments.before(toy_run.dataset, toy_run.split.pretrain_until, 16, tokens)
  example = segments[3]
  history = toy_run.dataset.history(int(segments.user_row[3]))
  items = history.item[segments.start[3] : segments.stop[3]]
  table = dict(
    zip(toy_run.dataset.items['item_key'].to_list(), toy_run.dataset.items['content'].to_list(), strict=True)
  )
  expected = np.array([table[int(key)] for key in items])
  expected /= np.linalg.norm(expected, axis=1, keepdims=True)
  np.testing.assert_allclose(example['content'][: len(items)], expected, atol=1e-3)
  assert not example['content'][len(items) :].any()
  assert not example['new'].any()  # pretraining sees every item that it reads


def test_new_items_are_marked_in_the_evaluation_alone(toy_run):
  tokens = TokenInputs(items=ItemContent.of(toy_run.dataset, toy_run.split.finetune[1]))
  new = {}
  for part in ('finetune', 'test'):
    requests = replace(toy_run.requests(part), tokens=tokens)
    examples = [requests[i] for i in range(len(requests))]
    new[part] = np.concatenate([e['candidate_new'][e['candidate_mask']] for e in examples])
  assert not new['finetune'].any()
  assert 0 < new['test'].mean() < 0.5


def test_without_options_nothing_is_added(toy_run):
  requests = toy_run.requests('test')
  assert not {name for name in requests[0] if name.endswith(('gap', 'content', 'new'))}
  request, schema = toy_run.dataset.request(0), toy_run.schema
  inputs = candidate_inputs(request, slice(0, 1), 2, schema, np.zeros((len(request), 8)))
  assert set(inputs) == {'item', 'mask', 'age_hours', 'dense', 'sparse', 'embedding', 'labels'}


@pytest.mark.parametrize(
  ('model', 'info', 'message'),
  [
    (PinFMConfig(tower=TowerConfig(time_gap_buckets=32)), {}, 'time_gap_buckets is 32, but the histories .* no times'),
    (PinFMConfig(content=True), {'content_width': 0}, 'model.content is true, but the items .* no content'),
    (PinFMConfig(content=True, content_width=3), {}, 'content_width is 3, the content vectors .* have 8'),
  ],
)
def test_data_without_what_the_model_reads_is_refused(toy_run, model, info, message):
  changed = replace(toy_run.dataset.info, time_known=TimeKnown(histories=False, impressions=True), **info)
  with pytest.raises(UserError, match=message) as error:
    check_tokens(model, changed)
  assert '\n' not in str(error.value)
  check_tokens(PinFMConfig(), changed)


def test_actions_that_nobody_has_taken_cannot_be_hidden(toy_run):
  check_hidden_actions(0.2, toy_run.dataset.info)
  none = replace(toy_run.dataset.info, actions=())
  check_hidden_actions(0.0, none)
  with pytest.raises(UserError, match='action_mask is 0.2, but the events of this data set have no actions'):
    check_hidden_actions(0.2, none)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model.tower.time_gap_buckets': 2}, 'time_gap_buckets is 2; expected 0'),
    ({'model.id_mask': 0.5}, 'id_mask is 0.5, which leaves nothing'),
    ({'model.id_mask': 1.0, 'model.content': True}, 'id_mask is 1.0; expected a share below 1'),
    ({'pretrain.action_mask': 1.0}, 'action_mask is 1.0; expected a share below 1'),
    ({'pretrain.action_mask': -0.1}, 'action_mask is -0.1; expected a finite number that is not negative'),
  ],
)
def test_values_that_cannot_work_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    check_experiment(apply_overrides(toy.EXPERIMENT, changes))


def test_values_that_work_are_accepted():
  options = {
    'model.tower.time_gap_buckets': 3,
    'model.content': True,
    'model.id_mask': 0.2,
    'pretrain.action_mask': 0.2,
  }
  check_experiment(apply_overrides(toy.EXPERIMENT, options))
