"""`pinfm serve` as a process: signals under traffic, and the load generator that makes the traffic."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import toy_bundle

pytest.importorskip('uvicorn')
pytest.importorskip('starlette')
pytest.importorskip('prometheus_client')

from serving import ask, infer, probabilities, results, whole

from pinfm_jax.bench.http_load import Client, closed_loop, open_loop
from pinfm_jax.cli import main
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.scorer import Scorer

LENGTHS = [0, 7, 33]
PATH = '/v2/models/toy/infer'


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
  return toy_bundle.make_toy().export(tmp_path_factory.mktemp('bundles') / 'toy', storage='float32')


@pytest.fixture(scope='module')
def documents():
  return list(dataset_requests(toy_bundle.ToyDataset(LENGTHS), range(len(LENGTHS)), toy_bundle.LENGTH))


@pytest.fixture(scope='module')
def expected(bundle, documents):
  return [probabilities(result) for result in Scorer.load(bundle).score(documents)]


@contextmanager
def process(bundle, *options):
  """A `pinfm serve` process; yields it, its port and the lines of its log as they come."""
  command = [sys.executable, '-m', 'pinfm_jax.cli', 'serve', str(bundle), '--port', '0', '--max-batch', '2', *options]
  environment = {**os.environ, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
  log = []
  reader = threading.Thread(target=lambda: log.extend(iter(child.stderr.readline, '')), daemon=True)
  reader.start()
  try:
    line = child.stdout.readline()
    assert '/v2/models/toy' in line, ''.join(log)
    yield child, int(line.rsplit(':', 1)[1].split('/')[0]), log
  finally:
    child.kill()
    child.wait()
    reader.join()
    child.stdout.close()
    child.stderr.close()


def bodies(documents):
  return [(json.dumps(whole([document])).encode(), '') for document in documents]


def test_signals_under_traffic(bundle, documents, expected):
  """SIGHUP loads and loses nothing; SIGTERM answers what was taken in, refuses the rest, and the exit code is 0."""
  with process(bundle, '--timeout-ms', '60000', '--max-queue', '64', '--linger-s', '2') as (child, port, log):
    infer(port, whole(documents))  # compiled

    async def traffic():
      client, answers, stop = Client('127.0.0.1', port, PATH), [], asyncio.Event()
      posts, loop = bodies(documents), asyncio.get_running_loop()

      async def caller(number):
        while not stop.is_set():
          sent = loop.time()
          answers.append((sent, number % 3, *await client.post(*posts[number % 3])))
          await asyncio.sleep(0.01)

      async def until(version):
        while not any(code == 200 and json.loads(text)['model_version'] == version for *_, code, _, text in answers):
          await asyncio.sleep(0.05)

      callers = [asyncio.create_task(caller(i)) for i in range(3)]
      await until('1')
      child.send_signal(signal.SIGHUP)
      await until('2')
      told = loop.time()
      child.send_signal(signal.SIGTERM)
      while not any(code == 503 for *_, code, _, _ in answers):
        await asyncio.sleep(0.01)
      stop.set()
      await asyncio.gather(*callers)
      await client.close()
      return told, answers

    told, answers = asyncio.run(asyncio.wait_for(traffic(), 300))
    assert child.wait(60) == 0, ''.join(log)
  codes = Counter(code for _, _, code, _, _ in answers)
  assert set(codes) == {200, 503}
  assert all('retry-after' in headers for _, _, code, headers, _ in answers if code == 503)
  assert all(code == 200 for sent, _, code, _, _ in answers if sent < told - 0.1)  # nothing taken in was lost
  for _, body, code, _, text in answers:
    if code == 200:
      np.testing.assert_allclose(probabilities(results(json.loads(text))[0]), expected[body], atol=1e-5)
  assert any('version 2 answers' in line for line in log)


def test_a_second_sigterm_ends_at_once_and_a_bad_reload_is_told(bundle, tmp_path):
  place = tmp_path / 'toy'
  place.symlink_to(bundle)
  with process(place, '--linger-s', '60', '--name', 'toy') as (child, port, log):
    place.unlink()
    child.send_signal(signal.SIGHUP)
    while not any('is refused' in line for line in log):
      assert child.poll() is None
    assert ask(port, 'GET', '/v2/health/ready')[0] == 200
    child.send_signal(signal.SIGTERM)
    while ask(port, 'GET', '/v2/health/ready')[0] != 503:
      assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 0


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--port', '-1'], '--port is -1; expected at least 0'),
    (['--port', '70000'], '--port is 70000; expected at most 65535'),
    (['--max-queue', '0'], '--max-queue is 0; expected at least 1'),
    (['--timeout-ms', 'inf'], '--timeout-ms is inf; expected at least 1, and a finite number'),
    (['--max-delay-ms', 'nan'], '--max-delay-ms is nan'),
    (['--name', 'a/b'], "--name is 'a/b'"),
    (['--host', 'no host'], 'no host port 8000 cannot be used'),
    (['--port', '0'], 'is not a bundle'),
  ],
)
def test_wrong_options_end_in_one_line(tmp_path, capsys, options, message):
  assert main(['serve', str(tmp_path), *options]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count('\n') == 1


def test_without_the_extra(bundle):
  code = "import sys; sys.modules['starlette'] = None; from pinfm_jax.cli import main; sys.exit(main(sys.argv[1:]))"
  command = [sys.executable, '-c', code, 'serve', str(bundle), '--port', '0']
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
  assert done.returncode == 2
  assert done.stderr == "pinfm: error: starlette is not installed: pip install 'pinfm_jax[serve]'\n"


def test_a_port_in_use(tmp_path, capsys):
  import socket

  with socket.create_server(('127.0.0.1', 0)) as taken:
    assert main(['serve', str(tmp_path), '--port', str(taken.getsockname()[1])]) == 2
  assert 'cannot be used' in capsys.readouterr().err


class TinyServer:
  """HTTP that answers /fast with the body, closes after every second answer, and breaks off at b'break'."""

  def __init__(self):
    self.connections = 0

  async def __call__(self, reader, writer):
    self.connections += 1
    for answered in range(2):
      try:
        head = (await reader.readuntil(b'\r\n\r\n')).decode().lower()
      except asyncio.IncompleteReadError:
        break
      body = await reader.readexactly(int(head.split('content-length: ')[1].split('\r')[0]))
      if body == b'break':
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc')
        break
      close = 'Connection: close\r\n' if answered and body == b'tell' else ''
      writer.write(
        f'HTTP/1.1 203 Any\r\n{close}X-Mark: {"x-mine" in head}\r\nContent-Length: {len(body)}\r\n\r\n'.encode()
      )
      writer.write(body)
    writer.close()


def play(function):
  async def scenario():
    handler = TinyServer()
    server = await asyncio.start_server(handler, '127.0.0.1', 0)
    client = Client('127.0.0.1', server.sockets[0].getsockname()[1], '/fast')
    result = await function(client)
    await client.close()
    server.close()
    await server.wait_closed()
    return result, handler

  return asyncio.run(scenario())


def test_the_load_generator_is_open_loop_and_counts_everything():
  async def load(client):
    return await open_loop(client, [(b'a', ''), (b'bb', '\r\nX-Mine: 1'), (b'break', '')], rate=200, seconds=1, seed=3)

  answers, handler = play(load)
  assert 140 < len(answers) < 260  # Poisson: 200 within 4 standard deviations
  assert [answer.body for answer in answers] == [i % 3 for i in range(len(answers))]
  assert {answer.status for answer in answers if answer.body < 2} == {203}
  assert {answer.status for answer in answers if answer.body == 2} == {0}
  assert {(a.content, a.headers['x-mark']) for a in answers if a.body < 2} == {(b'a', 'False'), (b'bb', 'True')}
  gaps = np.diff([answer.at_s for answer in answers])
  assert 0.7 < gaps.std() / gaps.mean() < 1.3  # exponential
  assert all(answer.seconds > answer.late_s >= 0 for answer in answers)
  assert handler.connections < 200  # connections are kept


def test_callers_that_wait():
  answers, _ = play(lambda client: closed_loop(client, [(b'tell', '')], callers=3, seconds=0.2))
  assert {answer.status for answer in answers} == {203}
  assert len(answers) > 10


def test_nobody_there():
  async def load():
    return await Client('127.0.0.1', 1, '/').post(b'')

  assert asyncio.run(load())[0] == 0
