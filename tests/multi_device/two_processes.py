"""One of several processes that pretrain together; started by test_processes.py.

python two_processes.py DATA OUT PLAN ADDRESS PROCESS PROCESSES: reads the toy run in DATA and does what PLAN names;
process 0 writes OUT/seen.json.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import toy  # noqa: E402
import worker  # noqa: E402

from pinfm_jax.config import MeshConfig  # noqa: E402
from pinfm_jax.errors import UserError  # noqa: E402
from pinfm_jax.stages.context import Run  # noqa: E402
from pinfm_jax.train import loop  # noqa: E402
from pinfm_jax.train.distributed import Launch, on_first, session  # noqa: E402
from pinfm_jax.train.sharding import make_mesh, process_rows  # noqa: E402


def gathered(state) -> dict[str, np.ndarray]:
  """Every array of a state, whole, in every process."""
  arrays = {'params': state.params, 'rows': state.tables.rows_GE, 'accumulator': state.tables.accumulator_G}
  return worker.flat(multihost_utils.process_allgather(arrays, tiled=True))


def train(run: Run, out: Path, seen: dict, name: str, mesh: MeshConfig) -> None:
  """Six steps (or those that are left) on a mesh of all devices; what they saw and gave goes to `seen` and a file."""
  mesh = make_mesh(mesh)
  batches, put = [], loop.put_batch

  def spy(batch, where):
    batches.append(put(batch, where))
    return batches[-1]

  loop.put_batch = spy
  state = worker.train(run, mesh, out / name)
  loop.put_batch = put
  arrays = gathered(state)
  users = [multihost_utils.process_allgather(batch['user'], tiled=True)[:, 0].tolist() for batch in batches]
  if jax.process_index() == 0:
    np.savez(out / f'{name}.npz', **arrays)
    rows = process_rows(mesh, 8).tolist()
    seen[name] = {'losses': worker.losses(out / name), 'users': users, 'rows': rows}
  multihost_utils.sync_global_devices(name)


def refuse() -> None:
  """What a user's mistake does."""
  raise UserError('it did not work')


def main(data: str, out: str, plan: str, address: str, process: int, processes: int) -> None:
  """Does the plan: names of MESHES, or 'fail', 'kill', 'hang'."""
  run, out, seen = Run(toy.EXPERIMENT, Path(data)), Path(out), {}
  launch = Launch('none', address, process, processes, 60, 10, 5 if plan == 'hang' else 200)
  with session(launch if processes > 1 else Launch()):
    for name in plan.split(','):
      if name == 'fail':
        if process == 1:
          raise UserError('the disk of process 1 is full')
        multihost_utils.sync_global_devices('never')
      elif name == 'kill':
        if process == 1:
          os.kill(os.getpid(), signal.SIGKILL)
        multihost_utils.sync_global_devices('never')
      elif name == 'first fails':
        on_first('a thing', refuse)
      elif name == 'hang':
        on_first('a slow thing', lambda: time.sleep(60))
      else:
        data_axis, fsdp, model = (int(x) for x in name.split('_')[-1].split('x'))
        train(run, out, seen, name, MeshConfig(data_axis, fsdp, model))
    if process == 0 and seen:
      loaded = toy.load_arrays(out / name / 'checkpoints')  # process 0 alone, once all have trained
      rows = np.load(out / f'{name}.npz')["['rows']"]
      seen |= {'step': int(loaded['step']), 'same_bytes': bool(np.array_equal(loaded['tables']['rows'], rows))}
      (out / 'seen.json').write_text(json.dumps({'devices': jax.device_count(), **seen}))


if __name__ == '__main__':
  main(*sys.argv[1:5], *(int(x) for x in sys.argv[5:]))
