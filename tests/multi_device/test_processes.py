"""Several processes with Gloo on loopback: they train what one process trains, and a failure ends all of them."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import worker  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TIMEOUT_S = 900  # of a launch: what hangs fails

# Two processes add the same partial sums as two devices of one process, but Gloo may add them in another order. See
# test_sharded.py for why single elements may differ by what Adam moves them while their mean and the losses do not.
LOSS_RTOL = 2e-5
ELEMENT_ATOL = 2 * 6 * 3e-3
MEAN_ATOL = 2e-5


@dataclass(frozen=True)
class Ended:
  """How the processes of a launch ended."""

  codes: tuple[int, ...]
  errors: tuple[str, ...]
  out: Path

  @property
  def seen(self) -> dict:
    """What process 0 wrote."""
    return json.loads((self.out / 'seen.json').read_text())

  def arrays(self, name: str) -> dict[str, np.ndarray]:
    """The state at the end of a run."""
    return dict(np.load(self.out / f'{name}.npz'))


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def _launch(data: Path, out: Path, plan: str, processes: int, devices: int, timeout: int = TIMEOUT_S) -> Ended:
  address = f'127.0.0.1:{_free_port()}'
  script = ['-W', 'error', str(HERE / 'two_processes.py'), str(data), str(out), plan, address]
  return _start([[*script, str(process), str(processes)] for process in range(processes)], out, devices, timeout)


def _start(commands: list[list[str]], out: Path, devices: int, timeout: int) -> Ended:
  """Starts a Python process a command and waits for all of them."""
  out.mkdir(exist_ok=True)
  flags = f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'
  environment = {
    **os.environ,
    'XLA_FLAGS': flags,
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}',
  }
  started = []
  try:
    for process, command in enumerate(commands):
      with open(out / f'errors{process}', 'w') as log:
        started.append(subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log))
    codes = tuple(child.wait(timeout) for child in started)
  finally:
    for child in started:
      child.kill()
      child.wait()
  errors = tuple((out / f'errors{process}').read_text() for process in range(len(commands)))
  return Ended(codes, errors, out)


def _good(ended: Ended) -> Ended:
  assert set(ended.codes) == {0}, ended.errors
  return ended


def _cut(source: Path, target: Path) -> None:
  """The run as it stood after its third step."""
  shutil.copytree(source, target)
  shutil.rmtree(target / 'checkpoints' / '6')


@pytest.fixture(scope='module')
def one(toy_run, tmp_path_factory):
  """One process with two devices."""
  return _good(_launch(toy_run.workdir, tmp_path_factory.mktemp('one'), 'data_2x1x1,model_1x1x2', 1, 2))


@pytest.fixture(scope='module')
def two(toy_run, tmp_path_factory, one):
  """Two processes with a device each; the last run continues what one process began."""
  out = tmp_path_factory.mktemp('two')
  _cut(one.out / 'data_2x1x1', out / 'continued_2x1x1')
  return _good(_launch(toy_run.workdir, out, 'data_2x1x1,model_1x1x2,continued_2x1x1', 2, 1))


@pytest.fixture(scope='module')
def four(toy_run, tmp_path_factory, two):
  """One process with four devices; the second run continues what two processes began."""
  out = tmp_path_factory.mktemp('four')
  _cut(two.out / 'data_2x1x1', out / 'continued_4x1x1')
  return _good(_launch(toy_run.workdir, out, 'mixed_2x1x2,continued_4x1x1', 1, 4))


def _same_state(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_allclose(b[name], value, atol=ELEMENT_ATOL, rtol=1e-3, err_msg=name)
  assert np.concatenate([np.abs(a[name] - b[name]).ravel() for name in a]).mean() < MEAN_ATOL


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'rows'), [('data_2x1x1', [0, 1, 2, 3]), ('model_1x1x2', list(range(8)))])
def test_two_processes_train_what_one_trains(one, two, name, rows):
  assert one.seen['devices'] == two.seen['devices'] == 2
  a, b = one.seen[name], two.seen[name]
  assert a['users'] == b['users']  # the same data, in the same order
  assert b['rows'] == rows  # along the model axis both processes supply the same rows
  np.testing.assert_allclose(b['losses'], a['losses'], rtol=LOSS_RTOL)
  _same_state(one.arrays(name), two.arrays(name))
  assert two.seen['step'] == 6
  assert two.seen['same_bytes']  # what Orbax wrote from two processes is what they hold


@pytest.mark.slow
def test_two_processes_with_two_devices_each_train_what_one_with_four_trains(toy_run, four, tmp_path):
  found = _good(_launch(toy_run.workdir, tmp_path, 'mixed_2x1x2', 2, 2))
  a, b = four.seen['mixed_2x1x2'], found.seen['mixed_2x1x2']
  assert a['users'] == b['users']
  np.testing.assert_allclose(b['losses'], a['losses'], rtol=LOSS_RTOL)
  _same_state(four.arrays('mixed_2x1x2'), found.arrays('mixed_2x1x2'))


@pytest.mark.slow
def test_a_checkpoint_of_one_process_continues_in_two(one, two):
  whole, found = one.seen['data_2x1x1'], two.seen['continued_2x1x1']
  assert found['users'] == whole['users'][3:]
  assert found['losses'][:3] == whole['losses'][:3]
  np.testing.assert_allclose(found['losses'][3:], whole['losses'][3:], rtol=LOSS_RTOL)


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_continues_in_one_with_four_devices(two, four):
  whole, found = two.seen['data_2x1x1'], four.seen['continued_4x1x1']
  assert found['users'] == whole['users'][3:]
  np.testing.assert_allclose(found['losses'], whole['losses'], rtol=LOSS_RTOL)


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_continues_in_one_with_one_device(toy_run, two, tmp_path):
  _cut(two.out / 'data_2x1x1', tmp_path / 'here')
  state = worker.train(toy_run, toy_run.mesh, tmp_path / 'here')
  assert int(state.step) == 6
  np.testing.assert_allclose(worker.losses(tmp_path / 'here'), two.seen['data_2x1x1']['losses'], rtol=LOSS_RTOL)


@pytest.mark.parametrize(
  ('plan', 'codes', 'first', 'second'),
  [
    (
      'fail', (2, 2),
      'process 0: process 1 failed: the disk of process 1 is full; this one stops too',
      'process 1: the disk of process 1 is full',
    ),
    (
      'first fails', (2, 2),
      'process 0: it did not work',
      'process 1: process 0 failed (a thing): it did not work',
    ),
    (
      'hang', (2, 2),
      'process 0: process 1 failed: process 1 waited 5 s for process 0 (a slow thing)',
      'process 1: process 1 waited 5 s for process 0 (a slow thing); look at',
    ),
  ],
  ids=['a process fails', 'the first fails', 'the first hangs'],
)  # fmt: skip
def test_a_failure_ends_every_process_with_its_reason(tmp_path, plan, codes, first, second):
  ended = _launch(tmp_path, tmp_path / 'out', plan, 2, 1, timeout=120)
  assert ended.codes == codes, ended.errors
  for text, expected in zip(ended.errors, (first, second), strict=True):
    assert f'pinfm: error: {expected}' in text
    assert 'Traceback' not in text


def test_a_killed_process_ends_the_others(tmp_path):
  ended = _launch(tmp_path, tmp_path / 'out', 'kill', 2, 1, timeout=120)
  assert ended.codes[1] == -9
  assert ended.codes[0] != 0


@pytest.mark.slow
def test_a_whole_run_in_two_processes_gives_the_results_of_one(tmp_path):
  launch = tmp_path / 'launch.py'
  launch.write_text('from toy import EXPERIMENT as experiment\n')
  code = 'import sys; from pinfm_jax.cli import main; sys.exit(main(sys.argv[1:]))'
  settings = ['--set', 'pretrain.eval_every=3', 'pretrain.eval_share=0.3', 'pretrain.keep_best=1']
  command = lambda name: ['-c', code, 'run', str(launch), '--workdir', str(tmp_path / name), *settings]
  address = ['--coordinator', f'127.0.0.1:{_free_port()}', '--num-processes', '2', '--process-id']
  one = _good(_start([command('one')], tmp_path / 'out1', 2, TIMEOUT_S))
  two = _good(_start([[*command('two'), *address, str(p)] for p in range(2)], tmp_path / 'out2', 1, TIMEOUT_S))
  for text in (one.errors[0], two.errors[0]):
    assert [line for line in text.splitlines() if re.fullmatch(r'== \w+', line)] == [
      f'== {name}' for name in ('prepare', 'pretrain', 'finetune', 'evaluate', 'export', 'report')
    ]
  assert [line for line in two.errors[1].splitlines() if not line.startswith('[Gloo]')] == []  # one speaks for all
  a, b = (json.loads((tmp_path / name / 'results.json').read_text()) for name in ('one', 'two'))
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_allclose(b[name], value, rtol=2e-3, atol=2e-3, err_msg=name)  # ranks of near ties may swap
  files = lambda name: {str(p.relative_to(tmp_path / name)) for p in (tmp_path / name).rglob('*') if p.suffix}
  kept = lambda name: {path for path in files(name) if not path.startswith('compiled') and 'checkpoints' not in path}
  assert kept('one') == kept('two')
  for folder in ('pretrain', 'ranker_with_pinfm', 'ranker_without_pinfm'):
    rows = [_metrics(tmp_path / name / 'seed0' / folder) for name in ('one', 'two')]
    assert [row['step'] for row in rows[0]] == [row['step'] for row in rows[1]]
    for x, y in zip(*rows, strict=True):
      for name in x.keys() & {'loss', 'eval/loss'}:
        np.testing.assert_allclose(y[name], x[name], rtol=1e-4)


def _metrics(directory: Path) -> list[dict]:
  return [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]
