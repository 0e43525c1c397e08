"""The pool of keys and values: what is kept and extended gives the scores of a pass over the whole window."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import toy_bundle

from pinfm_jax.errors import UserError
from pinfm_jax.serve.batches import Sizes, appended_sizes, cut, event_sizes, padded
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.programs import ServingModel
from pinfm_jax.serve.scorer import Scorer

USERS, EVENTS = 6, 70
TOWER = replace(toy_bundle.MODEL.tower, max_positions=toy_bundle.LENGTH + 2)
MODELS = {
  'inputs': (
    replace(toy_bundle.MODEL, tower=replace(TOWER, time_gap_buckets=12), content=True, content_width=2, id_mask=0.3),
    {},
  ),
  'token': (
    replace(toy_bundle.MODEL, tower=replace(TOWER, backbone='hstu')),
    {'learnable_token': True, 'candidate_content': True, 'similarity_width': 4},
  ),
  'mean': (toy_bundle.MODEL, {'fusion': 'mean'}),
}
SIZES = Sizes(cache_users=4, max_users=3, max_rows=16)


@pytest.fixture(scope='module')
def dataset():
  return toy_bundle.ToyDataset([EVENTS] * USERS)


@pytest.fixture(scope='module', params=MODELS)
def toy(request):
  model, options = MODELS[request.param]
  return toy_bundle.make_toy(model=model, **options)


@pytest.fixture(scope='module')
def scorer(toy, tmp_path_factory):
  return Scorer(load_bundle(toy.export(tmp_path_factory.mktemp('pool') / 'bundle', storage='float32')), SIZES)


@pytest.fixture
def documents(dataset):
  return list(dataset_requests(dataset, range(USERS), history_length=10_000))


def after(document, events):
  """The request as it was made when the user had so many events."""
  return document | {'history': document['history'][:events], 'history_events': events}


def test_scores_equal_the_training_path(scorer, toy, dataset, documents):
  expected = dataset.expected(toy)
  requests = [scorer.parse(document) for document in documents]
  for _ in range(2):  # computed, then held
    for found, scores_CT in zip(scorer.probabilities(requests), expected, strict=True):
      np.testing.assert_allclose(found, scores_CT, atol=1e-5)


def test_streams_of_events_score_as_uncached_passes(scorer, documents):
  """Appended events, slides of the window, repeats, evictions and duplicates in a batch, at random."""
  uncached = Scorer(scorer.bundle, SIZES)
  uncached._programs = scorer._programs  # compiled once
  cache, rng = scorer.cache, np.random.default_rng(0)
  before = np.array([cache.hits, cache.extended, cache.misses, cache.evicted])
  events = rng.integers(0, 25, USERS)
  for _ in range(40):
    some = rng.integers(0, USERS, rng.integers(1, 5))
    batch = []
    for user in some:
      if rng.random() < 0.6:
        events[user] = min(events[user] + rng.integers(1, 4), EVENTS)
      batch.append(scorer.parse(after(documents[user], int(events[user]))))
    users_UO, found = scorer.users(batch), scorer.probabilities(batch)
    for user, h_O, scores_CT, request in zip(some, users_UO, found, batch, strict=True):
      uncached.cache.clear()
      np.testing.assert_allclose(h_O, uncached.users([request])[0], rtol=1e-4, atol=2e-6, err_msg=str(user))
      np.testing.assert_allclose(scores_CT, uncached.probabilities([request])[0], rtol=1e-4, atol=2e-6)
  assert min(np.array([cache.hits, cache.extended, cache.misses, cache.evicted]) - before) > 5


def test_vectors_equal_the_model(scorer, toy, documents):
  bundle = scorer.bundle
  model = ServingModel(toy.model, toy.ranker, toy_bundle.SPEC, bundle.manifest.tables)
  requests = [scorer.parse(after(documents[user], events)) for user, events in ((0, 0), (1, 9), (2, EVENTS))]

  @jax.jit
  def expected(params, events, candidates, keys):
    kept = model._context(params, events)
    pairs = model.module.apply(
      {'params': params},
      model._vectors(candidates['rows']),
      kept,
      toy_bundle.CandidateBatch(
        *(
          candidates.get(n)
          for n in ('item', 'mask', 'age_hours', 'dense', 'sparse', 'embedding', 'gap', 'content', 'new')
        )
      ),
      method='pairs',
    )
    return kept.user_UO, pairs, model.items(params, keys)

  windows = [request.model_window(scorer._tokens) for request in requests]
  longest = max(map(len, windows))
  events = {
    name: np.stack([np.pad(w.columns[name], [(0, longest - len(w)), *[(0, 0)] * (c.ndim - 1)]) for w in windows])
    for name, c in windows[0].columns.items()
  }
  events |= {'mask': np.arange(longest) < np.array([[len(w)] for w in windows])}
  flat = scorer._candidates(requests)
  candidates = {name: column.reshape(3, -1, *column.shape[1:]) for name, column in flat.items()}
  keys = requests[0].candidates.item
  tokens = {name: column[0] for name, column in candidates.items() if name in ('rows', 'content', 'new')}
  events['rows'] = bundle.rows.rows(events.pop('item'))
  user_UO, pairs_UCO, items = expected(bundle.params, events, candidates, tokens)
  np.testing.assert_allclose(scorer.users(requests), user_UO, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(np.stack(scorer.pairs(requests)), pairs_UCO, rtol=1e-4, atol=1e-6)
  found = scorer.items(np.tile(keys, 20))  # more than the smallest size
  for name, rows in items.items():
    np.testing.assert_allclose(found[name], np.tile(rows, (20, 1)), rtol=1e-4, atol=1e-6)
  assert scorer.users([]).shape == (0, 8)
  assert scorer.items(np.zeros(0, np.uint64))['vector'].shape == (0, 16)


def test_the_pool_is_updated_in_place(scorer, documents):
  addresses = lambda: [array.unsafe_buffer_pointer() for array in scorer._pool.values()]
  scorer.cache.clear()
  before = addresses()
  for events in (3, 4, 9, 30, 31, 70):
    scorer.probabilities([scorer.parse(after(document, events)) for document in documents])
  assert addresses() == before
  bytes_ = sum(array.nbytes for array in scorer._pool.values())
  for program in ('context', 'extend'):  # and no copy lives meanwhile
    rows, length = scorer._event_rows(program)[0], 4
    window = scorer._with_rows([scorer.parse(after(documents[0], 0)).model_window(scorer._tokens).columns])
    arguments = (scorer._params, scorer._pool, np.zeros(rows, np.int32), padded(window, [0], rows, length))
    memory = scorer._programs[program].lower(*arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= bytes_


def test_a_failure_forgets_what_was_kept(scorer, documents, monkeypatch):
  requests = [scorer.parse(after(documents[0], 11))]
  scorer.cache.clear()
  expected = scorer.probabilities(requests)

  def failing(*_):
    raise RuntimeError('out of memory')

  monkeypatch.setitem(scorer._programs, 'extend', failing)
  with pytest.raises(RuntimeError, match='out of memory'):
    scorer.probabilities([scorer.parse(after(documents[0], 12))])
  monkeypatch.undo()
  misses = scorer.cache.misses
  np.testing.assert_allclose(scorer.probabilities(requests)[0], expected[0], atol=1e-6)
  assert scorer.cache.misses == misses + 1


@pytest.mark.slow
def test_a_bf16_tower_keeps_bf16(dataset, documents, tmp_path):
  toy = toy_bundle.make_toy(model=replace(toy_bundle.MODEL, tower=replace(TOWER, dtype='bfloat16')))
  scorer = Scorer(load_bundle(toy.export(tmp_path / 'bundle', storage='float32')), SIZES)
  assert scorer._pool['key'].dtype == scorer._pool['value'].dtype == jax.numpy.bfloat16
  expected = dataset.expected(toy)
  for events in (EVENTS - 1, EVENTS):  # computed, then extended; the window does not slide between them
    found = scorer.probabilities([scorer.parse(after(documents[0], events))])[0]
  assert scorer.cache.extended == 1
  np.testing.assert_allclose(found, expected[0], atol=0.03)


def test_a_bidirectional_model_is_never_extended(dataset, documents, tmp_path):
  toy = toy_bundle.make_toy(bidirectional=True)
  bundle = load_bundle(toy.export(tmp_path / 'bundle', storage='float32'))
  assert 'extend' not in bundle.programs
  scorer, expected = Scorer(bundle, SIZES), dataset.expected(toy)
  scorer.warm_up()
  misses = scorer.cache.misses
  for events in (EVENTS - 1, EVENTS):
    found = next(iter(scorer.probabilities([scorer.parse(after(documents[0], events))])))
  np.testing.assert_allclose(found, expected[0], atol=1e-5)
  assert (scorer.cache.misses, scorer.cache.extended) == (misses + 2, 0)
  with pytest.raises(ValueError, match='bidirectional'):
    toy.module.apply({'params': toy.params}, None, None, None, method='extend')


def test_a_ranker_without_pinfm_has_no_vectors(dataset, documents, tmp_path):
  scorer = Scorer.load(toy_bundle.make_toy('none').export(tmp_path / 'none'))
  requests = [scorer.parse(documents[0])]
  for call in (lambda: scorer.users(requests), lambda: scorer.pairs(requests), lambda: scorer.items(np.zeros(1))):
    with pytest.raises(UserError, match='holds a ranker without PinFM: it has no vectors'):
      call()
  assert scorer.cache.slots == scorer.cache.misses == 0


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('cache_users', 0, 'got cache_users 0, expected an integer of at least 1'),
    ('max_users', None, 'got max_users None'),
    ('max_rows', 12, 'got max_rows 12, expected a power of two'),
  ],
)
def test_sizes_are_checked(field, value, message):
  with pytest.raises(UserError, match=message):
    Sizes(**{field: value})


def test_slots_are_bounded_by_bytes():
  assert Sizes().slots(1 << 19) == 1024
  assert Sizes().slots(1 << 24) == 64
  assert Sizes().slots(1 << 40) == 1
  assert Sizes(cache_users=7).slots(1 << 40) == 7


@pytest.mark.parametrize('sizes', [(1, 4, 16), (2, 8), (1,), (1, 64)])
def test_work_is_cut_to_the_sizes(sizes):
  for count in range(130):
    calls = cut(count, sizes)
    assert set(calls) <= set(sizes)
    assert count <= sum(calls) <= max(2 * count, sizes[0])
    assert sum(calls[:-1]) < max(count, 1)


def test_groups_of_tiles_have_the_sizes_that_are_compiled():
  rng = np.random.default_rng(5)
  for sizes in (Sizes(), Sizes(max_rows=4), Sizes(max_rows=1)):
    known = set(sizes.tiles())
    for _ in range(20):
      most = rng.choice([2, 20, 300, 3000][: 4 if sizes.max_rows > 4 else 2])
      counts = rng.integers(0, most, rng.integers(1, sizes.max_users + 1))
      groups = list(sizes.tile_groups(counts))
      assert {(len(group.user_M), group.width) for group in groups} <= known
      seen = [np.zeros(count, int) for count in counts]
      for group in groups:
        for user, places, mask in zip(group.user_M, group.places, group.mask, strict=True):
          np.add.at(seen[user], places[mask], 1)
      assert all((count == 1).all() for count in seen)
  assert len(set(Sizes().tiles())) <= 15


def test_lengths_of_the_context_pass():
  assert event_sizes(256) == (64, 256)
  assert event_sizes(20) == (20,)
  assert appended_sizes(256) == (4, 32)
  assert appended_sizes(20) == (4, 20)
  assert appended_sizes(3) == (3,)
