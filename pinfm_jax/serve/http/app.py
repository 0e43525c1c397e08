"""The ASGI application: the protocol's endpoints, the model repository extension, and /metrics."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pinfm_jax import __version__
from pinfm_jax.errors import UserError
from pinfm_jax.serve.http.batching import Batcher, BatchLimits, ExpiredError, OverloadedError
from pinfm_jax.serve.http.codec import Codec
from pinfm_jax.serve.http.metrics import Metrics
from pinfm_jax.serve.http.models import Models, Served
from pinfm_jax.serve.http.protocol import HEADER_LENGTH, HttpError

_LOG = logging.getLogger('pinfm.serve')
_ENCODED_AT_ONCE = 256  # candidates: less work than handing it to a thread and back
_EXTENSIONS = ['binary_tensor_data', 'model_repository']


@dataclass(frozen=True)
class Limits:
  """What a call may ask for.

  Attributes:
    batch: how calls are batched, and how many wait.
    timeout_s: longest from arrival to the start of scoring, also where a client allows more.
    max_body: bytes of a body, before and after decompression.
    max_buffered: bytes of all bodies that are held at once.
    max_candidates: of a ranking request.
    max_events: of its history.
  """

  batch: BatchLimits = BatchLimits()
  timeout_s: float = 10.0
  max_body: int = 64 << 20
  max_buffered: int = 512 << 20
  max_candidates: int = 10_000
  max_events: int = 10_000


class Service:
  """The state of a running server, and its endpoints."""

  def __init__(self, name: str, models: Models, limits: Limits, metrics: Metrics):
    """Takes an opened bundle; nothing runs until the application starts."""
    self.name, self.models, self.limits, self.metrics = name, models, limits, metrics
    self.batcher = Batcher(limits.batch, metrics)
    self.draining = False
    self._buffered = 0
    self._codec = Codec(name, limits.max_body, limits.batch.max_queue, limits.max_candidates, limits.max_events)
    # One thread each: more would wait for the interpreter, and encoding what is done must not wait for what arrives.
    self._decoding, self._encoding = ThreadPoolExecutor(1, 'decoding'), ThreadPoolExecutor(1, 'encoding')
    metrics.watch(lambda: self.batcher.pending, lambda: self.models.current.scorer)

  def app(self) -> Starlette:
    """The application."""
    get, post = partial(self._route, methods=['GET']), partial(self._route, methods=['POST'])
    model = '/v2/models/{name}'
    routes = [
      get('/v2', self._server_metadata),
      get('/v2/health/live', self._live),
      get('/v2/health/ready', self._ready),
      get('/metrics', self._metrics_text),
      post('/v2/repository/index', self._index),
      post('/v2/repository/models/{name}/load', self._load),
    ]
    for path in (model, f'{model}/versions/{{version}}'):
      routes += [get(path, self._metadata), get(f'{path}/ready', self._model_ready), post(f'{path}/infer', self._infer)]
    handlers = {HTTPException: self._refuse}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

  async def drain(self) -> None:
    """Takes in nothing more, and waits until everything taken in is answered."""
    self.draining = True
    await self.batcher.drain()

  @asynccontextmanager
  async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
    self.batcher.start()
    yield
    await self.batcher.close()
    self._decoding.shutdown()
    self._encoding.shutdown()
    self.models.close()

  def _route(self, path: str, endpoint: Callable[[Request], Awaitable[Response]], methods: list[str]) -> Route:
    """A route whose errors are the protocol's, and which is counted."""
    name = endpoint.__name__.strip('_')

    async def answer(request: Request) -> Response:
      try:
        response = await endpoint(request)
      except HttpError as error:
        response = _error(error.status, error.message, error.headers)
      except ClientDisconnect:
        response = _error(400, 'the client went away')
      except Exception:  # noqa: BLE001 (a bug, whose text is for the log and not for the client)
        _LOG.exception('%s failed', name)
        response = _error(500, 'the server failed to answer; its log says why')
      self.metrics.http(name, response.status_code)
      return response

    return Route(path, answer, methods=methods)

  async def _refuse(self, request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    self.metrics.http('none', error.status_code)
    return _error(error.status_code, f'{request.method} {request.url.path}: {error.detail}', error.headers)

  async def _server_metadata(self, request: Request) -> Response:
    return JSONResponse({'name': 'pinfm', 'version': __version__, 'extensions': _EXTENSIONS})

  async def _live(self, request: Request) -> Response:
    return JSONResponse({'live': self.batcher.alive}, 200 if self.batcher.alive else 503)

  async def _ready(self, request: Request) -> Response:
    ready = self.batcher.alive and not self.draining
    return JSONResponse({'ready': ready}, 200 if ready else 503)

  async def _model_ready(self, request: Request) -> Response:
    self._served(request)
    return await self._ready(request)

  async def _metadata(self, request: Request) -> Response:
    return JSONResponse(self._served(request).metadata(self.name))

  async def _metrics_text(self, request: Request) -> Response:
    return Response(self.metrics.text(), headers={'Content-Type': CONTENT_TYPE_LATEST})

  async def _index(self, request: Request) -> Response:
    return JSONResponse([{'name': self.name, 'version': self.models.current.version, 'state': 'READY'}])

  async def _load(self, request: Request) -> Response:
    """Opens the bundle anew; a client may not say which, since whoever reaches the port may ask."""
    self._served(request)
    if self.models.loading:
      raise HttpError(409, 'the model is being loaded already')
    try:
      await self.models.reload()
    except UserError as error:
      raise HttpError(400, str(error)) from None
    return Response(status_code=200)

  def _served(self, request: Request) -> Served:
    served, name, version = self.models.current, request.path_params['name'], request.path_params.get('version')
    if name != self.name:
      raise HttpError(404, f'there is no model {name!r}; this server has {self.name!r}')
    if version not in (None, served.version):
      raise HttpError(404, f'there is no version {version!r} of {name!r}; version {served.version!r} answers now')
    return served

  async def _infer(self, request: Request) -> Response:
    begin = monotonic()
    if self.draining:
      raise HttpError(503, 'the server is shutting down', {'Retry-After': '1'})
    served = self._served(request)
    try:
      with self.batcher.seat():  # is there one? Refused before the body is read, which is cheap
        pass
      body = await self._read(request)
      try:
        with self.batcher.seat() as seat:  # not earlier: slow clients would hold seats while they send
          response = await self._answer(request, served, body, seat, begin)
      finally:
        self._buffered -= len(body)
    except OverloadedError as error:
      raise HttpError(429, str(error), {'Retry-After': str(error.retry_after_s)}) from None
    except ExpiredError:
      raise HttpError(504, 'the deadline passed before the request was scored') from None
    self.metrics.seconds('total', monotonic() - begin)
    return response

  async def _answer(self, request: Request, served: Served, body: bytes, seat: Any, begin: float) -> Response:
    encoding, header_length = request.headers.get('content-encoding', ''), request.headers.get(HEADER_LENGTH)
    with self.metrics.part('parse'):
      decode = partial(self._codec.decode, served, body, encoding, header_length)
      call = await asyncio.get_running_loop().run_in_executor(self._decoding, decode)
    scores: list[np.ndarray] = []
    if call.requests:
      seat.take(len(call.requests) - 1)
      timeout = min(call.timeout_s or self.limits.timeout_s, self.limits.timeout_s)
      try:
        scores = await self.batcher.score(served.scorer, call.requests, begin + timeout)
      except UserError as error:  # the request was found right: what scoring needs is not there
        _LOG.warning('scoring failed: %s', error)
        raise HttpError(503, f'scoring failed: {error}', {'Retry-After': '1'}) from None
    with self.metrics.part('encode'):
      encode = partial(self._codec.encode, served, call, scores)
      if sum(map(len, scores)) <= _ENCODED_AT_ONCE:
        content, headers = encode()
      else:
        content, headers = await asyncio.get_running_loop().run_in_executor(self._encoding, encode)
    return Response(content, headers=headers)

  async def _read(self, request: Request) -> bytes:
    """The body, counted in `_buffered` until the caller takes it off.

    Raises:
      HttpError: 413 too long, 408 too slow, 429 too many bodies are held.
    """
    limits, chunks, size = self.limits, [], 0
    announced = request.headers.get('content-length', '0')
    too_long = HttpError(413, f'the body has more than {limits.max_body} bytes; send fewer requests at once')
    if announced.isdigit() and int(announced) > limits.max_body:
      raise too_long
    kept = False
    try:
      with self.metrics.part('read'):
        async with asyncio.timeout(limits.timeout_s):
          async for chunk in request.stream():
            size += len(chunk)
            self._buffered += len(chunk)
            if size > limits.max_body:
              raise too_long
            if self._buffered > limits.max_buffered:
              raise OverloadedError(self.batcher.retry_after_s())
            chunks.append(chunk)
      kept = True
      return b''.join(chunks)
    except TimeoutError:
      raise HttpError(408, f'the body did not arrive within {limits.timeout_s} s', {'Connection': 'close'}) from None
    finally:
      if not kept:
        self._buffered -= size


def _error(status: int, message: str, headers: Any = None) -> Response:
  return Response(json.dumps({'error': message}), status, dict(headers or {}), 'application/json')
