"""Kept HTTP connections to one row server, with a deadline for each request."""

import http.client
import threading
import time
from urllib.parse import urlsplit

from pinfm_jax.errors import UserError
from pinfm_jax.serve.rows.wire import LAYOUT, ROWS, TABLES_HEADER, ServedRows

_MOST_TEXT = 1 << 16  # bytes of an answer that is text
_STALE = (ConnectionError, http.client.BadStatusLine)


class RequestError(Exception):
  """A server did not give what was asked; the message says why, in a few words."""


class Replica:
  """One server: what it has, whether it answered last time, and idle connections to it."""

  def __init__(self, url: str):
    """Reads the URL; connects later.

    Raises:
      UserError: it is no http or https URL.
    """
    self._idle: list[http.client.HTTPConnection] = []
    self._lock = threading.Lock()
    try:
      parts = urlsplit(url.strip())
      self._host, self._port = parts.hostname, parts.port
    except ValueError:
      self._host = None
    if not self._host or parts.scheme not in ('http', 'https') or parts.query or parts.fragment:
      raise UserError(f'got the row server {url!r}, expected http://HOST:PORT')
    self.url, self._prefix = url.strip(), parts.path.rstrip('/')
    self._kind = http.client.HTTPSConnection if parts.scheme == 'https' else http.client.HTTPConnection
    self.served: ServedRows | None = None
    self.up = False

  def layout(self, timeout_s: float) -> ServedRows:
    """What the server says that it has.

    Raises:
      RequestError: it does not answer, or says something else.
    """
    text = self._request('GET', LAYOUT, b'', {}, None, timeout_s)
    try:
      return ServedRows.parse(text)
    except ValueError as error:
      raise RequestError(f'it is no row server: {error}') from None

  def rows(self, body: bytes, sha256: str, size: int, timeout_s: float) -> bytes:
    """Packed rows, `size` bytes, of the row numbers in `body`.

    Raises:
      RequestError: it does not give them in time.
    """
    headers = {TABLES_HEADER: sha256, 'Content-Type': 'application/octet-stream'}
    return self._request('POST', ROWS, body, headers, size, timeout_s)

  def close(self) -> None:
    """Closes the idle connections."""
    with self._lock:
      idle, self._idle = self._idle, []
    for connection in idle:
      connection.close()

  def __del__(self):
    self.close()  # the client of a bundle that was replaced is let go, while its last lookup may still run

  def _request(
    self, method: str, path: str, body: bytes, headers: dict[str, str], size: int | None, timeout_s: float
  ) -> bytes:
    """The body of a good answer, which must have `size` bytes (None: any text)."""
    deadline = time.monotonic() + timeout_s
    with self._lock:
      connection = self._idle.pop() if self._idle else None
    kept = connection is not None
    try:
      if kept:
        try:
          return self._exchange(connection, method, path, body, headers, size, deadline)
        except _STALE:
          connection.close()  # the server closed it while it was idle, which says nothing about the server
      connection = self._kind(self._host, self._port, timeout=timeout_s)
      return self._exchange(connection, method, path, body, headers, size, deadline)
    except TimeoutError:
      connection.close()
      raise RequestError(f'no answer within {timeout_s:g} s') from None
    except (OSError, http.client.HTTPException) as error:
      connection.close()
      raise RequestError(str(error) or type(error).__name__) from None
    except BaseException:
      connection.close()
      raise

  def _exchange(
    self,
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes,
    headers: dict[str, str],
    size: int | None,
    deadline: float,
  ) -> bytes:
    if connection.sock is not None:
      connection.sock.settimeout(_left(deadline))
    connection.request(method, self._prefix + path, body, headers)
    sock = connection.sock  # the connection forgets it when the answer says that it is the last
    sock.settimeout(_left(deadline))
    response = connection.getresponse()
    expected = size if response.status == 200 else None
    if expected is not None and response.length != expected:
      raise http.client.HTTPException(f'an answer of {response.length} bytes, expected {expected}')
    content = _read(response, sock, _MOST_TEXT if expected is None else expected, deadline)
    if response.status != 200:
      text = ' '.join(content.decode(errors='replace').split())
      raise RequestError(f'HTTP {response.status} {text}'.strip())
    if response.will_close:
      connection.close()
    else:
      with self._lock:
        self._idle.append(connection)
    return content


def _read(response: http.client.HTTPResponse, sock, most: int, deadline: float) -> bytes:
  content = bytearray()
  while block := response.read1(most + 1 - len(content)):
    content += block
    if len(content) > most:
      raise http.client.HTTPException(f'an answer of more than {most} bytes')
    if not response.isclosed():
      sock.settimeout(_left(deadline))
  if response.length:
    raise http.client.IncompleteRead(b'', response.length)
  response.close()  # the connection is then free for the next request
  return bytes(content)


def _left(deadline: float) -> float:
  left = deadline - time.monotonic()
  if left <= 0:
    raise TimeoutError
  return left
