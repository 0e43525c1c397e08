"""Options of the model's input: what the model reads of gaps, content, hidden ids and hidden actions, and learns."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax.core import meta

from pinfm_jax.config import MeshConfig, PinFMConfig, PretrainConfig, TableConfig, TowerConfig, UpdateConfig
from pinfm_jax.data.tokens import unit_half
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import hash_rows, key_words
from pinfm_jax.model.masking import HIDE_ACTIONS, HIDE_CANDIDATE_ID, HIDE_ID, batch_places, draw, drop_elements
from pinfm_jax.model.pinfm import EventBatch, PinFM, no_events
from pinfm_jax.train.action_loss import action_loss, hidden_actions
from pinfm_jax.train.exchange import Exchange
from pinfm_jax.train.growth import check_growth
from pinfm_jax.train.pretrain import PretrainTask, segment_events
from pinfm_jax.train.sharding import make_mesh
from pinfm_jax.train.step import init_state, make_step

USERS, LENGTH, WIDTH, ACTIONS, BUCKETS = 4, 6, 3, 3, 5
PLAIN = PinFMConfig(
  TableConfig(sub_tables=2, rows=60, width=4),
  TowerConfig(layers=2, width=16, heads=2, mlp_ratio=2, output_width=8, max_positions=LENGTH + 1),
  num_actions=ACTIONS,
  num_surfaces=2,
)
MODEL = replace(
  PLAIN, tower=replace(PLAIN.tower, time_gap_buckets=BUCKETS), content=True, content_width=WIDTH, id_mask=0.4
)
CONFIG = PretrainConfig(
  segment_length=LENGTH, downstream_length=3, window=2, pairs=2, max_columns=16, action_mask=0.5, action_weight=0.7
)
STEP = 3


@pytest.fixture(scope='module')
def mesh():
  mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    yield mesh


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  shape = (USERS, LENGTH)
  return {
    'item': key_words(rng.integers(0, 30, shape).astype(np.uint64)),
    'surface': rng.integers(0, 2, shape).astype(np.int32),
    'actions': rng.integers(0, 2**ACTIONS, shape).astype(np.uint32),
    'mask': np.arange(LENGTH) < np.array([6, 6, 4, 2])[:, None],
    'user': np.broadcast_to(np.arange(USERS, dtype=np.uint32)[:, None], shape),
    'gap': rng.integers(0, BUCKETS, shape).astype(np.int32),
    'content': unit_half(rng.normal(size=(USERS * LENGTH, WIDTH))).reshape(*shape, WIDTH),
  }


def random_params(shapes, seed=0):
  """Weights large enough that every input changes the result; made without compiling an initialisation."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), meta.unbox(shapes))


@pytest.fixture(scope='module')
def params():
  return random_params(jax.eval_shape(PretrainTask(MODEL, CONFIG, 0).init, jax.random.key(0)))


@pytest.fixture(scope='module')
def vectors():
  """Id vectors of the batch's events, [U, L, V]."""
  return jnp.asarray(np.random.default_rng(1).normal(size=(USERS, LENGTH, 8)), jnp.float32)


@pytest.fixture(scope='module')
def encode(params):
  """(id vectors, columns of the batch, hidden ids, hidden actions) -> H, z and the items' E; compiled once."""

  @jax.jit
  def run(vectors, columns, hidden_ids, hidden):
    events, model, weights = segment_events(columns), PinFM(MODEL), {'params': params['pinfm']}
    items = model.apply(weights, vectors, events.content_ULW, hidden_ids, method='items')
    h, _ = model.apply(weights, items, events, hidden_actions_UL=hidden, method='encode')
    return h, model.apply(weights, items, method='targets'), items

  nowhere = np.zeros((USERS, LENGTH), bool)
  return lambda vectors, batch, ids=nowhere, hidden=nowhere: [np.asarray(x) for x in run(vectors, batch, ids, hidden)]


