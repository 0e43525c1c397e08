"""`pinfm plan`: arithmetic here, the compile in a process with as many simulated devices as the plan has."""

import os
from collections.abc import Sequence
from typing import Any

from pinfm_jax.errors import UserError
from pinfm_jax.launch import load_experiment
from pinfm_jax.overrides import parse_assignments
from pinfm_jax.plan.chips import Chip, find_chip
from pinfm_jax.plan.report import estimate_table, heading, memory_table, verdict, work_table


def plan(
  launch: str, devices: int, mesh: str | None, platform: str | None, chip: str | None, assignments: Sequence[str]
) -> None:
  """Prints the plan of a launch file's pretraining.

  Raises:
    UserError: unknown settings, chip or platform, a mesh that does not fit the devices, a step that does not compile.
  """
  if devices < 1:
    raise UserError(f'--devices got {devices}; expected at least 1')
  found = find_chip(platform, chip, devices)
  experiment = load_experiment(launch, parse_assignments(assignments) | parse_mesh(mesh))
  # This process only works with shapes, and must not take the memory of a GPU that may be busy training.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  from pinfm_jax.plan.problem import Problem

  print_plan(Problem(experiment, devices), found)


def parse_mesh(text: str | None) -> dict[str, Any]:
  """Overrides of `--mesh d,f,m`."""
  if text is None:
    return {}
  sizes = text.split(',')
  if len(sizes) != 3 or not all(size.strip().isdigit() for size in sizes):
    raise UserError(f"--mesh got '{text}'; expected data,fsdp,model, for example 8,1,1 (0 = what is left)")
  return {f'mesh.{axis}': int(size) for axis, size in zip(('data', 'fsdp', 'model'), sizes, strict=True)}


def print_plan(problem: Any, chip: Chip) -> None:
  """Works the plan out and prints it part by part: arithmetic first, since the compile takes a minute or more."""
  from pinfm_jax.plan.compile import Compiled, compile_step, tpu_topology
  from pinfm_jax.plan.fit import memory, nearest_fit
  from pinfm_jax.plan.memory import parameters
  from pinfm_jax.plan.roofline import estimate
  from pinfm_jax.plan.work import step_bytes, step_flops

  def compile_for_chip(problem: Any) -> Compiled:
    return compile_step(problem, tpu_topology(chip.name, problem.devices) if chip.platform == 'tpu' else None)

  _show(heading(problem, chip, parameters(problem)))
  if chip.platform == 'tpu' and tpu_topology(chip.name, problem.devices) is None:
    _show([f'no compile for TPU: it needs `pip install libtpu` and a slice of {problem.devices} {chip.name} chips; '
           'simulated CPU devices stand in'])  # fmt: skip
  compiled = compile_for_chip(problem)
  needed = memory(problem, compiled)
  flops, moved = step_flops(problem), step_bytes(problem, needed.state, chip)
  _show(memory_table(needed, compiled, chip) + work_table(flops, moved, compiled, problem.devices))
  if chip.flops:
    # What the program repeats on several devices takes time on each of them.
    work = max(flops.one_device(problem.devices), compiled.matmul_flops)
    _show(estimate_table(estimate(problem, work, moved, compiled.sent, chip), flops, problem, chip))
  else:
    _show(['', 'no estimate of time: rates of this machine are not known; name a chip with --chip'])
  fits = needed.total <= chip.usable
  suggestion = None if fits else nearest_fit(problem, chip, compiled, compile_for_chip)
  _show(['', verdict(needed, chip, problem, suggestion)])
  _show([f'(compiled in {compiled.seconds:.0f} s with {compiled.peak / 1e9:.2f} GB of memory; no table was allocated)'])


def _show(lines: list[str]) -> None:
  print('\n'.join(lines), flush=True)
