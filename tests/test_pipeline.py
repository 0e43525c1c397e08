"""The Grain pipelines: complete, ordered by (seed, step) alone, and free of time leaks."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from pinfm_jax.config import Arm, PretrainConfig
from pinfm_jax.data.featurize import EVENTS, history_inputs, recent_inputs, recent_items, window_start
from pinfm_jax.data.pipeline import Requests, Segments, action_bits, evaluation_batches, training_batches
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import hash_rows, key_words


def test_segments_hold_every_event_before_the_split_once(toy_run):
  dataset, until = toy_run.dataset, toy_run.split.pretrain_until
  segments = Segments.before(dataset, until, 16)
  seen: dict[int, list[tuple[int, int]]] = {}
  for row, start, stop in zip(segments.user_row, segments.start, segments.stop, strict=True):
    assert 2 <= stop - start <= 16
    seen.setdefault(int(row), []).append((int(start), int(stop)))
  for row, history in enumerate(dataset.histories()):
    usable = int(np.sum(history.timestamp < until))
    covered = sorted(seen.get(row, []))
    # All events, but for a single one that may be left over at the old end.
    assert sum(stop - start for start, stop in covered) in (usable, max(usable - 1, 0))
    assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))
    assert not covered or covered[-1][1] == usable


def test_a_segment_is_the_slice_of_the_history(toy_run):
  segments = Segments.before(toy_run.dataset, toy_run.split.pretrain_until, 16)
  example = segments[3]
  history = toy_run.dataset.history(int(segments.user_row[3]))
  events = slice(int(segments.start[3]), int(segments.stop[3]))
  count = events.stop - events.start
  np.testing.assert_array_equal(example['item'][:count], key_words(history.item[events]))
  np.testing.assert_array_equal(example['actions'][:count], history.actions[events])
  np.testing.assert_array_equal(example['mask'], np.arange(16) < count)


def test_without_a_time_each_users_last_event_is_held_out(toy_run):
  segments = Segments.before(toy_run.dataset, None, 16)
  for row in range(toy_run.dataset.num_users):
    events = len(toy_run.dataset.history(row))
    stops = segments.stop[segments.user_row == row]
    assert stops.max(initial=0) == (events - 1 if events > 2 else 0)


def test_no_history_reaches_beyond_its_request(toy_run):
  dataset = toy_run.dataset
  for row in range(0, dataset.num_requests, 7):
    request = dataset.request(row)
    history = dataset.history(request.user_row)
    first = request.timestamp.min()
    assert np.all(history.timestamp[: request.history_end] < first)
    assert np.all(history.timestamp[request.history_end :] >= first)


def test_splits_do_not_overlap(toy_run):
  split = toy_run.split
  assert split.pretrain_until <= split.finetune[0]
  assert split.finetune[1] == split.validation[0]
  assert split.validation[1] == split.test[0]


def test_batches_depend_on_seed_and_step_alone(toy_run):
  segments = Segments.before(toy_run.dataset, toy_run.split.pretrain_until, 16)
  take = lambda seed, first, count: list(itertools.islice(training_batches(segments, 8, seed, first), count))
  whole, resumed, other = take(0, 0, 40), take(0, 25, 15), take(1, 0, 1)
  for a, b in zip(whole[25:], resumed, strict=True):
    np.testing.assert_array_equal(a['item'], b['item'])
  assert not np.array_equal(whole[0]['item'], other[0]['item'])


def test_an_epoch_holds_every_example_once_and_the_next_has_another_order():
  source = _Numbers(24)
  batches = [b['n'] for b in itertools.islice(training_batches(source, 6, 3, 0), 8)]
  first, second = np.concatenate(batches[:4]), np.concatenate(batches[4:])
  np.testing.assert_array_equal(np.sort(first), np.arange(24))
  np.testing.assert_array_equal(np.sort(second), np.arange(24))
  assert not np.array_equal(first, second)


@pytest.mark.parametrize(
  'parts',
  [[[0, 1, 2], [3, 4, 5]], [[0], [1, 2, 3, 4], [5]], [[0, 1, 2, 3], [2, 3, 4, 5]], [[1, 4], [0, 2, 3, 5]]],
  ids=str,
)
def test_processes_that_hold_any_rows_make_the_same_global_batch(parts):
  whole = [b['n'] for b in itertools.islice(training_batches(_Numbers(20), 6, 3, 2), 5)]
  for rows in parts:
    found = itertools.islice(training_batches(_Numbers(20), 6, 3, 2, np.array(rows)), 5)
    for batch, part in zip(whole, found, strict=True):
      np.testing.assert_array_equal(part['n'], batch[rows])


def test_long_requests_are_split_and_lose_no_candidate(toy_run):
  config = replace(toy_run.experiment.finetune, candidates=4)
  requests = Requests.between(toy_run.dataset, toy_run.schema, config, toy_run.split.test)
  rows = np.unique(requests.request_row)
  expected = sum(len(toy_run.dataset.request(int(row))) for row in rows)
  found = sum(int(batch['candidate_mask'][:count].sum()) for batch, count in evaluation_batches(requests, 5))
  assert found == expected
  items = np.concatenate([requests[i]['candidate_item'][requests[i]['candidate_mask']] for i in range(6)])
  whole = np.concatenate([key_words(toy_run.dataset.request(int(row)).item) for row in rows])
  np.testing.assert_array_equal(items, whole[: len(items)])


def test_content_vectors_belong_to_their_items(toy_run):
  requests = toy_run.requests('test')
  example = requests[0]
  items = toy_run.dataset.items
  key = toy_run.dataset.request(int(requests.request_row[0])).item[0]
  content = items['content'].to_numpy()[items['item_key'].to_numpy() == key][0]
  np.testing.assert_array_equal(example['candidate_embedding'][0, -8:], content)


@pytest.mark.parametrize(
  ('events', 'length', 'block', 'start'),
  [(0, 8, 4, 0), (8, 8, 4, 0), (9, 8, 4, 4), (12, 8, 4, 4), (13, 8, 4, 8), (100, 8, 1, 92)],
)
def test_the_window_slides_in_blocks(events, length, block, start):
  assert window_start(events, length, block) == start


def test_the_window_always_holds_the_newest_events():
  for events in range(200):
    start = window_start(events, 32, 8)
    assert events - start <= 32
    assert start % 8 == 0
    assert events <= 32 or events - start > 32 - 8


def test_history_inputs_are_padded_at_the_end(toy_run):
  history = max(toy_run.dataset.histories(), key=lambda h: len(h.item))
  inputs = history_inputs(history, 3, 8, 4)
  np.testing.assert_array_equal(inputs['mask'], [True] * 3 + [False] * 5)
  np.testing.assert_array_equal(inputs['item'][:3], key_words(history.item[:3]))
  assert not inputs['item'][3:].any()


@pytest.fixture(scope='module')
def with_transact(toy_run):
  return toy_run.of_arm(Arm('TransAct', {'ranker.transact.length': 12, 'ranker.transact.item_buckets': 99}))


def test_recent_events_are_the_newest_before_the_request_newest_first(with_transact):
  requests, counts = with_transact.requests('test'), set()
  for i, row in enumerate(requests.request_row):
    request, example = with_transact.dataset.request(int(row)), requests[i]
    history = with_transact.dataset.history(request.user_row)
    earlier = np.flatnonzero(history.timestamp < request.timestamp.min())[::-1][:12]
    count = len(earlier)
    counts.add(count)
    expected = hash_rows(key_words(history.item[earlier]), 1, 99, 2)[:, 0] + 1
    np.testing.assert_array_equal(example['recent_item'], np.pad(expected, (0, 12 - count)))
    np.testing.assert_array_equal(example['recent_actions'], np.pad(history.actions[earlier], (0, 12 - count)))
    hours = (request.timestamp.min() - history.timestamp[earlier]) / 3.6e6
    np.testing.assert_allclose(example['recent_hours'][:count], hours, rtol=1e-6)
    assert np.all(example['recent_hours'][:count] > 0)
    assert np.all((example['recent_item'] > 0) == (np.arange(12) < count))
    real = example['candidate_mask']
    first = int(requests.first[i])
    items = recent_items(key_words(request.item[first : first + len(real)]), with_transact.schema)
    np.testing.assert_array_equal(example['candidate_recent_item'][real], items)
  assert {0, 12} & counts
  assert len(counts) > 3


def test_recent_events_do_not_depend_on_what_came_later(with_transact):
  history = max(with_transact.dataset.histories(), key=len)
  arguments = (20, with_transact.schema)
  later = replace(history, item=history.item.copy(), actions=history.actions.copy())
  later.item[20:], later.actions[20:] = 7, 5
  found = recent_inputs(later, *arguments)
  for name, column in recent_inputs(history, *arguments).items():
    np.testing.assert_array_equal(found[name], column)
  later.item[19] ^= np.uint64(1)  # the comparison can fail
  assert np.any(recent_inputs(later, *arguments)['item'] != found['item'])
  assert np.isnan(found['hours'][:12]).all()  # without the request's time nothing is known


def test_only_a_ranker_with_transact_reads_recent_events(toy_run, with_transact):
  for name in toy_run.requests('test')[0]:
    assert 'recent' not in name
  assert 'history_item' in with_transact.requests('test')[0]


def test_the_event_count_feature_is_bounded_by_the_window(toy_run):
  schema = toy_run.schema
  column = schema.dense_names.index(EVENTS)
  requests = toy_run.requests('test')
  values = [requests[i]['candidate_dense'][0, column] for i in range(len(requests))]
  assert max(values) == schema.history_length


def test_unknown_positive_actions_are_refused():
  with pytest.raises(UserError, match="'buy'"):
    action_bits(PretrainConfig(positive_actions=('buy',)), ('click', 'save'))
  assert action_bits(PretrainConfig(positive_actions=('save',)), ('click', 'save')) == 2


class _Numbers:
  def __init__(self, count):
    self._count = count

  def __len__(self):
    return self._count

  def __getitem__(self, index):
    return {'n': np.int64(index)}