@pytest.fixture(scope='module')
def loss_and_gradients(mesh, params):
  """(batch, seed) -> figures and the gradients of the parameters and of the table rows."""
  tables, made = toy.tables(MODEL.tables), {}
  exchange = Exchange(MODEL.tables, tables.rows_GE.shape[0])

  def compiled(seed):
    task = PretrainTask(MODEL, CONFIG, 0, seed=seed)

    @jax.jit
    def compute(batch, step):
      ids = task.ids(batch, step)
      plan = exchange.plan(ids)

      def loss(params, rows_KE):
        vectors = exchange.vectors(rows_KE, plan, ids)
        return task.loss(params, vectors, batch, step, jax.random.key(0), None)

      rows_KE = exchange.lookup(tables.rows_GE, plan)
      grads, figures = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, rows_KE)
      return figures, grads[0], jnp.zeros_like(tables.rows_GE).at[plan.rows.unique_K].set(grads[1], mode='drop')

    return compute

  def run(batch, seed=0, step=STEP):
    made.setdefault(seed, compiled(seed))
    return made[seed](batch, jnp.int32(step))

  return run


def test_off_by_default_no_parameter_is_added():
  names = lambda model: set(jax.eval_shape(PretrainTask(model, PretrainConfig(), 0).init, jax.random.key(0))['pinfm'])
  assert names(MODEL) - names(PLAIN) == {'gap_embedding', 'content_projection', 'masked_id'}
  assert PinFMConfig().content is False
  assert (PinFMConfig().id_mask, TowerConfig().time_gap_buckets, PretrainConfig().action_mask) == (0, 0, 0)
  assert no_events(1, 2).gap_UL is None


def test_the_item_vector_is_the_id_plus_the_projected_content(encode, params, vectors, batch):
  hidden = np.zeros((USERS, LENGTH), bool)
  hidden[0, 2] = hidden[1, 0] = True
  weights = {name: np.asarray(value, np.float64) for name, value in params['pinfm'].items() if name != 'decoder'
             and not isinstance(value, dict)}  # fmt: skip
  expected = np.where(hidden[..., None], weights['masked_id'], np.asarray(vectors, np.float64))
  expected = expected + batch['content'].astype(np.float64) @ weights['content_projection']
  np.testing.assert_allclose(encode(vectors, batch, hidden)[2], expected, rtol=1e-5, atol=1e-6)


def test_an_item_without_content_is_its_id(encode, vectors, batch):
  zeros = {**batch, 'content': np.zeros_like(batch['content'])}
  np.testing.assert_array_equal(encode(vectors, zeros)[2], vectors)


def test_a_hidden_id_is_nowhere_in_the_outputs(encode, vectors, batch):
  hidden = np.zeros((USERS, LENGTH), bool)
  hidden[0, 2] = True
  other = vectors.at[0, 2].add(1.0)
  for a, b in zip(encode(vectors, batch, hidden), encode(other, batch, hidden), strict=True):
    np.testing.assert_array_equal(a, b)
  seen = [np.abs(a - b).max() for a, b in zip(encode(vectors, batch), encode(other, batch), strict=True)]
  assert min(seen) > 1e-3


def test_the_gap_changes_the_events_behind_it_alone(encode, vectors, batch):
  gap = batch['gap'].copy()
  gap[0, 3] = (gap[0, 3] + 1) % BUCKETS
  (h, z, items), (h2, z2, items2) = encode(vectors, batch), encode(vectors, {**batch, 'gap': gap})
  np.testing.assert_array_equal(z, z2)
  np.testing.assert_array_equal(items, items2)
  changed = np.abs(h - h2).max(axis=-1) > 1e-6
  np.testing.assert_array_equal(changed, [[0, 0, 0, 1, 1, 1], *[[0] * LENGTH] * 3])


def test_the_gap_is_one_more_term_of_the_token(encode, params, vectors, batch):
  """An event of bucket b with the id vector v is one of bucket 0 with v + g_b - g_0: oracle of the sum in Eq. 1."""
  gaps = params['pinfm']['gap_embedding']
  h, _, _ = encode(vectors, batch)
  moved, _, _ = encode(vectors + gaps[batch['gap']] - gaps[0], {**batch, 'gap': np.zeros_like(batch['gap'])})
  np.testing.assert_allclose(h, moved, atol=1e-5)


