"""Runs the application on uvicorn: SIGTERM drains, SIGHUP loads the bundle anew."""

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from pinfm_jax.errors import UserError
from pinfm_jax.serve.http.app import Service

_KEEP_ALIVE_S = 75  # longer than load balancers keep an idle connection, so that they close it and not we


def bind(host: str, port: int) -> socket.socket:
  """A socket at the address, not yet listening: nobody connects before the model is ready.

  Raises:
    UserError: the address cannot be had.
  """
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
      bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      bound.bind(address)
    except OSError:
      bound.close()
      raise
  except OSError as error:
    raise UserError(f'{host} port {port} cannot be used ({error.strerror}); give another --host or --port') from None
  return bound


class Server(uvicorn.Server):
  """uvicorn, with signals that end in exit code 0 once everything is answered."""

  def __init__(self, service: Service, linger_s: float = 0.0, greeting: str = ''):
    """Takes the service.

    Args:
      service: what answers.
      linger_s: after SIGTERM the server says for so long that it is not ready, before it closes its port.
      greeting: printed once it listens and hears signals.
    """
    self._service, self._linger_s, self._greeting = service, linger_s, greeting
    self._tasks: set[asyncio.Task] = set()
    grace = math.ceil(service.limits.timeout_s) + 5
    super().__init__(
      uvicorn.Config(
        service.app(), log_config=None, log_level='warning', access_log=False, server_header=False, ws='none',
        lifespan='on', timeout_keep_alive=_KEEP_ALIVE_S, timeout_graceful_shutdown=grace,
      )
    )  # fmt: skip

  @contextmanager
  def capture_signals(self) -> Iterator[None]:
    """Installs the handlers for the time the server runs (uvicorn's would end in the signal's exit code)."""
    loop = asyncio.get_running_loop()
    handlers = {signal.SIGTERM: self.end, signal.SIGINT: self.end, signal.SIGHUP: self.reload}
    try:
      for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    except (ValueError, RuntimeError):  # not the main thread, which alone hears signals: whoever runs us ends us
      yield
      return
    try:
      yield
    finally:
      for number in handlers:
        loop.remove_signal_handler(number)

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    """Listens."""
    await super().startup(sockets)
    if self._greeting:
      print(self._greeting, flush=True)

  def end(self) -> None:
    """Drains and ends; asked again, it ends at once."""
    if self._service.draining:
      self.should_exit = self.force_exit = True
    else:
      self._start(self._drain())

  def reload(self) -> None:
    """Loads the bundle anew, unless that is being done."""
    if not self._service.models.loading:
      self._start(self._reload())

  def _start(self, work) -> None:
    task = asyncio.get_running_loop().create_task(work)
    self._tasks.add(task)  # the loop itself holds tasks weakly
    task.add_done_callback(self._tasks.discard)

  async def _drain(self) -> None:
    await asyncio.gather(self._service.drain(), asyncio.sleep(self._linger_s))
    self.should_exit = True

  async def _reload(self) -> None:
    try:
      await self._service.models.reload()
    except UserError:
      logging.getLogger('pinfm.serve').debug('told already')
