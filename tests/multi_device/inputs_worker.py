"""Three pretraining steps with every option of the input, on the mesh D x F x M; started by test_inputs_sharded.py.

python inputs_worker.py DATA D F M: reads the toy run in DATA and prints the figures of each step as JSON.
"""

import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import toy  # noqa: E402

from pinfm_jax.config import MeshConfig  # noqa: E402
from pinfm_jax.data.pipeline import Segments, training_batches  # noqa: E402
from pinfm_jax.overrides import apply_overrides  # noqa: E402
from pinfm_jax.stages.context import Run  # noqa: E402
from pinfm_jax.train.pretrain import PretrainTask  # noqa: E402
from pinfm_jax.train.sharding import make_mesh, put_batch  # noqa: E402
from pinfm_jax.train.step import init_state, make_step  # noqa: E402

OPTIONS = {
  'model.tower.time_gap_buckets': 24, 'model.content': True, 'model.id_mask': 0.3, 'pretrain.item_dropout': 0.2,
  'pretrain.action_mask': 0.2,
}  # fmt: skip


def main(data: str, *sizes: str) -> None:
  """Runs the steps."""
  run = Run(apply_overrides(toy.EXPERIMENT, OPTIONS), Path(data))
  mesh = make_mesh(MeshConfig(*map(int, sizes)))
  tower = replace(run.model.tower, layers=1)
  task = PretrainTask(replace(run.model, tower=tower), run.experiment.pretrain, 0, seed=7)
  segments = Segments.before(run.dataset, run.split.pretrain_until, 16, run.tokens)
  with jax.set_mesh(mesh):
    state, step, rows = init_state(task, mesh, 0)(), make_step(task), []
    for batch in islice(training_batches(segments, 8, 0, 0), 3):
      state, figures = step(state, put_batch(batch, mesh))
      rows.append({name: float(value) for name, value in figures.items()})
  print(json.dumps({'devices': jax.device_count(), 'steps': rows}))


if __name__ == '__main__':
  main(*sys.argv[1:])