def test_the_candidates_gap_changes_its_output_and_not_its_neighbours(params, vectors, batch):
  model, weights, events = PinFM(MODEL), {'params': params['pinfm']}, segment_events(batch)

  @jax.jit
  def cross(gap_UC):
    items = model.apply(weights, vectors, events.content_ULW, method='items')
    _, kv = model.apply(weights, items, events, method='encode')
    return model.apply(weights, items[:, :3], kv, events.mask_UL, gap_MC=gap_UC, method='cross')

  a = np.asarray(cross(np.zeros((USERS, 3), np.int32)))
  b = np.asarray(cross(np.array([[0, 2, 0]] * USERS, np.int32)))
  assert np.abs(a[:, 1] - b[:, 1]).max() > 1e-3
  np.testing.assert_array_equal(a[:, [0, 2]], b[:, [0, 2]])


def test_missing_columns_are_a_clear_error(params, vectors, batch):
  model, weights = PinFM(MODEL), {'params': params['pinfm']}
  events = segment_events({name: value for name, value in batch.items() if name not in ('gap', 'content')})
  with pytest.raises(ValueError, match='reads time gaps, but the batch has none'):
    jax.eval_shape(lambda: model.apply(weights, vectors, events, method='encode'))
  with pytest.raises(ValueError, match='adds content vectors .* but the batch has none'):
    jax.eval_shape(lambda: model.apply(weights, vectors, None, method='items'))


def test_hidden_actions_do_not_leak(encode, vectors, batch):
  hidden = np.zeros((USERS, LENGTH), bool)
  hidden[0, 2] = hidden[1, 5] = True
  other = {**batch, 'actions': np.where(hidden, batch['actions'] ^ 5, batch['actions']).astype(np.uint32)}
  np.testing.assert_array_equal(encode(vectors, batch, hidden=hidden)[0], encode(vectors, other, hidden=hidden)[0])
  assert np.abs(encode(vectors, batch)[0] - encode(vectors, other)[0]).max() > 1e-3


def test_a_hidden_event_carries_the_candidates_mark(encode, params, vectors, batch):
  """No actions and the mark added to the id vector are the same token."""
  hidden = np.ones((USERS, LENGTH), bool)
  marked = vectors + params['pinfm']['action_embedding'][-1]
  plain = {**batch, 'actions': np.zeros_like(batch['actions'])}
  np.testing.assert_allclose(encode(vectors, batch, hidden=hidden)[0], encode(marked, plain)[0], atol=1e-5)


def test_the_action_loss_is_the_cross_entropy_of_hidden_events():
  rng = np.random.default_rng(3)
  h, hidden = rng.normal(size=(USERS, LENGTH, 8)), rng.random((USERS, LENGTH)) < 0.4
  actions = rng.integers(0, 2**ACTIONS, (USERS, LENGTH))
  kernel, bias = rng.normal(size=(8, ACTIONS)), rng.normal(size=ACTIONS)
  total = 0.0
  for u, l in np.argwhere(hidden):  # noqa: E741
    for a in range(ACTIONS):
      p = 1 / (1 + np.exp(-(h[u, l] @ kernel[:, a] + bias[a])))
      total -= np.log(p if actions[u, l] >> a & 1 else 1 - p)
  head = {'kernel': jnp.asarray(kernel, jnp.float32), 'bias': jnp.asarray(bias, jnp.float32)}
  arguments = (jnp.asarray(h, jnp.float32), jnp.asarray(actions, jnp.uint32))
  np.testing.assert_allclose(action_loss(head, *arguments, jnp.asarray(hidden)), total / hidden.sum(), rtol=1e-5)
  assert action_loss(head, *arguments, jnp.zeros((USERS, LENGTH), bool)) == 0


def test_draws_have_their_share_and_differ_by_seed_step_and_purpose():
  place = batch_places((300, 400))
  draws = [
    draw(place, 0.3, seed, jnp.int32(step), purpose)
    for seed in (0, 1)
    for step in (0, 1)
    for purpose in (HIDE_ID, HIDE_CANDIDATE_ID, HIDE_ACTIONS)
  ]
  drawn = np.array(draws).reshape(len(draws), -1).astype(float)
  np.testing.assert_allclose(drawn.mean(axis=1), 0.3, atol=5 * (0.21 / drawn.shape[1]) ** 0.5)
  correlation = np.corrcoef(drawn) - np.eye(len(draws))
  assert np.abs(correlation).max() < 5 / drawn.shape[1] ** 0.5
  half = draw(place[150:], 0.3, 0, jnp.int32(0), HIDE_ID)  # a part of the batch draws what the whole does
  np.testing.assert_array_equal(half, draws[0][150:])
  assert hidden_actions(jnp.ones((2, 2), bool), 0.0, 0, jnp.int32(0)) is None


