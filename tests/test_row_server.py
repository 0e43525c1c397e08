"""`pinfm serve-rows`: what it refuses, how it ends, and that a host without tables scores with it."""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import toy_bundle
from row_servers import ALL, Running, client, ids, servers, until

from pinfm_jax.cli import main
from pinfm_jax.errors import UserError
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.rows.remote import RemoteRows, RowLimits
from pinfm_jax.serve.rows.server import Part, RowService
from pinfm_jax.serve.rows.wire import LAYOUT, ROWS, TABLES_HEADER
from pinfm_jax.serve.scorer import Scorer
from pinfm_jax.serve.server import ServerSettings, open_scorer


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
  return toy_bundle.make_toy().export(tmp_path_factory.mktemp('bundles') / 'bundle')


@pytest.fixture(scope='module')
def local(bundle):
  return load_bundle(bundle).rows


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
  monkeypatch.setattr('pinfm_jax.serve.rows.server._BODY_S', 0.2)
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


def test_a_bundle_without_its_tables_scores_with_remote_rows(bundle, tmp_path):
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


def test_the_server_scores_with_row_servers(bundle, tmp_path):
  thin = shutil.copytree(bundle, tmp_path / 'thin')
  (thin / 'tables.bin').unlink()
  documents = list(dataset_requests(toy_bundle.ToyDataset([3, 5]), range(2), toy_bundle.LENGTH))
  with servers(bundle, ALL) as [server]:
    scorer = open_scorer(thin, ServerSettings(rows=server.url))
    assert list(scorer.score(documents)) == list(Scorer.load(bundle).score(documents))
    scorer.bundle.rows.close()
  with pytest.raises(UserError, match='no row server has the rows'):
    open_scorer(thin, ServerSettings(rows='http://127.0.0.1:9'))


def test_the_command_scores_with_row_servers(bundle, tmp_path, capsys):
  dataset = toy_bundle.ToyDataset([3])
  requests, out = tmp_path / 'requests.jsonl', tmp_path / 'scores.jsonl'
  requests.write_text(''.join(json.dumps(d) + '\n' for d in dataset_requests(dataset, range(1), toy_bundle.LENGTH)))
  with servers(bundle, Part(1, 2), Part(2, 2)) as running:
    rows = ','.join(server.url for server in running)
    assert main(['score', str(bundle), str(requests), '--out', str(out), '--rows', rows]) == 0
  assert len(out.read_text().splitlines()) == 1
  assert main(['score', str(bundle), str(requests), '--out', str(out), '--rows', 'http://127.0.0.1:9']) == 2
  assert 'no row server has the rows 0 to 99' in capsys.readouterr().err


def test_the_commands_mistakes_are_one_line(bundle, tmp_path, capsys):
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = str(taken.getsockname()[1])
    assert main(['serve-rows', str(bundle), '--port', port]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf'pinfm: error: cannot listen on 127.0.0.1:{port} .*: give another .*\n', error)
  for arguments, message in (
    ([str(bundle), '--port', '99999'], '--port is 99999, expected 0 to 65535'),
    ([str(bundle), '--port', '0', '--part', '9/3'], "--part is '9/3', expected I/N"),
    ([str(tmp_path), '--port', '0'], 'is not a bundle'),
  ):
    assert main(['serve-rows', *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1


def test_a_bundle_without_tables_has_nothing_to_serve(tmp_path):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: {'crossing': b'x'})
    path = toy_bundle.make_toy('none').export(tmp_path / 'out')
  with pytest.raises(UserError, match='there is nothing to serve'):
    RowService(path)
  with pytest.raises(UserError, match='needs no row servers'):
    RemoteRows.connect(path, ['http://127.0.0.1:9'])
