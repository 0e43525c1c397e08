"""`pinfm serve-rows`: serves a bundle's table rows to scorers on other hosts (`serve.rows.wire`, `serve.rows.remote`).

The tables stay memory-mapped, so a server holds the pages that are asked for. It can serve one of N contiguous parts of
the rows; several servers of the same part are replicas.
"""

import asyncio
import re
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.serve.bundle import CHECKSUMS, TABLES, check_files
from pinfm_jax.serve.manifest import Manifest
from pinfm_jax.serve.rows.mapped import MappedRows
from pinfm_jax.serve.rows.wire import HEALTH, LAYOUT, ROWS, TABLES_HEADER, ServedRows

MOST_ROWS = 1 << 16
_BODY_S = 10.0  # a body must have come by then
_KEEP_ALIVE_S = 120  # of an idle connection
_DRAIN_S = 30  # for requests under way when the server is told to stop
_AT_ONCE = 512  # requests and connections


@dataclass(frozen=True)
class Part:
  """The I-th of N contiguous parts of the rows, I counted from 1."""

  index: int = 1
  of: int = 1

  @classmethod
  def parse(cls, text: str) -> 'Part':
    """Reads 'I/N'.

    Raises:
      UserError: it is something else.
    """
    match = re.fullmatch(r'(\d+)/(\d+)', text)
    part = cls(*map(int, match.groups())) if match else None
    if part is None or not 1 <= part.index <= part.of:
      raise UserError(f'--part is {text!r}, expected I/N with I from 1 to N, for example 2/3')
    return part

  def rows(self, total: int) -> tuple[int, int]:
    """First row, and the row behind the last."""
    if self.of > total:
      raise UserError(f'--part splits {total} rows into {self.of} parts: give fewer')
    return total * (self.index - 1) // self.of, total * self.index // self.of


class RowService:
  """The rows of one part of a bundle's tables."""

  def __init__(self, bundle: str | Path, part: Part = Part(), most_rows: int = MOST_ROWS):
    """Opens the tables and checks them: whole below 2 GiB, else a sample of blocks.

    Raises:
      UserError: no bundle there, one without tables, a damaged file, or more parts than rows.
    """
    bundle = Path(bundle)
    manifest = Manifest.read(bundle)
    if manifest.tables is None:
      raise UserError(f'{bundle} has no tables (its ranker is without PinFM): there is nothing to serve')
    entries = {entry.name: entry for entry in manifest.files}
    check_files(bundle, (entries[TABLES], entries[CHECKSUMS]))
    first, last = part.rows(manifest.tables.sub_tables * manifest.tables.rows)
    self.served = ServedRows(manifest.tables, entries[TABLES].sha256, first, last, most_rows)
    self._rows = MappedRows(bundle / TABLES, manifest.tables)

  def look_up(self, body: bytes) -> bytes | None:
    """The packed rows of the row numbers in a request's body; None if the server has not all of them."""
    numbers = np.frombuffer(body, '<u4')
    if len(numbers) and not (self.served.first <= numbers.min() and numbers.max() < self.served.last):
      return None
    return self._rows.numbered(numbers.astype(np.intp)).tobytes()


def row_app(service: RowService) -> Any:
  """The ASGI application."""
  from starlette.applications import Starlette
  from starlette.concurrency import run_in_threadpool
  from starlette.requests import Request
  from starlette.responses import PlainTextResponse, Response
  from starlette.routing import Route

  served = service.served

  def refuse(status: int, why: str) -> Response:
    # What is left of the request's body is not read, so the connection cannot serve another one.
    return PlainTextResponse(why, status, {'Connection': 'close'} if status in (408, 413) else None)

  async def layout(_: Request) -> Response:
    return Response(served.text(), media_type='application/json')

  async def health(_: Request) -> Response:
    return PlainTextResponse('ok')

  async def rows(request: Request) -> Response:
    tables = request.headers.get(TABLES_HEADER)
    if tables != served.sha256:
      return refuse(409, f'this server has the tables {served.sha256[:16]}.., not {str(tables)[:16]}..')
    try:
      async with asyncio.timeout(_BODY_S):
        body = await _body(request, 4 * served.most_rows)
    except TimeoutError:
      return refuse(408, f'the body did not come within {_BODY_S:g} s')
    if body is None:
      return refuse(413, f'at most {served.most_rows} rows a request')
    if len(body) % 4:
      return refuse(400, f'got a body of {len(body)} bytes, expected row numbers of 4 bytes each')
    packed = await run_in_threadpool(service.look_up, body)  # a row that is not in memory waits for the disk
    if packed is None:
      return refuse(400, f'this server has the rows {served.first} to {served.last - 1}')
    return Response(packed, media_type='application/octet-stream')

  return Starlette(routes=[Route(LAYOUT, layout), Route(HEALTH, health), Route(ROWS, rows, methods=['POST'])])


async def _body(request: Any, limit: int) -> bytes | None:
  """The request's body; None as soon as it is known to be longer than `limit`."""
  stated = request.headers.get('content-length', '')
  if stated.isdecimal() and int(stated) > limit:
    return None
  body = bytearray()
  async for block in request.stream():
    body += block
    if len(body) > limit:
      return None
  return bytes(body)


def row_server(service: RowService) -> Any:
  """A uvicorn server, to be run with sockets that listen."""
  import uvicorn

  return uvicorn.Server(
    uvicorn.Config(
      row_app(service),
      log_level='warning',
      access_log=False,
      lifespan='off',
      timeout_keep_alive=_KEEP_ALIVE_S,
      timeout_graceful_shutdown=_DRAIN_S,
      limit_concurrency=_AT_ONCE,
    )
  )


def serve_rows(bundle: str | Path, host: str, port: int, part: Part = Part()) -> None:
  """Serves until SIGTERM or SIGINT; requests under way are then answered first.

  Raises:
    UserError: the bundle cannot be served, the address is taken, or the extra `serve` is not installed.
  """
  try:
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
  except ModuleNotFoundError as error:
    raise UserError(f"{error.name} is not installed: pip install 'pinfm_jax[serve]'") from None
  if not 0 <= port <= 65_535:
    raise UserError(f'--port is {port}, expected 0 to 65535')
  service = RowService(bundle, part)
  try:
    listening = socket.create_server((host, port), backlog=1024)
  except OSError as error:
    raise UserError(f'cannot listen on {host}:{port} ({error}): give another --host or --port') from None
  signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again once it has drained
  served = service.served
  rows = f'rows {served.first} to {served.last - 1} of {served.tables.sub_tables * served.tables.rows}'
  print(f'{bundle}: {rows} on http://{host}:{listening.getsockname()[1]}', flush=True)
  row_server(service).run(sockets=[listening])
