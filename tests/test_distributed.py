"""How processes find each other: options that cannot work, and what a user reads when one does not come."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from pinfm_jax.cli import main
from pinfm_jax.errors import UserError
from pinfm_jax.train.distributed import METHODS, Launch, is_first, on_first, session, start

ROOT = Path(__file__).resolve().parent.parent


def _free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


@pytest.mark.parametrize(
  ('launch', 'words'),
  [
    (Launch('slrum'), "--distributed is 'slrum'; expected one of: none, auto, slurm"),
    (Launch('none', 'host:1'), '--coordinator, --process-id and --num-processes belong together'),
    (Launch('none', None, 0, 2), '--coordinator, --process-id and --num-processes belong together'),
    (Launch('slurm', 'host:1', 0, 2), '--coordinator and --distributed slurm exclude each other'),
    (Launch('none', 'host', 0, 2), "--coordinator is 'host'; expected HOST:PORT"),
    (Launch('none', 'host:0', 0, 2), "--coordinator is 'host:0'; expected HOST:PORT"),
    (Launch('none', 'host:99999', 0, 2), 'expected HOST:PORT'),
    (Launch('none', 'host:1', 2, 2), '--process-id is 2 of --num-processes 2; expected 0 to N - 1'),
    (Launch('none', 'host:1', -1, 2), '--process-id is -1'),
    (Launch('none', 'host:1', 0, 0), '--num-processes 0'),
    (Launch('auto', init_timeout_s=0), '--init-timeout is 0; expected seconds > 0'),
    (Launch('auto', stage_timeout_s=-5), '--stage-timeout is -5; expected seconds > 0'),
  ],
)
def test_options_that_cannot_work_are_refused(launch, words):
  with pytest.raises(UserError) as error:
    start(launch)
  assert words in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('method', [name for name, method in METHODS.items() if method.variables])
def test_a_cluster_that_this_is_not_is_refused(method, monkeypatch):
  for name in METHODS[method].variables:
    monkeypatch.delenv(name, raising=False)
  with pytest.raises(UserError, match=rf'--distributed {method}: .* \({METHODS[method].variables[0]} is not set\)'):
    start(Launch(method))


def test_a_coordinator_that_is_not_there_is_named_after_the_time_out():
  port, begin = _free_port(), time.monotonic()
  with pytest.raises(UserError, match=rf'no coordinator at 127\.0\.0\.1:{port} after 1 s \(.*refused\)'):
    start(Launch('none', f'127.0.0.1:{port}', 1, 2, init_timeout_s=1))
  assert 0.9 < time.monotonic() - begin < 10


def test_one_process_needs_no_start():
  with session(Launch()):
    assert not jax.distributed.is_initialized()
    assert is_first()
    assert on_first('a thing', lambda: {'a': [1, 2]}) == {'a': [1, 2]}
    with pytest.raises(UserError, match='mine'):
      on_first('a thing', _refuse)


def _refuse():
  raise UserError('mine')


SCRIPT = """
import json, sys
from pinfm_jax.errors import UserError
from pinfm_jax.train.distributed import Launch, start
for arguments in json.loads(sys.argv[1]):
  try:
    start(Launch(*arguments))
    print('joined', flush=True)
  except UserError as error:
    print(error, flush=True)
"""


def _python(*launches, timeout=60):
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, '-c', SCRIPT, json.dumps(launches)]
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def test_nothing_to_detect_a_port_in_use_and_a_second_start():
  with socket.socket() as taken:
    taken.bind(('0.0.0.0', 0))
    taken.listen()
    free, port = _free_port(), taken.getsockname()[1]
    done = _python(
      ['auto'],
      ['none', f'127.0.0.1:{port}', 0, 2, 20],
      ['none', f'127.0.0.1:{free}', 0, 1, 20],
      ['none', f'127.0.0.1:{free}', 0, 1, 20],
    )
  lines = done.stdout.splitlines()
  assert len(lines) == 4, done.stderr
  assert '--distributed auto: this process does not run in Slurm, Open MPI, Kubernetes or a TPU pod' in lines[0]
  assert f'process 0 cannot listen at 127.0.0.1:{port} (Address already in use); take another port' in lines[1]
  assert lines[2] == 'joined'
  assert 'joined already' in lines[3]


def test_a_process_that_does_not_come_ends_the_others_with_one_line():
  done = _python(['none', f'127.0.0.1:{_free_port()}', 0, 2, 2])
  assert done.returncode == 2
  (line,) = [line for line in done.stderr.splitlines() if 'pinfm' in line]
  assert line.startswith('pinfm: error: not all processes came within 2 s; ')
  assert 'stack trace' not in done.stderr


def test_the_command_refuses_what_the_module_refuses(tmp_path, capsys):
  launch = tmp_path / 'launch.py'
  launch.write_text('from toy import EXPERIMENT as experiment\n')
  for words, expected in (
    (['--distributed', 'slrum'], "--distributed is 'slrum'"),
    (['--coordinator', 'host:1'], 'belong together'),
    (['--profile', '5'], "--profile is '5'; expected FIRST:LAST"),
    (['--profile', '5:9'], '--profile 5:9 goes beyond pretrain.steps 6'),
    (['--profile', '1:2', '--stages', 'report'], 'traces training steps, but --stages report trains nothing'),
  ):
    assert main(['run', str(launch), '--workdir', str(tmp_path / 'work'), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match('pinfm: error: ', line)
    assert expected in line
  assert not (tmp_path / 'work').exists()
