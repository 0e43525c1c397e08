"""A small random click log in the columns of Globo, for tests."""

from pathlib import Path

import numpy as np
import polars as pl

from pinfm_jax.config import HOUR_MS

START_MS = int(np.datetime64('2017-10-14', 'ms').astype(np.int64))
CONTEXT = ('click_environment', 'click_deviceGroup', 'click_os', 'click_country', 'click_region', 'click_referrer_type')


def random_clicks(users: int = 120, articles: int = 60, hours: int = 48, seed: int = 0) -> pl.DataFrame:
  """Sessions of 2 to 5 clicks; articles appear over time, and a few times are equal."""
  rng = np.random.default_rng(seed)
  born = np.sort(rng.uniform(0, hours * 0.9, articles))
  born[:12] = 0
  rows = []
  for session in range(users * 6):
    user, at = int(rng.integers(users)), rng.uniform(0, hours - 1)
    context = rng.integers(1, 4, len(CONTEXT)).tolist()
    for _ in range(rng.integers(2, 6)):
      alive = np.flatnonzero(born <= at)
      item = int(alive[-1 - int(rng.integers(min(15, len(alive))))])
      time = START_MS + int(at * HOUR_MS) // 1000 * 1000
      rows.append((user, session, START_MS + int(at * HOUR_MS), 3, 1000 + item, time, *context))
      at += rng.exponential(0.05)
      context[-1] = int(rng.integers(1, 4))  # the referrer may change within a session
  names = ['user_id', 'session_id', 'session_start', 'session_size', 'click_article_id', 'click_timestamp', *CONTEXT]
  return pl.DataFrame(rows, schema=names, orient='row').sample(fraction=1, shuffle=True, seed=seed)


def write_clicks(directory: Path, clicks: pl.DataFrame) -> Path:
  """The log as the file that the loader reads."""
  directory.mkdir(parents=True, exist_ok=True)
  clicks.write_parquet(directory / 'clicks.parquet')
  return directory
