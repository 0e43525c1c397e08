"""Simulated activity logs: a feed whose true action probabilities are known, made from a seed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pinfm_jax.data.preparation.config import PrepareConfig
from pinfm_jax.data.simulation.config import SimulatorConfig
from pinfm_jax.data.simulation.steps import DENSE_FEATURES, STEPS_A_DAY, Counters, World, simulate_step
from pinfm_jax.data.simulation.world import drift, make_items, make_users

_ITEM_ID_BASE, _USER_ID_BASE = 500_000_000_000, 10_000

SPARSE_FEATURES = ('user_country', 'user_segment', 'item_category')


@dataclass(frozen=True)
class SimulatedFeed:
  """The files of one simulation.

  Attributes:
    events: Parquet: user_id, timestamp (ms), item_id, surface, actions (list of names). Shown and ignored is no event.
    impressions: Parquet: request_id, user_id, timestamp, surface, item_id, item_created_at, a 0/1 column for each
      action, the plain features, and the true probability of each action in `true_<action>`.
    items: Parquet: item_id, created_at (ms), content (a float32 array).
    config: what they were made from.
  """

  events: Path
  impressions: Path
  items: Path
  config: SimulatorConfig


def simulate(config: SimulatorConfig, directory: str | Path) -> SimulatedFeed:
  """Writes the logs of a simulated feed; the same configuration gives the same logs.

  People's interests (four topics each, of uneven strength) drift from day to day, and a session has a topic of its
  own. Items are born all along. A request shows items that are popular, near to the user, fresh or random; what the
  user then does depends on affinity, quality, age and surface. The plain features are counts known when the request
  was made: none of them tells a user's taste, which only the history shows.

  Args:
    config: size, nature and seed.
    directory: where to write; made if missing.

  Returns:
    The paths.
  """
  rng = np.random.default_rng([config.seed, 0])
  items = make_items(
    config.items, config.topics, config.days, config.start_ms, config.content_width, config.content_noise, rng
  )
  world = World(config, items, make_users(config.users, config.topics, config.sessions_a_day, rng))
  counters = Counters(config.users, config.items, len(config.actions))
  interests, events, impressions = world.users.interests, [], []
  for step in range(config.days * STEPS_A_DAY):
    rng = np.random.default_rng([config.seed, 1, step])
    if step and step % STEPS_A_DAY == 0:
      interests = drift(interests, config.walk, config.switch, rng)
    shown, done = simulate_step(world, counters, interests, step, rng)
    impressions.append(shown)
    events.append(done)
  return _write(world, _concatenate(events), _concatenate(impressions), Path(directory))


def simulated_prepare_config(feed: SimulatedFeed, out: str | Path, **settings: Any) -> PrepareConfig:
  """How to prepare a simulated feed; the true probabilities become the requests' reference.

  Args:
    feed: what `simulate` wrote.
    out: the directory to make.
    **settings: other fields of `PrepareConfig`.
  """
  names = tuple(action.name for action in feed.config.actions)
  return PrepareConfig(
    logs=(feed.events,),
    out=out,
    impressions=(feed.impressions,),
    labels=names,
    dense=DENSE_FEATURES,
    sparse=SPARSE_FEATURES,
    reference_columns={name: f'true_{name}' for name in names},
    items=feed.items,
    actions=names,
    surfaces=feed.config.surfaces,
    time_unit='ms',
    impression_time_unit='ms',
    source=f'simulated feed, seed {feed.config.seed}',
    notes='SIMULATED: no real person or item; the reference holds the true probability of every label.',
    **settings,
  )


def _concatenate(steps: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """One set of columns; request numbers run on over the steps."""
  first = 0
  for columns in steps:
    if 'request' in columns:
      columns['request'] = columns['request'] + first
      first = int(columns['request'].max(initial=first - 1)) + 1
  return {name: np.concatenate([s[name] for s in steps]) for name in steps[0]}


def _write(world: World, events: dict, impressions: dict, directory: Path) -> SimulatedFeed:
  """The three Parquet files."""
  config, items = world.config, world.items
  directory.mkdir(parents=True, exist_ok=True)
  feed = SimulatedFeed(
    directory / 'events.parquet', directory / 'impressions.parquet', directory / 'items.parquet', config
  )
  names = [a.name for a in config.actions]
  event_columns = _common_columns(config, events) | {'actions': _action_lists(names, events['labels'])}
  pl.DataFrame(event_columns).sort('timestamp', maintain_order=True).write_parquet(feed.events)
  user, item = impressions['user'], impressions['item']
  columns = {'request_id': impressions['request']} | _common_columns(config, impressions)
  columns['item_created_at'] = impressions['created_at']
  columns |= {name: impressions['labels'][:, a].astype(np.int8) for a, name in enumerate(names)}
  columns |= {name: impressions['dense'][:, f] for f, name in enumerate(DENSE_FEATURES)}
  columns['user_country'] = pl.Series([f'country_{c}' for c in range(8)]).gather(world.users.country[user])
  columns['user_segment'] = pl.Series(['rare', 'casual', 'regular', 'core']).gather(world.users.segment[user])
  columns['item_category'] = items.category[item]
  columns |= {f'true_{name}': impressions['truth'][:, a] for a, name in enumerate(names)}
  pl.DataFrame(columns).sort('timestamp', 'request_id', maintain_order=True).write_parquet(feed.impressions)
  catalogue = {'item_id': np.arange(config.items) + _ITEM_ID_BASE, 'created_at': items.created_at}
  catalogue['content'] = pl.Series(items.content, dtype=pl.Array(pl.Float32, config.content_width))
  pl.DataFrame(catalogue).write_parquet(feed.items)
  return feed


def _common_columns(config: SimulatorConfig, columns: dict[str, np.ndarray]) -> dict:
  return {
    'user_id': columns['user'] + _USER_ID_BASE,
    'timestamp': columns['timestamp'],
    'item_id': columns['item'] + _ITEM_ID_BASE,
    'surface': pl.Series(list(config.surfaces)).gather(columns['surface']),
  }


def _action_lists(names: list[str], labels: np.ndarray) -> pl.Series:
  """[N, A] bool as a column of lists of names, built from the few distinct sets."""
  code, inverse = np.unique(labels @ (1 << np.arange(len(names))), return_inverse=True)
  sets = [[name for a, name in enumerate(names) if c >> a & 1] for c in code.tolist()]
  return pl.Series('actions', sets, dtype=pl.List(pl.String)).gather(inverse)
