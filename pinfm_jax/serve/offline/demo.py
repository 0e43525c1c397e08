"""`pinfm demo`: a small bundle of the embedded feed scores example requests, beside the probabilities that are true.

A demo folder is what a release's wheel has in pinfm_jax/demo:

  bundle/         a bundle of the simulated feed
  requests.jsonl  example requests, as `pinfm score` takes them
  truth.jsonl     {"request_id", "true": {label: [probability of each candidate]}}: the simulator knows them
"""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import pinfm_jax
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.tables import Table
from pinfm_jax.serve.scorer import Scorer

BUNDLE, REQUESTS, TRUTH = 'bundle', 'requests.jsonl', 'truth.jsonl'
PACKAGED = Path(pinfm_jax.__file__).parent / 'demo'


def demo_folder(given: str | Path | None = None) -> Path:
  """The demo folder that was given, or that came with this installation.

  Raises:
    UserError: there is none; the message says how to get one.
  """
  folder = PACKAGED if given is None else Path(given)
  missing = [name for name in (BUNDLE, REQUESTS, TRUTH) if not (folder / name).exists()]
  if not missing:
    return folder
  if given is None:
    raise UserError(
      'this installation has no demo bundle (the wheel of a release has one); unpack the demo of a release and give '
      '--folder DIR, or make it: pinfm run experiments/demo.py, then pinfm demo --run runs/demo'
    )
  raise UserError(
    f'{folder} is no demo folder: it has no {missing[0]}; make one with pinfm demo --run WORKDIR --save DIR'
  )


def demo(folder: Path, requests: int = 3, top: int = 5) -> str:
  """Scores the folder's requests; returns tables of some of them, best candidates first.

  Args:
    folder: a demo folder.
    requests: how many are shown.
    top: candidates shown of each.

  Raises:
    UserError: the bundle is damaged or cannot be run.
  """
  documents, truths = (_lines(folder / name) for name in (REQUESTS, TRUTH))
  begin = time.monotonic()
  scorer = Scorer.load(folder / BUNDLE)
  opened = time.monotonic()
  results = list(scorer.score(documents))
  ended = time.monotonic()
  utility = scorer.bundle.manifest.utility
  shown = zip(documents[:requests], results, truths, strict=False)
  tables = [_table(document, result, truth['true'], utility, top) for document, result, truth in shown]
  candidates = sum(len(document['candidates']) for document in documents)
  return '\n'.join([
    *(table.text() for table in tables),
    'Each cell: predicted probability | true one. The feed is simulated, so the truth is known.',
    f'{len(documents)} requests, {candidates} candidates scored in {ended - begin:.1f} s, of which opening the bundle '
    f'{opened - begin:.1f} s; {_agreement(results, truths, utility)}.',
    f'What this model is: {folder / BUNDLE / "MODEL_CARD.md"}',
    f'Score the requests yourself: pinfm score {folder / BUNDLE} {folder / REQUESTS} --out scores.jsonl',
  ])  # fmt: skip


def _table(
  document: Mapping[str, Any],
  result: Mapping[str, Any],
  true: Mapping[str, list[float]],
  utility: Mapping[str, float],
  top: int,
) -> Table:
  """One request: its best candidates by predicted utility, and where each stands by the true one."""
  scores, wanted = result['scores'], _utility(true, utility)
  order = np.argsort([-score['utility'] for score in scores], kind='stable')
  place = np.empty(len(scores), int)
  place[np.argsort(-wanted, kind='stable')] = np.arange(1, len(scores) + 1)
  rows = [
    (str(scores[c]['item_id']), *(f'{scores[c][label]:.2f} | {true[label][c]:.2f}' for label in utility),
     f'{scores[c]["utility"]:+.3f}', f'{place[c]} of {len(scores)}')
    for c in order[:top]
  ]  # fmt: skip
  events = document['history']
  last = ', '.join(f'{"+".join(e["actions"]) or "shown"} {e["item_id"]}' for e in events[-3:])
  title = (
    f'Request {document["request_id"]}: {len(scores)} candidates, a history of {document["history_events"]} events'
  )
  header = ('item', *utility, 'utility', 'place by the truth')
  return Table(title + (f', the last: {last}' if last else ''), header, tuple(rows))


def _agreement(
  results: Iterable[Mapping[str, Any]], truths: Iterable[Mapping[str, Any]], utility: Mapping[str, float]
) -> str:
  """How often a better candidate stands first: pairs of a request that predicted and true utility order alike."""
  alike = total = 0.0
  for result, truth in zip(results, truths, strict=True):
    ours, wanted = np.array([s['utility'] for s in result['scores']]), _utility(truth['true'], utility)
    signs = np.sign(ours[:, None] - ours) * np.sign(wanted[:, None] - wanted)
    alike, total = alike + np.sum(signs > 0), total + np.sum(signs != 0)
  return f'{100 * alike / max(total, 1):.0f} % of the pairs of a request are in the true order (chance: 50 %)'


def _utility(true: Mapping[str, list[float]], utility: Mapping[str, float]) -> np.ndarray:
  return sum(weight * np.array(true[label]) for label, weight in utility.items())


def _lines(path: Path) -> list[Any]:
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