def test_an_item_loses_the_same_elements_wherever_it_stands():
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 2**63, 500, np.uint64)
  ids[250:] = ids[:250] ^ np.uint64(1 << 40)  # the less significant words are the same
  item, vectors = key_words(np.concatenate([ids, ids[::-1]])), jnp.ones((1000, 64))
  dropped = np.asarray(drop_elements(vectors, item, 0.3, 0, jnp.int32(0)))
  assert set(np.unique(dropped).tolist()) == {0.0, float(np.float32(1 / 0.7))}
  np.testing.assert_array_equal(dropped[:500], dropped[500:][::-1])
  others = [drop_elements(vectors, item, 0.3, seed, jnp.int32(step))[:500] for seed, step in ((0, 1), (1, 0))]
  halves = [dropped[:250], dropped[250:500]]  # two items of one word differ too
  zeros = np.array([x[:250].ravel() == 0 for x in (*halves, *others)], float)
  np.testing.assert_allclose(zeros.mean(axis=1), 0.3, atol=5 * (0.21 / zeros.shape[1]) ** 0.5)
  assert np.abs(np.corrcoef(zeros) - np.eye(4)).max() < 5 / zeros.shape[1] ** 0.5
  within = np.corrcoef(dropped[:500].T == 0) - np.eye(64)  # elements of one item
  assert np.abs(within).max() < 5.5 / 500**0.5


def test_hidden_ids_have_no_gradient_to_their_rows(loss_and_gradients, batch):
  """Every event another item, so that a row belongs to one event: the rows of hidden events get exactly nothing."""
  distinct = {**batch, 'item': key_words(np.arange(USERS * LENGTH, dtype=np.uint64).reshape(USERS, LENGTH))}
  _, grads, rows_GE = loss_and_gradients(distinct)
  hidden = np.asarray(draw(batch_places((USERS, LENGTH)), MODEL.id_mask, 0, jnp.int32(STEP), HIDE_ID))
  row_UL2 = hash_rows(distinct['item'], 2, 60)
  counts = np.bincount(row_UL2[distinct['mask']].reshape(-1), minlength=120)
  moved = np.abs(np.asarray(rows_GE)).max(axis=1)
  alone = lambda chosen: [r for r in row_UL2[chosen & distinct['mask']].reshape(-1) if counts[r] == 1]
  assert len(alone(hidden)) > 5
  assert not moved[alone(hidden)].any()
  assert (moved[alone(~hidden)] > 0).mean() > 0.8
  for name in ('masked_id', 'content_projection', 'gap_embedding', 'action_embedding'):
    assert np.abs(np.asarray(grads['pinfm'][name])).max() > 0, name
  assert np.abs(np.asarray(grads['pinfm']['action_embedding'][-1])).max() > 0  # the candidate's mark is trained
  assert np.abs(np.asarray(grads['action_head']['kernel'])).max() > 0


def test_the_action_loss_is_added_with_its_weight(mesh, params, batch):
  def run(weight):
    task = PretrainTask(MODEL, replace(CONFIG, action_weight=weight, ntl_weight=0, mtl_weight=0, ftl_weight=0), 0)
    vectors = jnp.asarray(np.random.default_rng(1).normal(size=(USERS * LENGTH, 8)), jnp.float32)
    return task.loss(params, vectors, batch, jnp.int32(STEP), jax.random.key(0), None)

  loss, figures = jax.jit(lambda: run(0.7))()
  np.testing.assert_allclose(loss, 0.7 * figures['action'], rtol=1e-6)
  assert figures['action'] > 0.1


