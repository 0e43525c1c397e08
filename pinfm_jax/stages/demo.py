"""Makes a demo folder (`serve.offline.demo`) of a finished run on the simulated feed."""

import json
import shutil
from pathlib import Path

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.files import complete_directory
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.manifest import MANIFEST, Manifest
from pinfm_jax.serve.offline.demo import BUNDLE, REQUESTS, TRUTH
from pinfm_jax.stages.context import Run

_REQUESTS, _LEAST_EVENTS, _LEAST_CANDIDATES = 12, 12, 8


def make_demo(run: Run, out: Path) -> Path:
  """Copies the run's bundle, and requests of the evaluation split whose true probabilities are known.

  The requests come from different users, spread over the split's time, and have histories and candidates to show.

  Args:
    run: a finished run on the simulated feed.
    out: the folder to make; one that is there is replaced if it is a demo folder.

  Raises:
    UserError: the run has no bundle, no true probabilities, or too few such requests.
  """
  bundle, experiment = run.workdir / 'bundle', run.experiment
  if not (bundle / MANIFEST).is_file():
    raise UserError(f'{run.workdir} has no bundle yet; run all stages first (pinfm run experiments/demo.py)')
  if not experiment.arms:
    raise UserError(f'{run.workdir} has no rankers (arms=()), and a demo scores requests; use `pinfm recommend`')
  length = Manifest.read(bundle).schema.most_events
  rows = _chosen(run, _REQUESTS)
  documents = list(dataset_requests(run.dataset, rows, length))
  with complete_directory(out, overwrite=True, marker=REQUESTS, kind='demo folder') as directory:
    shutil.copytree(bundle, directory / BUNDLE)
    _write(directory / REQUESTS, documents)
    truths = []
    for row, document in zip(rows, documents, strict=True):
      columns = run.dataset.request(int(row)).reference.T.astype(float).round(4).tolist()
      true = dict(zip(run.dataset.info.labels, columns, strict=True))
      labels = experiment.evaluate.utility or true
      truths.append({'request_id': document['request_id'], 'true': {label: true[label] for label in labels}})
    _write(directory / TRUTH, truths)
  return out


def _chosen(run: Run, count: int) -> np.ndarray:
  """Rows of requests, by time, of as many users."""
  split = run.requests(run.experiment.evaluate.split)
  rows, users = [], set()
  candidates = np.unique(split.request_row)
  for row in np.random.default_rng(0).permutation(candidates):
    request = run.dataset.request(int(row))
    if request.reference is None:
      raise UserError(f'{run.data_directory} knows no true probabilities: a demo is made of a simulated feed')
    fits = request.history_end >= _LEAST_EVENTS and len(request) >= _LEAST_CANDIDATES
    if fits and request.user_row not in users:
      rows.append(row)
      users.add(request.user_row)
    if len(rows) == count:
      return np.sort(rows)
  raise UserError(f'{run.workdir} has {len(rows)} requests to show, expected {count}: simulate more users or days')


def _write(path: Path, documents: list[dict]) -> None:
  path.write_text(''.join(json.dumps(document) + '\n' for document in documents), encoding='utf-8')
