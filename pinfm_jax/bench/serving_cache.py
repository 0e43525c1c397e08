"""`pinfm bench serving --parts cache`: requests/s where users' keys and values are kept, against where none is."""

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pinfm_jax.bench import plot
from pinfm_jax.bench.random_bundle import random_bundle, random_documents
from pinfm_jax.bench.results import Figure
from pinfm_jax.bench.timing import Spread, interleave, ratios
from pinfm_jax.config import TowerConfig
from pinfm_jax.serve.batches import Sizes
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.serve.scorer import Scorer

ASKED = 4.0

TOWERS = {
  'quickstart': TowerConfig(layers=2, width=64, heads=4, output_width=64),
  'paper': TowerConfig(layers=12, width=512, heads=8, output_width=256),
}


@dataclass(frozen=True)
class CacheSizes:
  """What is measured.

  Attributes:
    towers: by name; the paper gives no size of its decoder, so that is the one of experiments/pinfm_20b.py.
    users: requests that are scored together, each of another user.
    events: of a history.
    candidates: of a request, for the figures.
    curve: candidates of a request, for the plot.
    rounds: timed rounds.
    curve_rounds: the same for the curve.
  """

  towers: dict[str, TowerConfig] = field(default_factory=lambda: dict(TOWERS))
  users: int = 8
  events: int = 256
  candidates: int = 32
  curve: tuple[int, ...] = (1, 10, 32, 100, 320, 1000)
  rounds: int = 9
  curve_rounds: int = 3


FULL_CACHE = CacheSizes()
QUICK_CACHE = CacheSizes(
  {'quickstart': TowerConfig(layers=1, width=16, heads=2, output_width=16)}, users=2, events=48, candidates=4,
  curve=(1, 4), rounds=2, curve_rounds=1,
)  # fmt: skip


def measure_cache(directory: Path, sizes: CacheSizes = FULL_CACHE) -> list[Figure]:
  """Measures every tower and draws serving_cache.png.

  Args:
    directory: of the plot, and of the bundles that are made.
    sizes: what is measured.

  Returns:
    For each tower: warm over cold requests/s (asked: 4), an appended event over cold, and the curve.
  """
  figures: list[Figure] = []
  curves: dict[str, tuple[tuple[int, ...], list[float]]] = {}
  for name, tower in sizes.towers.items():
    print(f'== cache, {name} tower', flush=True)
    path = random_bundle(directory / f'cache_bundle_{name}', tower, sizes.events)
    bundle = load_bundle(path)
    scorer = Scorer(bundle, Sizes(cache_users=sizes.users))
    figures += _requests(name, scorer, sizes)
    curves[f'{name} tower'] = (sizes.curve, [_speed_up(scorer, sizes, count) for count in sizes.curve])
    del bundle, scorer
    gc.collect()
    shutil.rmtree(path)
  curves['ideal: (L + C) / C'] = (sizes.curve, [(sizes.events + count) / count for count in sizes.curve])
  for name, (counts, values) in curves.items():
    figures += [
      Figure(f'cache/curve/{name}/{count}', f'{name}: warm over cold, {count} candidates', value)
      for count, value in zip(counts, values, strict=True)
    ]
  panel = ('Warm cache over cold', 'candidates of a request', curves)
  plot.lines(directory / 'serving_cache.png', [panel], 'times the requests/s', log_y=True)
  return figures


def cache_notes(sizes: CacheSizes) -> list[str]:
  """What a reader of the figures must know."""
  return [
    f'Cache: {sizes.users} requests of as many users are scored together, from decoded JSON to results; histories of '
    f'{sizes.events} events. Cold: no history was seen before, neither its keys and values nor its JSON. Warm: all '
    'were. Appended: each history has one event more than what is kept. The ideal counts token passes alone: what a '
    'candidate costs besides (its JSON, its features, the ranker) is the same for both and lowers the ratio.'
  ]


def _requests(name: str, scorer: Scorer, sizes: CacheSizes) -> list[Figure]:
  """Cold, warm and appended in turn: each finds what the one before it left."""
  seconds = interleave(_runs(scorer, sizes, sizes.candidates), sizes.rounds)
  texts = {'cold': 'no history seen before', 'warm': 'all histories kept', 'appended': 'one event appended'}
  figures = [
    Figure.of(
      f'cache/{name}/{run}_over_cold',
      f'{name} tower, {sizes.candidates} candidates: requests/s, {texts[run]}, over cold',
      ratios(seconds['cold'], seconds[run]),
      at_least=ASKED if run == 'warm' else None,
    )
    for run in ('warm', 'appended')
  ]
  return figures + [
    Figure.of(
      f'cache/{name}/{run}',
      f'{name} tower, {sizes.candidates} candidates: {text}',
      Spread.of(tuple(sizes.users / s for s in seconds[run])),
      unit='requests/s',
    )
    for run, text in texts.items()
  ]


def _speed_up(scorer: Scorer, sizes: CacheSizes, candidates: int) -> float:
  """Warm over cold at a number of candidates."""
  runs = _runs(scorer, sizes, candidates)
  del runs['appended']
  seconds = interleave(runs, sizes.curve_rounds, warmup=1)
  return ratios(seconds['cold'], seconds['warm']).median


def _runs(scorer: Scorer, sizes: CacheSizes, candidates: int) -> dict[str, Callable[[int], Any]]:
  longer = random_documents(sizes.users, sizes.events, candidates)
  shorter = [document | {'history': document['history'][:-1]} for document in longer]

  def score(documents: list[dict[str, Any]]) -> Any:
    return scorer.results([scorer.parse(document) for document in documents])

  def cold(_: int) -> Any:
    scorer.forget()
    return score(shorter)

  # The cold run leaves what the warm one finds, and the appended one goes on with it.
  return {'cold': cold, 'warm': lambda _: score(shorter), 'appended': lambda _: score(longer)}