def test_draws_follow_the_runs_seed_and_step(loss_and_gradients, batch):
  action = lambda *where: float(loss_and_gradients(batch, *where)[0]['action'])
  assert action(0) == action(0)
  assert len({action(0), action(1), action(0, STEP + 1)}) == 3


@pytest.mark.parametrize('name', ['content', 'time_gap_buckets'])
def test_a_run_is_not_continued_with_other_options(name):
  tower = replace(MODEL.tower, time_gap_buckets=BUCKETS + 1)
  other = replace(MODEL, tower=tower) if name == 'time_gap_buckets' else replace(MODEL, **{name: 0})
  with pytest.raises(UserError, match=rf'model\.\S*{name} is .*, the run that is continued has .*: use the same'):
    check_growth(MODEL, other)
  check_growth(MODEL, MODEL)


def topics_batch(rng, items, content, users=16):
  """Users who stay within their topic: item i belongs to topic i % 2."""
  topic = rng.integers(0, 2, users)
  chosen = np.stack([rng.choice(items[items % 2 == t], LENGTH) for t in topic])
  shape = (users, LENGTH)
  return {
    'item': key_words(chosen.astype(np.uint64)),
    'surface': np.zeros(shape, np.int32),
    'actions': np.ones(shape, np.uint32),
    'mask': np.ones(shape, bool),
    'user': np.broadcast_to(np.arange(users, dtype=np.uint32)[:, None], shape),
    'gap': np.zeros(shape, np.int32),
    'content': content[chosen],
  }, topic


def test_a_new_item_is_ranked_by_its_content(mesh):
  """Two topics, whose items have content near their topic's: after training with hidden ids, items that were never
  seen are ranked above those of the other topic for the right users. Their untrained id vectors alone say nothing."""
  rng = np.random.default_rng(0)
  centre = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
  content = unit_half(centre[np.arange(200) % 2] + 0.3 * rng.normal(size=(200, WIDTH)))
  tables, tower = replace(MODEL.tables, rows=2000, init_scale=0.1), replace(MODEL.tower, layers=1)
  model, update = replace(MODEL, tables=tables, tower=tower), UpdateConfig(learning_rate=3e-3, warmup_steps=2)
  config = replace(CONFIG, steps=60, max_columns=64, mtl_weight=0, ftl_weight=0, action_mask=0, update=update)
  task = PretrainTask(model, config, 0)
  state, step = init_state(task, mesh, 0)(), make_step(task)
  for _ in range(60):
    state, _ = step(state, topics_batch(rng, np.arange(150), content)[0])
  batch, topic = topics_batch(rng, np.arange(150), content, 64)
  new = np.arange(150, 200)

  @jax.jit
  def scores(params, rows_GE, new_content, hidden):
    rows = lambda words: hash_rows(jnp.asarray(words), tables.sub_tables, tables.rows, tables.hash_seed)
    vectors = lambda words: rows_GE[rows(words)].reshape(*words.shape[:-1], -1)
    pinfm, weights, events = PinFM(model), {'params': params['pinfm']}, segment_events(batch)
    history = pinfm.apply(weights, vectors(events.item_UL2), events.content_ULW, method='items')
    h = pinfm.apply(weights, history, events, method='encode')[0][:, -1]
    items = pinfm.apply(weights, vectors(key_words(new.astype(np.uint64))), new_content, hidden, method='items')
    return h @ pinfm.apply(weights, items, method='targets').T

  def share_right(new_content, hidden):
    """How often a new item of the user's topic outranks one of the other topic."""
    found = np.asarray(scores(state.params, state.tables.rows_GE, new_content, np.full(len(new), hidden)))
    own = topic[:, None] == new % 2
    return np.mean([(a[o][:, None] > a[~o][None, :]).mean() for a, o in zip(found, own, strict=True)])

  assert share_right(content[new], True) > 0.95
  assert 0.3 < share_right(np.zeros_like(content[new]), False) < 0.7


def test_events_without_the_new_columns_still_work():
  """What other code builds by position keeps its meaning."""
  assert EventBatch._fields[:6] == ('item_UL2', 'surface_UL', 'actions_UL', 'mask_UL', 'user_UL', 'segment_UL')
  assert EventBatch._fields[6:8] == ('gap_UL', 'content_ULW')
