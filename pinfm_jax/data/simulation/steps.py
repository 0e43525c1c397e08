"""Six hours of a simulated feed: who comes, what is shown, what is done, and what had been counted by then."""

from dataclasses import dataclass

import numpy as np

from pinfm_jax.config import DAY_MS, HOUR_MS
from pinfm_jax.data.simulation.config import SimulatorConfig
from pinfm_jax.data.simulation.world import (
  GroupSampler,
  Items,
  Users,
  action_probabilities,
  sample_rows,
  unit,
)

STEPS_A_DAY = 4
_MINUTE_MS = 60_000
# Sessions keep this distance from a step's ends, so that no event comes before its item and no count of an earlier
# step holds anything later than the request it is a feature of.
_MARGIN_BEFORE_MS, _MARGIN_AFTER_MS = 20 * _MINUTE_MS, 30 * _MINUTE_MS

DENSE_FEATURES = (
  'item_impressions',
  'item_click_rate',
  'item_save_rate',
  'item_hide_rate',
  'user_impressions',
  'user_click_rate',
  'user_save_rate',
  'hour_of_day',
)


@dataclass(frozen=True)
class World:
  """All that does not change over time."""

  config: SimulatorConfig
  items: Items
  users: Users


class Counters:
  """What the platform has counted up to the current step: the plain features of the ranker."""

  def __init__(self, users: int, items: int, actions: int):
    self.item_shown, self.item_actions = np.zeros(items), np.zeros((items, actions))
    self.item_engaged = np.zeros(items)
    self.user_shown, self.user_actions = np.zeros(users), np.zeros((users, actions))

  def add(self, user: np.ndarray, item: np.ndarray, labels: np.ndarray) -> None:
    """Counts one step's impressions; `labels` is [N, A] bool."""
    np.add.at(self.item_shown, item, 1)
    np.add.at(self.user_shown, user, 1)
    np.add.at(self.item_actions, item, labels)
    np.add.at(self.user_actions, user, labels)


