"""Compiles the real pretraining step ahead of time for many devices, in a process of its own.

The number of simulated devices is read once, when JAX's CPU backend starts (XLA_FLAGS), so a process that has looked
at its devices cannot have more of them. `compile_step` therefore starts `python -m pinfm_jax.plan.compile` with the
flag set, hands it the experiment as JSON and reads the figures back; one process serves one number of devices.
"""

import contextlib
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from pinfm_jax.config import Experiment
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import from_dict, to_dict
from pinfm_jax.plan.hlo import count_program
from pinfm_jax.plan.problem import Problem, abstract_batch, abstract_state
from pinfm_jax.train.sharding import AXES
from pinfm_jax.train.step import make_step

# Slices by number of chips, as Google Cloud offers them: a torus in two dimensions or in three.
_TORUS_2D = {4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
_TORUS_3D = {
  4: '2x2x1', 8: '2x2x2', 16: '2x2x4', 32: '2x4x4', 64: '4x4x4', 128: '4x4x8', 256: '4x8x8', 512: '8x8x8',
}  # fmt: skip
# Machine code is never run, so none of its optimisations are needed; memory and collectives are settled before it.
_FLAGS = ('--xla_backend_optimization_level=0', '--xla_llvm_disable_expensive_passes=true')
_TOPOLOGIES = {'v4': _TORUS_3D, 'v5p': _TORUS_3D, 'v5e': _TORUS_2D, 'v6e': _TORUS_2D}


@dataclass(frozen=True)
class Compiled:
  """Figures of one device's program.

  Attributes:
    devices: what it was compiled for, in words.
    arguments: bytes of state and batch.
    temporaries: bytes of activations and other temporaries.
    not_in_place: bytes of outputs that take none of the arguments' memory.
    cost_flops: XLA's count, which takes a loop's body once; 0 = none given.
    cost_bytes: XLA's count of memory traffic, likewise; whole operands of gathers may be in it.
    matmul_flops: of all matmuls, loops multiplied out; 0 on TPU, whose programs have no such instruction.
    traffic: kind of collective -> (calls, payload, sent).
    open_loops: loops of unknown length, counted once.
    seconds: of tracing and compiling.
    peak: bytes of memory that this took, the process included.
  """

  devices: str
  arguments: int
  temporaries: int
  not_in_place: int
  cost_flops: float
  cost_bytes: float
  matmul_flops: float
  traffic: dict[str, tuple[int, float, float]]
  open_loops: int
  seconds: float
  peak: int

  @property
  def sent(self) -> float:
    """Bytes that one device sends a step."""
    return sum(sent for _, _, sent in self.traffic.values())


def tpu_topology(chip: str, devices: int) -> str | None:
  """Name of the slice to compile for; None where libtpu is missing or there is no slice of this size."""
  if importlib.util.find_spec('libtpu') is None or devices not in _TOPOLOGIES.get(chip, {}):
    return None
  return f'{chip}:{_TOPOLOGIES[chip][devices]}'


def compile_step(problem: Problem, topology: str | None = None) -> Compiled:
  """Compiles in a fresh process.

  Args:
    problem: what is compiled.
    topology: of a TPU slice; None = simulated CPU devices.

  Raises:
    UserError: it does not compile.
  """
  job = {'experiment': to_dict(problem.experiment), 'devices': problem.devices, 'topology': topology}
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  flags = [flag for flag in environment.get('XLA_FLAGS', '').split() if 'host_platform_device_count' not in flag]
  environment['XLA_FLAGS'] = ' '.join([*flags, *_FLAGS, f'--xla_force_host_platform_device_count={problem.devices}'])
  environment['PYTHONPATH'] = os.pathsep.join(
    [str(Path(__file__).resolve().parents[2]), *filter(None, [environment.get('PYTHONPATH')])]
  )
  if topology:
    # No TPU is used: libtpu must not wait for the cloud's metadata server, nor refuse to be loaded by two processes.
    for name in ('TPU_SKIP_MDS_QUERY', 'ALLOW_MULTIPLE_LIBTPU_LOAD'):
      environment.setdefault(name, '1')
  command = [sys.executable, '-m', 'pinfm_jax.plan.compile']
  done = subprocess.run(command, input=json.dumps(job), env=environment, capture_output=True, text=True)
  if done.returncode:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    raise UserError(
      f'the step does not compile for {problem.devices} devices: {lines[-1] if lines else "no message"}; '
      'try fewer devices, or run `pinfm run` with the same settings on a small mesh to see more'
    )
  return Compiled(**json.loads(done.stdout.splitlines()[-1]))


def compile_here(problem: Problem, topology: str | None = None) -> Compiled:
  """Compiles in this process, which has the devices (or libtpu); allocates no array."""
  begin = time.monotonic()
  mesh, words = _mesh(problem, topology)
  with _context(mesh, topology):
    traced = make_step(problem.task, problem.layout).trace(abstract_state(problem, mesh), abstract_batch(problem, mesh))
    lowered = traced.lower(lowering_platforms=('tpu',)) if topology else traced.lower()
    compiled = lowered.compile()
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  counts = count_program(compiled.as_text())
  return Compiled(
    devices=words,
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    not_in_place=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    cost_flops=cost.get('flops', 0.0),
    cost_bytes=cost.get('bytes accessed', 0.0),
    matmul_flops=counts.matmul_flops,
    traffic={kind: (t.calls, t.payload, t.sent) for kind, t in counts.traffic.items()},
    open_loops=counts.open_loops,
    seconds=time.monotonic() - begin,
    peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  )


def _mesh(problem: Problem, topology: str | None) -> tuple[Mesh, str]:
  if topology is None:
    devices, words = jax.devices(), f'{problem.devices} simulated CPU device{"s" * (problem.devices > 1)}'
  else:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    words = f'{problem.devices} TPU chips ({topology}, by libtpu)'
  if len(devices) != math.prod(problem.shape):
    raise UserError(f'got {len(devices)} devices for a mesh of {problem.shape}; start this through `pinfm plan`')
  return Mesh(np.array(devices).reshape(problem.shape), AXES, axis_types=(AxisType.Auto,) * 3), words


@contextlib.contextmanager
def _context(mesh: Mesh, topology: str | None) -> Iterator[None]:
  """`jax.set_mesh`, or for devices that do not exist the abstract mesh alone."""
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if topology else jax.set_mesh(mesh):
    yield


def main(job: dict[str, Any]) -> None:
  """Compiles a job and prints its figures as one line of JSON."""
  problem = Problem(from_dict(Experiment, job['experiment']), job['devices'])
  print(json.dumps(asdict(compile_here(problem, job['topology']))))


if __name__ == '__main__':
  main(json.load(sys.stdin))
