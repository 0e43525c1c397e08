"""Row servers for tests: real ones in threads, and ones that answer wrongly."""

import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from pinfm_jax.model.hashing import key_words
from pinfm_jax.serve.rows.remote import RemoteRows, RowLimits

pytest.importorskip('uvicorn')
pytest.importorskip('starlette')
from pinfm_jax.serve.rows.server import Part, RowService, row_server

ALL = Part()
FAST = RowLimits(timeout_s=0.5, attempts=2, recheck_s=0.1)


def export_tables(toy, out, **changes):
  """The toy's bundle without its programs, which take seconds to lower and are not read here."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: {'context': b'c', 'crossing': b'x'})
    return toy.export(out, **changes)


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
