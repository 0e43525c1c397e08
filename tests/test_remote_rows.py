"""Row servers and their client: the rows of the file bit for bit, whatever fails, and nothing of another bundle."""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import toy_bundle

from pinfm_jax.cli import main
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import hash_rows, key_words
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.remote_rows import RemoteRows, RowLimits, RowsUnavailableError
from pinfm_jax.serve.row_wire import LAYOUT, ROWS, TABLES_HEADER
from pinfm_jax.serve.rows import MappedRows
from pinfm_jax.serve.scorer import Scorer

pytest.importorskip('uvicorn')
pytest.importorskip('starlette')
from pinfm_jax.serve.row_server import Part, RowService, row_server

ALL = Part()
FAST = RowLimits(timeout_s=0.5, attempts=2, recheck_s=0.1)


@pytest.fixture(scope='module')
def toy():
  return toy_bundle.make_toy()


@pytest.fixture(scope='module')
def bundle(toy, tmp_path_factory):
  return toy.export(tmp_path_factory.mktemp('bundles') / 'bundle')


@pytest.fixture(scope='module')
def local(bundle):
  return load_bundle(bundle).rows


@pytest.fixture(scope='module')
def other(toy, tmp_path_factory):
  """A bundle of the same layout with other rows."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: {'context': b'c', 'crossing': b'x'})
    return toy.export(tmp_path_factory.mktemp('others') / 'bundle', rows_GE=toy.rows_GE + 1)


def ids(count: int, seed: int = 0, distinct: int = 2**63) -> np.ndarray:
  return key_words(np.random.default_rng(seed).integers(0, distinct, count).astype(np.uint64))


class Running:
  """A row server in a thread."""

  def __init__(self, bundle, part=ALL, port=0, **options):
    self.service = RowService(bundle, part, **options)
    self._server = row_server(self.service)
    listening = socket.create_server(('127.0.0.1', port))
    self.port = listening.getsockname()[1]
    self.url = f'http://127.0.0.1:{self.port}'
    self._thread = threading.Thread(target=self._server.run, kwargs={'sockets': [listening]}, daemon=True)
    self._thread.start()

  def stop(self):
    self._server.should_exit = True
    self._thread.join(10)
    assert not self._thread.is_alive()


@contextmanager
def servers(bundle, *parts, **options):
  running = [Running(bundle, part, **options) for part in parts]
  try:
    yield running
  finally:
    for server in running:
      server.stop()


def client(urls, bundle, limits=FAST):
  return RemoteRows.connect(bundle, urls, limits)


@contextmanager
def broken(running, answer):
  """A server that describes itself as `running` does and answers requests for rows with `answer(handler)`."""
  description = running.service.served.text().encode()

  class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
      self.send_response(200)
      self.send_header('Content-Length', str(len(description)))
      self.end_headers()
      self.wfile.write(description)

    def do_POST(self):
      self.rfile.read(int(self.headers['Content-Length']))
      asked.append(self.path)
      answer(self)

    def log_message(self, *_):
      pass

  asked: list[str] = []
  server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
  try:
    yield f'http://127.0.0.1:{server.server_address[1]}', asked
  finally:
    server.shutdown()
    server.server_close()


def until(true, seconds=10.0):
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end, 'it did not come to pass'
    time.sleep(0.02)


@pytest.mark.parametrize('parts', [1, 3])
def test_rows_are_those_of_the_file(bundle, local, parts):
  words = ids(300, distinct=40).reshape(10, 30, 2)  # many repetitions, and every part is asked
  with (
    servers(bundle, *(Part(i, parts) for i in range(1, parts + 1))) as running,
    client([server.url for server in running], bundle) as rows,
  ):
    for seed in range(3):
      np.testing.assert_array_equal(rows.rows(ids(50, seed)), local.rows(ids(50, seed)))
    np.testing.assert_array_equal(rows.rows(words), local.rows(words))
    assert rows.rows(words).dtype == np.uint8
    np.testing.assert_array_equal(rows.rows(words[0, 0]), local.rows(words[0, 0]))
    assert rows.rows(words[:0]).shape == (0, 30, 2, 8)


def test_a_row_travels_once_and_requests_are_split_at_the_servers_limit(bundle, local, monkeypatch):
  words, asked = ids(500, distinct=30), []
  with servers(bundle, ALL, most_rows=16) as [server]:
    look_up = server.service.look_up
    monkeypatch.setattr(server.service, 'look_up', lambda body: asked.append(len(body) // 4) or look_up(body))
    with client([server.url], bundle) as rows:
      np.testing.assert_array_equal(rows.rows(words), local.rows(words))
  distinct = len(np.unique(local_numbers(local, words)))
  assert 16 < distinct <= 60
  assert sum(asked) == distinct
  assert max(asked) <= 16


def local_numbers(local: MappedRows, words: np.ndarray) -> np.ndarray:
  layout = local.layout
  return hash_rows(words, layout.sub_tables, layout.rows, layout.hash_seed)


def test_overlapping_parts_are_fine(bundle, local):
  with (
    servers(bundle, Part(1, 2), Part(2, 3), Part(3, 3), Part(2, 2)) as running,
    client([server.url for server in running], bundle) as rows,
  ):
    np.testing.assert_array_equal(rows.rows(ids(200)), local.rows(ids(200)))


def test_connections_are_kept_and_a_closed_one_is_no_failure(bundle, local):
  with servers(bundle, ALL) as [server], client([server.url], bundle, RowLimits(timeout_s=5.0, attempts=1)) as rows:
    for _ in range(5):
      rows.rows(ids(8))
    [replica] = rows._replicas
    [connection] = replica._idle
    connection.sock.shutdown(socket.SHUT_RDWR)  # as a server or a firewall does to an idle connection
    np.testing.assert_array_equal(rows.rows(ids(8)), local.rows(ids(8)))
    assert replica.up
    assert replica._idle != [connection]


def test_replicas_share_the_requests(bundle):
  with servers(bundle, ALL, ALL) as running:
    counts = [0, 0]
    for place, server in enumerate(running):

      def counted(body, place=place, look_up=server.service.look_up):
        counts[place] += 1
        return look_up(body)

      server.service.look_up = counted
    with client([server.url for server in running], bundle) as rows:
      for _ in range(10):
        rows.rows(ids(4))
  assert counts == [5, 5]


def half_an_answer(handler):
  handler.send_response(200)
  handler.send_header('Content-Length', '16')
  handler.end_headers()
  handler.wfile.write(b'1234567')
  handler.wfile.flush()
  handler.connection.shutdown(socket.SHUT_RDWR)
  handler.close_connection = True


def silence(handler):
  time.sleep(1.5)
  handler.close_connection = True


def trickle(handler):
  handler.send_response(200)
  handler.send_header('Content-Length', '16')
  handler.end_headers()
  try:
    for _ in range(16):
      handler.wfile.write(b'1')
      handler.wfile.flush()
      time.sleep(0.15)
  except OSError:
    pass


def refusal(handler):
  handler.send_error(503)


def too_much(handler):
  handler.send_response(200)
  handler.send_header('Content-Length', '1000000000000')
  handler.end_headers()
  handler.close_connection = True


@pytest.mark.parametrize('answer', [half_an_answer, silence, trickle, refusal, too_much])
def test_a_replica_that_fails_in_the_middle_is_replaced(bundle, local, answer):
  words = ids(1)[:, None]  # two rows of 8 bytes: the answer would have 16
  with (
    servers(bundle, ALL) as [server],
    broken(server, answer) as (url, asked),
    client([url, server.url], bundle, RowLimits(timeout_s=0.5, recheck_s=60)) as rows,
  ):
    begin = time.monotonic()
    for _ in range(6):
      np.testing.assert_array_equal(rows.rows(words), local.rows(words))
    # One timeout at most: afterwards the broken one is left alone.
    assert len(asked) == 1
    assert time.monotonic() - begin < 1.4


@pytest.mark.parametrize(
  ('answer', 'why'),
  [(silence, 'no answer within'), (trickle, 'no answer within'), (refusal, 'HTTP 503'),
   (half_an_answer, 'IncompleteRead'), (too_much, 'expected 16')],
)  # fmt: skip
def test_without_a_replica_the_lookup_ends_in_time_and_says_why(bundle, answer, why):
  with (
    servers(bundle, ALL) as [server],
    broken(server, answer) as (url, asked),
    client([url], bundle, RowLimits(timeout_s=0.3, attempts=2, recheck_s=60)) as rows,
  ):
    begin = time.monotonic()
    with pytest.raises(RowsUnavailableError, match=why) as error:
      rows.rows(ids(1))
    assert time.monotonic() - begin < 1.2
    assert len(asked) == 2
    assert '\n' not in str(error.value)
    assert url in str(error.value)
    assert 'pinfm serve-rows' in str(error.value)


def test_a_dead_server_is_asked_again_when_it_is_back(bundle, local):
  first = Running(bundle, Part(1, 2))
  with servers(bundle, Part(2, 2)) as [second], client([first.url, second.url], bundle) as rows:
    rows.rows(ids(100))
    first.stop()
    with pytest.raises(RowsUnavailableError, match=re.escape(first.url)):
      rows.rows(ids(100))
    again = Running(bundle, Part(1, 2), port=first.port)
    try:
      until(lambda: rows._replicas[0].up)
      np.testing.assert_array_equal(rows.rows(ids(100)), local.rows(ids(100)))
    finally:
      again.stop()


def test_a_server_that_is_down_at_the_start_joins_later(bundle, local):
  with socket.create_server(('127.0.0.1', 0)) as free:
    port = free.getsockname()[1]
  with servers(bundle, ALL) as [server], client([f'http://127.0.0.1:{port}', server.url], bundle) as rows:
    np.testing.assert_array_equal(rows.rows(ids(9)), local.rows(ids(9)))
    late = Running(bundle, port=port)
    try:
      until(lambda: rows._replicas[0].up)
      until(lambda: rows._watch is None)  # nothing is left to look after
    finally:
      late.stop()


def test_rows_that_no_server_has_are_named(bundle):
  with (
    servers(bundle, Part(1, 4), Part(3, 4)) as running,
    pytest.raises(RowsUnavailableError, match=r'no row server has the rows 25 to 49, 75 to 99: start one'),
  ):
    RemoteRows.connect(bundle, [server.url for server in running], FAST)
  with pytest.raises(RowsUnavailableError, match=r'rows 0 to 99 \(http://127.0.0.1:9: .*refused'):
    RemoteRows.connect(bundle, ['http://127.0.0.1:9'], FAST)


def test_the_tables_of_another_bundle_are_refused(bundle, other, local):
  with (
    servers(bundle, ALL) as [server],
    servers(other, ALL) as [wrong],
    pytest.raises(UserError, match=rf'{wrong.url} serves the tables of another bundle'),
  ):
    RemoteRows.connect(bundle, [server.url, wrong.url], FAST)


def test_a_server_that_comes_back_with_another_bundle_is_not_believed(bundle, other, local):
  first = Running(bundle)
  with servers(bundle, ALL) as [second], client([first.url, second.url], bundle) as rows:
    rows.rows(ids(5))
    first.stop()
    changed = Running(other, port=first.port)
    try:
      for seed in range(6):
        np.testing.assert_array_equal(rows.rows(ids(5, seed)), local.rows(ids(5, seed)))
      time.sleep(0.3)  # it was asked again meanwhile
      assert not rows._replicas[0].up
    finally:
      changed.stop()


def post(url, body, sha256, path=ROWS):
  connection = http.client.HTTPConnection(url.removeprefix('http://'), timeout=5)
  connection.request('POST', path, body, {TABLES_HEADER: sha256})
  response = connection.getresponse()
  answer = response.status, response.read()
  connection.close()
  return answer


def test_the_server_refuses_what_it_cannot_answer(bundle):
  with servers(bundle, Part(2, 2), most_rows=10) as [server]:
    sha256 = server.service.served.sha256
    numbers = lambda *values: np.array(values, '<u4').tobytes()
    assert post(server.url, numbers(50, 99), sha256)[0] == 200
    assert post(server.url, b'', sha256) == (200, b'')
    assert post(server.url, numbers(*[50] * 11), sha256) == (413, b'at most 10 rows a request')
    chunks = (numbers(50) for _ in range(11))  # no length is stated beforehand
    assert post(server.url, chunks, sha256)[0] == 413
    assert post(server.url, b'12345', sha256)[0] == 400
    for outside in (49, 100, 2**32 - 1):
      assert post(server.url, numbers(50, outside), sha256) == (400, b'this server has the rows 50 to 99')
    assert post(server.url, numbers(50), 'f' * 64)[0] == 409
    assert post(server.url, b'', sha256, path=LAYOUT)[0] == 405


def test_a_body_that_does_not_come_is_not_waited_for(bundle, monkeypatch):
  monkeypatch.setattr('pinfm_jax.serve.row_server._BODY_S', 0.2)
  with servers(bundle, ALL) as [server], socket.create_connection(('127.0.0.1', server.port), timeout=5) as slow:
    headers = f'Host: a\r\n{TABLES_HEADER}: {server.service.served.sha256}\r\nContent-Length: 8'
    head = f'POST {ROWS} HTTP/1.1\r\n{headers}\r\n'
    slow.sendall(head.encode() + b'\r\n1234')
    assert slow.recv(1000).startswith(b'HTTP/1.1 408')


def test_a_request_under_way_is_answered_before_the_server_ends(bundle, local):
  server = Running(bundle)
  begun, go_on, look_up = threading.Event(), threading.Event(), server.service.look_up

  def slowly(body):
    begun.set()
    go_on.wait(10)
    return look_up(body)

  server.service.look_up = slowly
  with client([server.url], bundle, RowLimits(timeout_s=10, attempts=1)) as rows, ThreadPoolExecutor(2) as pool:
    answer = pool.submit(rows.rows, ids(5))
    assert begun.wait(10)
    end = pool.submit(server.stop)
    until(lambda: refused(server.port))  # no new connection is taken
    assert not answer.done()
    go_on.set()
    np.testing.assert_array_equal(answer.result(), local.rows(ids(5)))
    end.result()


def refused(port):
  try:
    socket.create_connection(('127.0.0.1', port), timeout=1).close()
  except OSError:
    return True
  return False


def test_several_threads_share_a_client(bundle, local):
  with (
    servers(bundle, Part(1, 2), Part(2, 2), Part(2, 2)) as running,
    client([server.url for server in running], bundle, RowLimits(timeout_s=10)) as rows,
    ThreadPoolExecutor(8) as pool,
  ):
    found = list(pool.map(lambda seed: rows.rows(ids(20, seed)), range(40)))
  for seed, each in enumerate(found):
    np.testing.assert_array_equal(each, local.rows(ids(20, seed)))


@pytest.mark.parametrize('limits', [{'timeout_s': 0}, {'attempts': 0}, {'recheck_s': -1}])
def test_limits_are_checked(limits):
  with pytest.raises(UserError, match='expected times above 0 and at least one attempt'):
    RowLimits(**limits)


def test_something_that_is_no_row_server_is_named(bundle):
  class Other(BaseHTTPRequestHandler):
    def do_GET(self):
      self.send_response(200)
      self.end_headers()
      self.wfile.write(b'<html>hello</html>')

    def log_message(self, *_):
      pass

  server = ThreadingHTTPServer(('127.0.0.1', 0), Other)
  threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
  try:
    with pytest.raises(RowsUnavailableError, match='it is no row server'):
      RemoteRows.connect(bundle, [f'http://127.0.0.1:{server.server_address[1]}'], FAST)
  finally:
    server.shutdown()
    server.server_close()


def test_damaged_tables_are_not_served(bundle, tmp_path):
  copy = shutil.copytree(bundle, tmp_path / 'copy')
  content = bytearray((copy / 'tables.bin').read_bytes())
  content[7] ^= 1
  (copy / 'tables.bin').write_bytes(content)
  with pytest.raises(UserError, match='tables.bin is damaged'):
    RowService(copy)


@pytest.mark.parametrize('text', ['0/3', '4/3', '1', 'a/b', '-1/2', '1/0'])
def test_parts_are_checked(text):
  with pytest.raises(UserError, match='expected I/N'):
    Part.parse(text)


def test_parts_cover_all_rows_once():
  edges = [Part(i, 7).rows(100) for i in range(1, 8)]
  assert [first for first, _ in edges] == [0, *[last for _, last in edges[:-1]]]
  assert edges[-1][1] == 100
  with pytest.raises(UserError, match='give fewer'):
    Part(1, 101).rows(100)


@pytest.mark.parametrize('url', ['localhost:80', 'ftp://a', 'http://', 'http://a:b', 'http://a?x=1'])
def test_urls_are_checked(bundle, url):
  with pytest.raises(UserError, match='expected http://HOST:PORT'):
    RemoteRows.connect(bundle, [url])


def test_a_bundle_without_its_tables_scores_with_remote_rows(bundle, toy, tmp_path):
  """The command of the server and of the scorer, and the server's end: SIGTERM is no error."""
  thin = shutil.copytree(bundle, tmp_path / 'thin')
  (thin / 'tables.bin').unlink()
  with pytest.raises(UserError, match=r'tables.bin is missing'):
    load_bundle(thin)
  command = [sys.executable, '-m', 'pinfm_jax.cli', 'serve-rows', str(bundle), '--port', '0']
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  try:
    line = process.stdout.readline()
    url = re.search(r'rows 0 to 99 of 100 on (http://\S+)', line)[1]
    dataset = toy_bundle.ToyDataset([3, 0, 20])
    documents = list(dataset_requests(dataset, range(3), toy_bundle.LENGTH))
    with client([url], thin, RowLimits(timeout_s=10)) as rows:
      remote = list(Scorer.load(thin, rows=rows).score(documents))
      assert remote == list(Scorer.load(bundle).score(documents))
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.stdout.read() == ''
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_command_scores_with_row_servers(bundle, toy, tmp_path, capsys):
  dataset = toy_bundle.ToyDataset([3])
  requests, out = tmp_path / 'requests.jsonl', tmp_path / 'scores.jsonl'
  requests.write_text(''.join(json.dumps(d) + '\n' for d in dataset_requests(dataset, range(1), toy_bundle.LENGTH)))
  with servers(bundle, Part(1, 2), Part(2, 2)) as running:
    rows = ','.join(server.url for server in running)
    assert main(['score', str(bundle), str(requests), '--out', str(out), '--rows', rows]) == 0
  assert len(out.read_text().splitlines()) == 1
  assert main(['score', str(bundle), str(requests), '--out', str(out), '--rows', 'http://127.0.0.1:9']) == 2
  assert 'no row server has the rows 0 to 99' in capsys.readouterr().err
