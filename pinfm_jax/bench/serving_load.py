"""`pinfm bench serving --parts load`: a server process under open-loop load, below and beyond what it can do.

Three processes share the machine's processors: the server, this one, which makes the load, and whatever else runs. The
saturating rate is the most requests/s that are answered, however many are offered; then the load is half of it, where
a server is run, and twice, where it must refuse cleanly.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pinfm_jax.bench import plot
from pinfm_jax.bench.http_load import Answer, Client, closed_loop, open_loop
from pinfm_jax.bench.random_bundle import random_bundle, random_documents
from pinfm_jax.bench.results import Figure
from pinfm_jax.config import TowerConfig

_TOLERANCE = 1e-4  # of a probability: batches of another size are summed in another order
_CALLERS = 64
_REFUSED = (429, 503, 504)


@dataclass(frozen=True)
class LoadSizes:
  """What is measured.

  Attributes:
    tower: the quickstart's.
    users: distinct requests, sent in turn: their keys and values stay cached.
    events: of each history.
    candidates: of each request.
    seconds: of each rate.
    shares: of the saturating rate, for the curve.
    quick: tiny sizes, to see that it works.
  """

  tower: TowerConfig = TowerConfig(layers=2, width=64, heads=4, output_width=64)
  users: int = 128
  events: int = 256
  candidates: int = 32
  seconds: float = 10.0
  shares: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9, 1.25, 2.0)


FULL_LOAD = LoadSizes()
QUICK_LOAD = LoadSizes(
  TowerConfig(layers=1, width=16, heads=2, output_width=16), users=4, events=16, candidates=4, seconds=1.0,
  shares=(0.5, 2.0),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
  """What came of one rate.

  Attributes:
    answered: requests/s that were answered with scores while the load lasted.
    counts: requests by what became of them: scored, refused, lost (no answer), wrong (scores of another).
    p50_ms: latency of those with scores, from when they were due.
    p99_ms: the same.
    refusal_p99_ms: latency of a refusal; NaN without one.
    late_p99_ms: how late requests left; much of a latency means that the generator had too little of the processors.
  """

  answered: float
  counts: dict[str, int]
  p50_ms: float
  p99_ms: float
  refusal_p99_ms: float
  late_p99_ms: float


def measure_load(directory: Path, sizes: LoadSizes = FULL_LOAD) -> list[Figure]:
  """Loads a server, checks every answer, and draws the curve.

  Args:
    directory: of serving_load.png and of the bundle that is served, whose parameters are random.
    sizes: what is measured.

  Returns:
    The figures; `lost` and `wrong` are asked to be none.
  """
  bundle = random_bundle(directory / 'load_bundle', sizes.tower, sizes.events)
  documents = random_documents(sizes.users, sizes.events, sizes.candidates)
  expected = _expected(bundle, documents)
  with _server(bundle) as port:
    capacity, runs = asyncio.run(_measure(port, [_body(document) for document in documents], expected, sizes))
  _draw(directory, capacity, runs)
  return _figures(capacity, runs)


def _expected(bundle: Path, documents: Sequence[dict[str, Any]]) -> list[np.ndarray]:
  from pinfm_jax.serve.scorer import Scorer

  scorer = Scorer.load(bundle)
  return scorer.probabilities([scorer.parse(document) for document in documents])


@contextmanager
def _server(bundle: Path) -> Iterator[int]:
  """`pinfm serve` in a process of its own; yields its port."""
  command = [sys.executable, '-m', 'pinfm_jax.cli', 'serve', str(bundle), '--port', '0', '--name', 'load']
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
  try:
    line = process.stdout.readline()
    if '/v2/models/load' not in line:
      raise RuntimeError(f'{" ".join(command)} did not start; what it said stands above')
    yield int(line.rsplit(':', 1)[1].split('/')[0])
    process.send_signal(signal.SIGTERM)
    if process.wait(60):
      raise RuntimeError(f'the server ended with code {process.returncode}')
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


async def _measure(
  port: int, bodies: list[tuple[bytes, str]], expected: list[np.ndarray], sizes: LoadSizes
) -> tuple[float, dict[float, Run]]:
  """The saturating rate, and a run for each share of it."""
  client = Client('127.0.0.1', port, '/v2/models/load/infer')
  try:
    for at in range(0, len(bodies), _CALLERS):  # keys and values of every user
      await asyncio.gather(*(client.post(*body) for body in bodies[at : at + _CALLERS]))
    await closed_loop(client, bodies, _CALLERS, sizes.seconds / 2)
    answers = await closed_loop(client, bodies, _CALLERS, sizes.seconds / 2)
    rate, capacity = len(answers) / (sizes.seconds / 2), 0.0
    while True:  # more is offered until no more is answered
      run = _run(await open_loop(client, bodies, rate, sizes.seconds / 2), sizes.seconds / 2, expected)
      grown, capacity = run.answered > 1.05 * capacity, max(capacity, run.answered)
      if not grown:
        break
      rate *= 1.5
    if not capacity:
      raise RuntimeError('the server answered nothing while it was measured')
    runs = {}
    for seed, share in enumerate(sizes.shares, 1):
      await asyncio.sleep(0.2)
      answers = await open_loop(client, bodies, share * capacity, sizes.seconds, seed)
      runs[share] = _run(answers, sizes.seconds, expected)
    return capacity, runs
  finally:
    await client.close()


def _run(answers: Sequence[Answer], seconds: float, expected: list[np.ndarray]) -> Run:
  scored = [answer for answer in answers if answer.status == 200]
  refused = [answer for answer in answers if answer.status in _REFUSED]
  right = [answer for answer in scored if _right(answer, expected[answer.body])]
  counts = {
    'scored': len(right),
    'refused': len(refused),
    'wrong': len(scored) - len(right),
    'lost': len(answers) - len(scored) - len(refused),
  }
  p50, p99 = _percentiles(scored)
  in_time = sum(answer.at_s + answer.seconds <= seconds for answer in right)
  late = float(np.percentile([1e3 * answer.late_s for answer in answers], 99))
  return Run(in_time / seconds, counts, p50, p99, _percentiles(refused)[1], late)


def _percentiles(answers: Sequence[Answer]) -> tuple[float, float]:
  if not answers:
    return float('nan'), float('nan')
  return tuple(np.percentile([1e3 * answer.seconds for answer in answers], (50, 99)).tolist())


def _body(document: dict[str, Any]) -> tuple[bytes, str]:
  """A request as a binary tensor, and its headers."""
  text = json.dumps(document).encode()
  tensor = {'name': 'request', 'shape': [1], 'datatype': 'BYTES', 'parameters': {'binary_data_size': len(text) + 4}}
  outputs = [{'name': 'response', 'parameters': {'binary_data': True}}]
  head = json.dumps({'inputs': [tensor], 'outputs': outputs}).encode()
  return head + len(text).to_bytes(4, 'little') + text, f'\r\nInference-Header-Content-Length: {len(head)}'


def _right(answer: Answer, expected_CT: np.ndarray) -> bool:
  result = json.loads(answer.content[int(answer.headers['inference-header-content-length']) + 4 :])
  got = np.array([list(score.values())[1 : 1 + expected_CT.shape[1]] for score in result['scores']])
  return got.shape == expected_CT.shape and bool(np.abs(got - expected_CT).max(initial=0) < _TOLERANCE)


def _figures(capacity: float, runs: dict[float, Run]) -> list[Figure]:
  figures = [Figure('load/capacity', 'saturating rate', capacity, unit='requests/s')]
  for share in (0.5, 2.0):
    run, name, text = runs[share], f'load/{round(100 * share)}', f'at {round(100 * share)} %'
    figures += [
      Figure(f'{name}/p50', f'latency {text}, p50', run.p50_ms, unit='ms'),
      Figure(f'{name}/p99', f'latency {text}, p99', run.p99_ms, unit='ms'),
      Figure(f'{name}/late', f'delay of the generator {text}, p99', run.late_p99_ms, unit='ms'),
      Figure(f'{name}/answered', f'answered {text}', run.answered, unit='requests/s'),
    ]
    for kind in ('scored', 'refused', 'lost', 'wrong'):
      most = 0 if kind in ('lost', 'wrong') else None
      figures.append(Figure(f'{name}/{kind}', f'{kind} {text}', run.counts[kind], unit='requests', at_most=most))
  if runs[2.0].counts['refused']:
    figures.append(
      Figure('load/200/refusal', 'latency of a refusal at 200 %, p99', runs[2.0].refusal_p99_ms, unit='ms')
    )
  return figures


def _draw(directory: Path, capacity: float, runs: dict[float, Run]) -> None:
  x = [share * capacity for share in runs]
  series = {name: (x, [getattr(run, field) for run in runs.values()]) for name, field in
            (('p50', 'p50_ms'), ('p99', 'p99_ms'))}  # fmt: skip
  plot.lines(directory / 'serving_load.png', [('Latency under load', 'requests/s offered', series)], 'ms', log_y=True)
  rates = {'offered': (x, x), 'answered': (x, [run.answered for run in runs.values()])}
  plot.lines(directory / 'serving_load_answered.png', [('Answered', 'requests/s offered', rates)], 'requests/s')
