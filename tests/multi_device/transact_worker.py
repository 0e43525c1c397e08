"""Three fine-tuning steps of a ranker with TransAct, on the mesh D x F x M; started by test_transact_sharded.py.

python transact_worker.py DATA D F M: reads the toy run in DATA and prints the figures of each step as JSON.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import toy  # noqa: E402

from pinfm_jax.config import Arm, MeshConfig  # noqa: E402
from pinfm_jax.data.pipeline import training_batches  # noqa: E402
from pinfm_jax.stages.context import Run  # noqa: E402
from pinfm_jax.train.finetune import dense_stats  # noqa: E402
from pinfm_jax.train.sharding import make_mesh, put_batch  # noqa: E402
from pinfm_jax.train.step import init_state, make_step  # noqa: E402

TRANSACT = {'ranker.transact.length': 6, 'ranker.transact.width': 4, 'ranker.transact.outputs': 2}
OPTIONS = {**TRANSACT, 'ranker.transact.item_buckets': 99, 'ranker.transact.mask_hours': 30}


def main(data: str, *sizes: str) -> None:
  """Runs the steps."""
  run, mesh = Run(toy.EXPERIMENT, Path(data)).of_arm(Arm('TransAct', OPTIONS)), make_mesh(MeshConfig(*map(int, sizes)))
  task, requests = run.task(3), run.requests('finetune')
  with jax.set_mesh(mesh):
    state, step, rows = init_state(task, mesh, 0, dense_stats(requests, 50))(), make_step(task), []
    for batch in islice(training_batches(requests, 8, 0, 0), 3):
      state, figures = step(state, put_batch(batch, mesh))
      rows.append({name: float(value) for name, value in figures.items()})
  print(json.dumps({'devices': jax.device_count(), 'steps': rows}))


if __name__ == '__main__':
  main(*sys.argv[1:])
