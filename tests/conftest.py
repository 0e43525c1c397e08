"""Devices and public data for all tests."""

import os
import tempfile
from pathlib import Path

import pytest

# Before anything imports jax: tests are about numbers, which one CPU device gives everywhere. A test that needs more
# devices starts its own process.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Most of a test's time is compilation, of which code that is not optimised takes a third less. `.ci/run` runs the slow
# tests with XLA's own level, as users have it: XLA_FLAGS=--xla_force_host_platform_device_count=1.
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0')

# Many tests compile the same programs: one cache serves the session and the processes that tests start.
_cache = tempfile.TemporaryDirectory(prefix='pinfm-tests-')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', _cache.name)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')

_NO_DATA = 'PINFM_DATA is not set: point it at a directory that holds the public data sets'


@pytest.fixture(scope='session')
def pinfm_data() -> Path:
  """The directory of the public data sets; the test is skipped where PINFM_DATA is not set."""
  value = os.environ.get('PINFM_DATA')
  if not value:
    pytest.skip(_NO_DATA)
  path = Path(value)
  if not path.is_dir():  # set but wrong is a mistake to see, not a reason to skip
    pytest.fail(f'PINFM_DATA={value} is not a directory')
  return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  for item in items:
    if 'pinfm_data' in getattr(item, 'fixturenames', ()):
      item.add_marker('pinfm_data')


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
  skipped = [r.nodeid for r in terminalreporter.stats.get('skipped', []) if _NO_DATA in str(r.longrepr)]
  if skipped:
    terminalreporter.write_line(f'{len(skipped)} skipped because {_NO_DATA}: {", ".join(skipped)}')


@pytest.fixture(autouse=True, scope='session')
def one_device_mesh():
  """The mesh of one device, under which everything runs that touches tables or shards a batch."""
  import jax

  from pinfm_jax.config import MeshConfig
  from pinfm_jax.train.sharding import make_mesh

  with jax.set_mesh(make_mesh(MeshConfig())) as mesh:
    yield mesh


@pytest.fixture(scope='session')
def toy_run(tmp_path_factory: pytest.TempPathFactory):
  """The toy experiment with its data prepared (see tests/toy.py)."""
  import toy

  from pinfm_jax.stages.context import Run
  from pinfm_jax.stages.prepare import prepare_stage

  run = Run(toy.EXPERIMENT, tmp_path_factory.mktemp('toy'))
  prepare_stage(run)
  return run
