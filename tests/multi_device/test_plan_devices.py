"""Plans against what 8 fake devices really hold and exchange, and the command from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import plan_worker
import pytest
import toy
from jax.sharding import AbstractMesh

from pinfm_jax.cli import main
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.plan.compile import compile_step
from pinfm_jax.plan.memory import batch_bytes, state_bytes
from pinfm_jax.plan.problem import Problem
from pinfm_jax.plan.work import step_flops

ROOT = Path(__file__).resolve().parent.parent.parent
MESHES = ('8,1,1', '2,2,2', '1,8,1')


@pytest.fixture(autouse=True)
def no_mesh(one_device_mesh):
  """A plan chooses its own mesh, as the command does."""
  with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
    yield


@pytest.fixture(scope='module')
def seen():
  flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-W', 'error', plan_worker.__file__, *MESHES]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
def test_every_device_holds_what_the_arithmetic_says(seen, mesh):
  expected, held = seen['meshes'][mesh]
  assert held == [expected] * 8


@pytest.mark.slow
def test_collectives_of_a_known_program_are_exact(seen):
  size = 4 * plan_worker.SIZE
  assert seen['program'] == {
    'all-reduce': [plan_worker.LOOP, plan_worker.LOOP * size, plan_worker.LOOP * size * 2 * 7 / 8],
    'all-gather': [1, size, 3 * size],
    'reduce-scatter': [1, 4 * size, 2 * size],
    'all-to-all': [1, size, size * 3 / 4],
    'collective-permute': [1, size, size],
  }


@pytest.mark.slow
def test_the_compiled_step_takes_the_arguments_that_the_arithmetic_says_and_allocates_no_table():
  """The paper's tables with a toy tower: 164 GB of float32 rows and accumulators, compiled in well under 3 GB."""
  tables = {'model.tables.sub_tables': 8, 'model.tables.rows': 80_000_000, 'model.tables.width': 32}
  problem = Problem(apply_overrides(toy.EXPERIMENT, tables), 8)
  compiled, state = compile_step(problem), state_bytes(problem)
  assert state.tables == 80_000_000 * 32 * 4
  assert compiled.arguments == state.total + batch_bytes(problem)
  assert compiled.temporaries < 1e8
  assert compiled.not_in_place < 1e5
  assert compiled.peak < 3e9
  assert 0 < compiled.sent < 1e8
  assert compiled.traffic['all-to-all'][2] > 0
  flops = step_flops(problem)
  assert compiled.matmul_flops == pytest.approx((flops.model + flops.recomputed) / 8, rel=0.5)


@pytest.mark.slow
def test_a_step_with_every_option_takes_the_columns_that_the_plan_makes():
  options = {
    'pretrain.pack': True, 'pretrain.log_q': 'sketch', 'pretrain.sketch_width': 1024, 'pretrain.uniform_negatives': 16,
    'pretrain.action_mask': 0.2, 'model.content': True, 'model.id_mask': 0.1, 'model.tower.time_gap_buckets': 8,
    'model.tower.remat': 'full',
  }  # fmt: skip
  problem = Problem(apply_overrides(toy.EXPERIMENT, options), 2)
  assert compile_step(problem).arguments == state_bytes(problem).total + batch_bytes(problem)


@pytest.mark.slow
def test_the_command_prints_every_part(tmp_path, capsys):
  launch = tmp_path / 'launch.py'
  launch.write_text('from toy import EXPERIMENT as experiment\n')
  assert main(['plan', str(launch), '--devices', '2', '--mesh', '1,2,1', '--chip', 'h200']) == 0
  text = capsys.readouterr().out
  for part in ('tables', 'accumulators', 'tower parameters', 'optimizer moments', 'batch inputs', 'temporaries'):
    assert f'  {part}' in text or part in text
  for part in ('2 x H200', 'compiled for 2 simulated CPU devices', 'all-to-all', 'estimate', 'tokens/s', '\nfits: '):
    assert part in text
