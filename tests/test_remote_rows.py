"""The client of row servers: the rows of the file bit for bit, whatever fails, and nothing of another bundle."""

import gc
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import toy_bundle
from row_servers import ALL, FAST, Running, broken, client, export_tables, ids, servers, until

from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import hash_rows
from pinfm_jax.serve.manifest import Manifest
from pinfm_jax.serve.rows.mapped import MappedRows
from pinfm_jax.serve.rows.remote import RemoteRows, RowLimits, RowsUnavailableError
from pinfm_jax.serve.rows.server import Part


@pytest.fixture(scope='module')
def toy():
  return toy_bundle.make_toy()


@pytest.fixture(scope='module')
def bundle(toy, tmp_path_factory):
  return export_tables(toy, tmp_path_factory.mktemp('bundles') / 'bundle')


@pytest.fixture(scope='module')
def local(bundle):
  return MappedRows(bundle / 'tables.bin', Manifest.read(bundle).tables)


@pytest.fixture(scope='module')
def other(toy, tmp_path_factory):
  """A bundle of the same layout with other rows."""
  return export_tables(toy, tmp_path_factory.mktemp('others') / 'bundle', rows_GE=toy.rows_GE + 1)


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


def test_a_client_that_nobody_holds_stops_looking(bundle):
  with servers(bundle, ALL) as [server]:
    rows = client(['http://127.0.0.1:9', server.url], bundle)
    watch = rows._watch
    assert watch.is_alive()
    del rows
    gc.collect()
    watch.join(5)
    assert not watch.is_alive()


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


@pytest.mark.parametrize('url', ['localhost:80', 'ftp://a', 'http://', 'http://a:b', 'http://a?x=1'])
def test_urls_are_checked(bundle, url):
  with pytest.raises(UserError, match='expected http://HOST:PORT'):
    RemoteRows.connect(bundle, [url])