def simulate_step(
  world: World, counters: Counters, interests: np.ndarray, step: int, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """The impressions and the events of six hours, as columns."""
  config, items = world.config, world.items
  step_ms = DAY_MS // STEPS_A_DAY
  now = config.start_ms + step * step_ms
  user = np.flatnonzero(rng.random(config.users) < world.users.rate / STEPS_A_DAY)
  start = now + rng.integers(_MARGIN_BEFORE_MS, step_ms - _MARGIN_AFTER_MS, len(user))
  topic = sample_rows(interests[user], rng)
  taste = unit(interests[user]) + config.session_pull * np.eye(config.topics, dtype=np.float32)[topic]
  sessions = {'user': user, 'start': start, 'topic': topic, 'taste': unit(taste), 'interest': interests[user]}
  draw = _CandidateSource(items, counters, config.topics, now)
  shown = _impressions(world, counters, draw, sessions, rng)
  organic = _organic(world, draw, sessions, rng)
  engaged = shown['labels'].any(axis=1)
  # An engagement is logged a moment after its impression.
  delay = rng.integers(800, 9_000, int(engaged.sum()))
  events = {
    name: np.concatenate([shown[name][engaged] + (delay if name == 'timestamp' else 0), organic[name]])
    for name in ('user', 'timestamp', 'item', 'surface')
  }
  events['labels'] = np.concatenate([shown['labels'][engaged], organic['labels']])
  counters.add(shown['user'], shown['item'], shown['labels'])
  positive = events['labels'][:, [a.name != 'hide' for a in config.actions]].any(axis=1)
  np.add.at(counters.item_engaged, events['item'][positive], 1)
  return shown, events


class _CandidateSource:
  """The retrieval of the simulated feed: popular, near to a topic, fresh, or any item that exists."""

  def __init__(self, items: Items, counters: Counters, topics: int, now_ms: int):
    alive = int(np.searchsorted(items.created_at, now_ms))
    age = now_ms - items.created_at[:alive]
    weight = (2.0 + counters.item_engaged[:alive]) ** 0.8 * np.exp(0.5 * items.quality[:alive])
    weight *= 0.1 + np.exp(-age / (6.0 * DAY_MS))
    self._alive, self._by_topic = alive, GroupSampler(items.main_topic[:alive], weight, topics)
    self._popular = GroupSampler(np.zeros(alive, np.int64), weight**1.2, 1)
    self._fresh_first = min(int(np.searchsorted(items.created_at, now_ms - 3 * DAY_MS)), alive - 1)

  def near(self, topic: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An item for each topic, the more popular the likelier."""
    return self._by_topic.draw(topic, rng)

  def request(self, topic: np.ndarray, share_near: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Candidates [Q, C] for topics [Q, C]; `share_near` [Q] of them follow their topic."""
    choice = rng.random(topic.shape)
    kind = (choice[..., None] > np.cumsum(_mixture(share_near), axis=1)[:, None, :]).sum(-1)
    pools = (
      self.near(topic, rng),
      self._popular.draw(np.zeros(topic.shape, np.int64), rng),
      rng.integers(self._fresh_first, self._alive, topic.shape),
      rng.integers(0, self._alive, topic.shape),
    )
    return np.choose(np.minimum(kind, 3), pools)


def _mixture(share_near: np.ndarray) -> np.ndarray:
  """Shares of the four sources: what is not near is 35 % popular, 40 % fresh, 25 % random."""
  return np.concatenate([share_near[:, None], (1 - share_near)[:, None] * np.array([0.35, 0.4, 0.25])], axis=1)


def _impressions(
  world: World, counters: Counters, draw: _CandidateSource, sessions: dict[str, np.ndarray], rng: np.random.Generator
) -> dict[str, np.ndarray]:
  """All requests of the sessions, one row a candidate, with features as counted before this step."""
  config, items = world.config, world.items
  repeat = np.minimum(rng.geometric(0.65, len(sessions['user'])), 3)
  session = np.repeat(np.arange(len(repeat)), repeat)
  order = np.arange(len(session)) - np.repeat(np.cumsum(repeat) - repeat, repeat)
  surface_q = rng.choice(len(config.surfaces), len(session), p=np.asarray(config.surface_share))
  wide = (len(session), config.max_candidates)
  # On the feed the sources follow the long-term interests; on the other surfaces, what the session is about.
  own = np.stack([sample_rows(sessions['interest'][session], rng) for _ in range(wide[1])], axis=1)
  topic = np.where(surface_q[:, None] == 0, own, sessions['topic'][session][:, None])
  candidates = draw.request(topic, np.where(surface_q == 0, 0.3, 0.45), rng)
  length = rng.integers(config.min_candidates, config.max_candidates + 1, len(session))
  keep = (np.arange(wide[1]) < length[:, None]) & _first_occurrence(candidates)
  request, place = np.nonzero(keep)
  item, row = candidates[keep], session[request]
  time = sessions['start'][row] + order[request] * 3 * _MINUTE_MS + place * 1_500
  columns = {'request': request, 'user': sessions['user'][row], 'item': item, 'timestamp': time}
  columns['surface'] = surface_q[request]
  columns['truth'] = _truth(world, sessions['taste'][row], columns)
  columns['labels'] = rng.random(columns['truth'].shape) < columns['truth']
  columns['dense'] = _dense_features(config, counters, columns)
  columns['created_at'] = items.created_at[item]
  return columns


def _organic(
  world: World, draw: _CandidateSource, sessions: dict[str, np.ndarray], rng: np.random.Generator
) -> dict[str, np.ndarray]:
  """What people do in a session outside the requests: mostly on the session's topic, some of it before the first."""
  config = world.config
  session = np.repeat(np.arange(len(sessions['user'])), rng.poisson(config.organic_events, len(sessions['user'])))
  on_topic = rng.random(len(session)) < 0.6
  topic = np.where(on_topic, sessions['topic'][session], sample_rows(sessions['interest'][session], rng))
  columns = {
    'user': sessions['user'][session],
    'item': draw.near(topic, rng),
    'timestamp': sessions['start'][session] + rng.integers(-15 * _MINUTE_MS, 15 * _MINUTE_MS, len(session)),
    'surface': rng.integers(1, len(config.surfaces), len(session)),
  }
  labels = rng.random((len(session), len(config.actions))) < _truth(world, sessions['taste'][session], columns)
  # Nobody is logged for doing nothing: an item that was opened without more is a click.
  names = [a.name for a in config.actions]
  labels[:, names.index('hide')] = False
  labels[~labels.any(axis=1), names.index('click')] = True
  return columns | {'labels': labels}


def _truth(world: World, taste: np.ndarray, columns: dict[str, np.ndarray]) -> np.ndarray:
  """True probabilities [N, A] of the rows' actions."""
  items, item = world.items, columns['item']
  affinity = np.einsum('nk,nk->n', taste, items.topics[item])
  age = columns['timestamp'] - items.created_at[item]
  return action_probabilities(world.config.actions, affinity, items.quality[item], age, columns['surface'])


def _dense_features(config: SimulatorConfig, counters: Counters, columns: dict[str, np.ndarray]) -> np.ndarray:
  """[N, F] float32 in the order of DENSE_FEATURES: counts as they stood when the step began."""
  user, item, names = columns['user'], columns['item'], [a.name for a in config.actions]
  click, save, hide = (names.index(name) for name in ('click', 'save', 'hide'))

  def rate(done, shown, action, prior):
    return (done[:, action] + 20 * prior) / (shown + 20)

  hour = (columns['timestamp'] % DAY_MS) / HOUR_MS
  item_done, item_shown = counters.item_actions[item], counters.item_shown[item]
  user_done, user_shown = counters.user_actions[user], counters.user_shown[user]
  features = [
    item_shown,
    rate(item_done, item_shown, click, 0.15),
    rate(item_done, item_shown, save, 0.05),
    rate(item_done, item_shown, hide, 0.05),
    user_shown,
    rate(user_done, user_shown, click, 0.15),
    rate(user_done, user_shown, save, 0.05),
    hour,
  ]
  return np.stack(features, axis=1).astype(np.float32)


def _first_occurrence(candidates: np.ndarray) -> np.ndarray:
  """[Q, C] bool: the first time an item is drawn for its request."""
  same = candidates[:, :, None] == candidates[:, None, :]
  return ~np.tril(same, k=-1).any(axis=2)
