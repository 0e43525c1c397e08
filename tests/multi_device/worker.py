"""Pretrains on meshes of all devices and tells what came out; started by test_sharded.py with 8 fake devices.

python worker.py DATA OUT NAME...: reads the toy run in DATA; OUT/NAME holds a mesh's run, OUT/result.json what was
seen.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import toy  # noqa: E402

from pinfm_jax.config import MeshConfig  # noqa: E402
from pinfm_jax.stages.context import Run  # noqa: E402
from pinfm_jax.train.pretrain import pretrain  # noqa: E402
from pinfm_jax.train.sharding import make_mesh  # noqa: E402

MESHES = {
  'data8': MeshConfig(data=8),
  'data2_fsdp2_model2': MeshConfig(data=2, fsdp=2, model=2),
  'fsdp8': MeshConfig(data=1, fsdp=8),
  'model4_data2': MeshConfig(data=2, model=4),
}
ROWS = 501  # 2 sub-tables of 501 rows do not divide over 8 devices


def losses(directory: Path) -> list[float]:
  """The loss of each step."""
  return [json.loads(line)['loss'] for line in (directory / 'metrics.jsonl').read_text().splitlines()]


def train(run: Run, mesh: jax.sharding.Mesh, directory: Path):
  """The toy pretraining on a mesh: 6 steps, checkpoints after 3 and 6."""
  model = replace(run.model, tables=replace(run.model.tables, rows=ROWS))
  return pretrain(run.dataset, run.split.pretrain_until, model, run.experiment.pretrain, mesh, directory, 0)


def flat(tree) -> dict[str, np.ndarray]:
  """Parameters by path."""
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def main(data: str, out: str, *names: str) -> None:
  """Runs the named meshes."""
  run, out, seen = Run(toy.EXPERIMENT, Path(data)), Path(out), {'devices': jax.device_count()}
  for name in names:
    mesh = make_mesh(MESHES[name])
    state = train(run, mesh, out / name)
    np.savez(
      out / f'{name}.npz', **flat(state.params), rows=state.tables.rows_GE, accumulator=state.tables.accumulator_G
    )
    sharded = [x for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
    moments = (state.params, state.opt_state.mu, state.opt_state.nu)
    shards = [x.addressable_shards for x in (state.tables.rows_GE, state.tables.accumulator_G)]
    seen[name] = {
      'mesh': dict(mesh.shape),
      'losses': losses(out / name),
      'rows': state.tables.rows_GE.shape,
      'row_shards': [shard.data.shape for shard in shards[0]],
      'accumulator_shards': [shard.data.shape for shard in shards[1]],
      'first_rows': sorted(shard.index[0].start or 0 for shard in shards[0]),
      'sharded_parameters': len(sharded),
      'moments_alike': all(
        a.sharding == b.sharding for a, *rest in zip(*map(jax.tree.leaves, moments), strict=True) for b in rest
      ),
    }
  (out / 'result.json').write_text(json.dumps(seen))


if __name__ == '__main__':
  main(*sys.argv[1:])
