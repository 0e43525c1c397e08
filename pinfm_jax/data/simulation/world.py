"""The hidden side of the simulated feed: items, users, interests that drift, and the probability of each action."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pinfm_jax.config import DAY_MS


@dataclass(frozen=True)
class ActionModel:
  """How likely an action is: sigmoid(bias + affinity * cos + quality * q + freshness * f + surface term).

  Attributes:
    name: the action's name in the logs.
    bias: the logit for an item without affinity, of average quality, old, on the first surface.
    affinity: weight of the cosine between the user's taste and the item's topics, in [0, 1].
    quality: weight of the item's quality, a standard normal.
    freshness: weight of exp(-age / 2 days).
    surfaces: added to the logit on each surface, in the order of the configuration's surfaces; empty: the same on all.
  """

  name: str
  bias: float
  affinity: float
  quality: float
  freshness: float
  surfaces: tuple[float, ...] = ()


DEFAULT_ACTIONS = (
  ActionModel('click', -2.7, 3.2, 0.4, 0.5, (0.0, 0.5, 0.2)),
  ActionModel('closeup', -2.3, 2.6, 0.4, 0.3, (0.0, 0.1, 0.5)),
  ActionModel('save', -4.3, 4.2, 0.5, 0.0, (0.0, 0.3, 0.4)),
  ActionModel('hide', -2.6, -4.5, -0.7, 0.0, (0.0, -1.0, -0.5)),
  ActionModel('share', -5.4, 3.0, 0.8, 0.4, (0.0, 0.0, 0.0)),
)


@dataclass(frozen=True)
class Items:
  """The catalogue, ordered by time of creation.

  Attributes:
    created_at: [I] int64, ms.
    topics: [I, K] float32, unit L2 norm: one main topic and a side topic.
    main_topic: [I] the main topic's number.
    quality: [I] float32, standard normal.
    category: [I] what the platform's classifier says: the main topic, with errors.
    content: [I, D] float32, unit L2 norm: a noisy linear view of `topics`.
  """

  created_at: np.ndarray
  topics: np.ndarray
  main_topic: np.ndarray
  quality: np.ndarray
  category: np.ndarray
  content: np.ndarray


@dataclass(frozen=True)
class Users:
  """The audience at the start of the log.

  Attributes:
    rate: [U] mean sessions a day; log-normal over users.
    interests: [U, K] float32, non-negative, each row sums to 1; four topics a user at the start.
    country: [U] int; tells nothing about interests.
    segment: [U] int, the quartile of the rate.
  """

  rate: np.ndarray
  interests: np.ndarray
  country: np.ndarray
  segment: np.ndarray


def make_items(
  count: int, topics: int, days: int, start_ms: int, content_width: int, content_noise: float, rng: np.random.Generator
) -> Items:
  """A catalogue of which half is older than the log; the rest appears at a steady rate during its `days`."""
  old = count // 2
  ages_ms = np.minimum(rng.exponential(20 * DAY_MS, old), 120 * DAY_MS)
  births_ms = rng.uniform(0, days * DAY_MS, count - old)
  created_at = np.sort(start_ms + np.concatenate([-ages_ms, births_ms]).astype(np.int64))
  popularity = 1.0 / np.arange(1, topics + 1) ** 0.5
  main = rng.choice(topics, count, p=popularity / popularity.sum())
  side = (main + rng.integers(1, topics, count)) % topics
  mixture = np.zeros((count, topics), np.float32)
  mixture[np.arange(count), main] = 1.0
  mixture[np.arange(count), side] = rng.uniform(0.0, 0.6, count)
  mixture = unit(mixture)
  view = rng.normal(size=(topics, content_width)) / np.sqrt(content_width)
  noise = rng.normal(size=(count, content_width)) * content_noise / np.sqrt(content_width)
  category = np.where(rng.random(count) < 0.7, main, rng.integers(0, topics, count))
  quality = rng.normal(size=count).astype(np.float32)
  return Items(created_at, mixture, main, quality, category, unit(mixture @ view + noise))


def make_users(count: int, topics: int, sessions_a_day: float, rng: np.random.Generator) -> Users:
  """An audience with four interests each, of uneven strength, and uneven activity."""
  rate = rng.lognormal(0.0, 0.7, count)
  rate *= sessions_a_day / rate.mean()
  chosen = np.argsort(rng.random((count, topics)), axis=1)[:, :4]
  interests = np.full((count, topics), 0.05 / topics)
  np.put_along_axis(interests, chosen, rng.dirichlet([1.0] * chosen.shape[1], count), axis=1)
  interests = (interests / interests.sum(1, keepdims=True)).astype(np.float32)
  segment = np.searchsorted(np.quantile(rate, [0.25, 0.5, 0.75]), rate)
  return Users(rate, interests, rng.integers(0, 8, count), segment)


def drift(interests_UK: np.ndarray, walk: float, switch: float, rng: np.random.Generator) -> np.ndarray:
  """One day of drift: a multiplicative random walk, and for a few users a strong interest moves to another topic.

  Args:
    interests_UK: rows that sum to 1.
    walk: standard deviation of a log-weight's step.
    switch: the share of users whose strongest interest moves that day.
    rng: source of randomness.

  Returns:
    The next day's interests, rows that sum to 1.
  """
  users, topics = interests_UK.shape
  moved = interests_UK * np.exp(walk * rng.normal(size=interests_UK.shape))
  rows = np.flatnonzero(rng.random(users) < switch)
  strongest, other = moved[rows].argmax(1), rng.integers(0, topics, len(rows))
  moved[rows, strongest], moved[rows, other] = moved[rows, other], moved[rows, strongest]
  return (moved / moved.sum(1, keepdims=True)).astype(np.float32)


def action_probabilities(
  models: Sequence[ActionModel],
  affinity: np.ndarray,
  quality: np.ndarray,
  age_ms: np.ndarray,
  surface: np.ndarray,
) -> np.ndarray:
  """True probability of every action; all arguments broadcast together, the result has one more, last axis."""
  freshness = np.exp(-age_ms / (2.0 * DAY_MS))
  logits = [
    m.bias
    + m.affinity * affinity
    + m.quality * quality
    + m.freshness * freshness
    + (np.asarray(m.surfaces)[surface] if m.surfaces else 0.0)
    for m in models
  ]
  return (1.0 / (1.0 + np.exp(-np.stack(logits, axis=-1)))).astype(np.float32)


def sample_rows(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """One column for each row of [N, K] weights, drawn in proportion to them."""
  edges = np.cumsum(weights, axis=1)
  return (edges < rng.random((len(weights), 1)) * edges[:, -1:]).sum(1).clip(max=weights.shape[1] - 1)


class GroupSampler:
  """Draws items of given groups in proportion to weights: one search in the concatenated cumulative sums."""

  def __init__(self, group: np.ndarray, weight: np.ndarray, groups: int):
    """Args: group: [I] the group of each item; weight: [I] positive weights; groups: how many groups there are."""
    self._order = np.argsort(group, kind='stable')
    self._edges = np.concatenate([[0.0], np.cumsum(weight[self._order])])
    self._first = np.searchsorted(group[self._order], np.arange(groups + 1))

  def draw(self, group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An item for each entry of `group`; an empty group falls back on all items."""
    lo, hi = self._first[group], self._first[group + 1]
    lo, hi = np.where(lo == hi, 0, lo), np.where(lo == hi, len(self._order), hi)
    at = self._edges[lo] + rng.random(group.shape) * (self._edges[hi] - self._edges[lo])
    slot = np.clip(np.searchsorted(self._edges, at, side='right') - 1, lo, hi - 1)
    return self._order[slot]


def unit(rows: np.ndarray) -> np.ndarray:
  """Rows scaled to L2 norm 1, float32."""
  return (rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)).astype(np.float32)
