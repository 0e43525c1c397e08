"""`pinfm serve`: a bundle behind the Open Inference Protocol v2 (REST), with batching, reload and metrics."""

import argparse
import logging
import math
import os
import signal
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pinfm_jax.errors import UserError

_HELP = {
  'host': 'address to listen at; 0.0.0.0 = every one',
  'port': 'port to listen at; 0 = any free one, which is printed',
  'name': "the model's name in URLs (default: the directory's)",
  'max_delay_ms': 'longest that a request waits for others to be scored with',
  'max_batch': 'ranking requests scored at once',
  'max_rows': 'candidates scored at once',
  'cache_users': 'users whose keys and values are kept on the device (default: what fits in 1 GiB, at most 1024)',
  'max_queue': 'ranking requests taken in and not yet answered; more are refused with 429',
  'timeout_ms': 'longest from arrival to the start of scoring; then the answer is 504',
  'max_body_mb': 'MiB of a request body, after decompression too',
  'max_candidates': 'of a ranking request',
  'max_events': "of a ranking request's history",
  'rows': 'URLs of row servers (`pinfm serve-rows`), with commas between; no tables are needed here',
  'compiled': 'directory that keeps compiled programs for the next start (default: JAX_COMPILATION_CACHE_DIR, or none)',
  'linger_s': 'after SIGTERM, seconds of answering "not ready" before the port is closed',
}


@dataclass(frozen=True)
class ServerSettings:
  """How a bundle is served; see `pinfm serve --help`."""

  host: str = '127.0.0.1'
  port: int = 8000
  name: str | None = None
  max_delay_ms: float = 2.0
  max_batch: int = 32
  max_rows: int = 8192
  cache_users: int | None = None
  max_queue: int = 256
  timeout_ms: float = 10_000.0
  max_body_mb: int = 64
  max_candidates: int = 10_000
  max_events: int = 10_000
  rows: str | None = None
  compiled: str | None = None
  linger_s: float = 0.0

  def check(self) -> None:
    """Raises UserError for a value that cannot work."""
    for field in fields(self):
      value, least = getattr(self, field.name), 0 if field.name in ('port', 'max_delay_ms', 'linger_s') else 1
      if not isinstance(value, str | None) and not least <= value < math.inf:
        raise UserError(f'--{field.name.replace("_", "-")} is {value}; expected at least {least}, and a finite number')
    if self.port > 65_535:
      raise UserError(f'--port is {self.port}; expected at most 65535')
    if self.name is not None and (not self.name or '/' in self.name):
      raise UserError(f"--name is '{self.name}'; expected a name without '/'")


def serve(bundle: str | Path, settings: ServerSettings) -> None:
  """Serves a bundle until SIGTERM.

  Args:
    bundle: its directory, opened again at every reload: replace it as a whole (`pinfm export --overwrite`, or a link).
    settings: how.

  Raises:
    UserError: the bundle cannot be opened, the address cannot be had, or the extra `serve` is not installed.
  """
  settings.check()
  try:
    from pinfm_jax.serve.http.app import Service
    from pinfm_jax.serve.http.metrics import Metrics
    from pinfm_jax.serve.http.models import Models
    from pinfm_jax.serve.http.run import Server, bind
  except ModuleNotFoundError as error:
    package = (error.name or '').partition('.')[0]
    if package not in ('uvicorn', 'starlette', 'prometheus_client'):
      raise
    raise UserError(f"{package} is not installed: pip install 'pinfm_jax[serve]'") from None
  logging.basicConfig(level=logging.INFO, format='%(asctime)s %(name)s %(levelname)s %(message)s', stream=sys.stderr)
  # The event loop and the scoring thread wait for the interpreter while another thread decodes; at Python's 5 ms each
  # such wait costs more than a small request. 1.2 to 2 times the requests/s with a scorer that costs nothing.
  sys.setswitchinterval(0.0005)
  # While it compiles there is nothing to open anew; SIGTERM ends it by an exception, which cleans up (see `_serve`).
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  # The address first: compiling may take minutes.
  with bind(settings.host, settings.port) as bound, compilation_cache(settings.compiled):
    path = Path(bundle)
    name = settings.name or path.resolve().name
    metrics = Metrics()
    models = Models(lambda: open_scorer(path, settings), metrics)
    service = Service(name, models, limits(settings), metrics)
    host, port = bound.getsockname()[:2]
    where = f'http://{f"[{host}]" if ":" in host else host}:{port}/v2/models/{name}'
    greeting = f'{path}: {models.current.programs} programs compiled, serving {where}'
    Server(service, settings.linger_s, greeting).run(sockets=[bound])


@contextmanager
def compilation_cache(directory: str | None) -> Iterator[None]:
  """Keeps compiled programs in a directory, or else while the block lasts: a reload mostly has the old programs."""
  import jax

  with tempfile.TemporaryDirectory(prefix='pinfm-serve-') as temporary:
    if directory is not None or jax.config.jax_compilation_cache_dir is None:
      jax.config.update('jax_compilation_cache_dir', directory or temporary)
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
      jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    yield


def open_scorer(path: Path, settings: ServerSettings) -> Any:
  """Opens the bundle that is at the path now.

  Raises:
    UserError: there is none, it is damaged or a tower without a ranker, or its row servers do not answer.
  """
  from pinfm_jax.serve.batches import Sizes
  from pinfm_jax.serve.rows.remote import RemoteRows
  from pinfm_jax.serve.scorer import Scorer

  rows = RemoteRows.connect(path, settings.rows.split(',')) if settings.rows is not None else None
  try:
    scorer = Scorer.load(path, rows, Sizes(cache_users=settings.cache_users, max_users=settings.max_batch))
    scorer.check_ranks()
  except BaseException:
    if rows is not None:
      rows.close()
    raise
  if rows is not None:  # with the scorer, which after a reload lives until its last request is answered
    weakref.finalize(scorer, rows.close)
  return scorer


def limits(settings: ServerSettings) -> Any:
  """The settings as what the service checks."""
  from pinfm_jax.serve.http.app import Limits
  from pinfm_jax.serve.http.batching import BatchLimits

  return Limits(
    batch=BatchLimits(settings.max_delay_ms / 1e3, settings.max_batch, settings.max_rows, settings.max_queue),
    timeout_s=settings.timeout_ms / 1e3,
    max_body=settings.max_body_mb << 20,
    max_buffered=8 * settings.max_body_mb << 20,
    max_candidates=settings.max_candidates,
    max_events=settings.max_events,
  )


def add_serve(commands) -> None:
  """Adds `serve` to the `pinfm` command."""
  command = commands.add_parser(
    'serve',
    help='serve a bundle over HTTP',
    description='Open Inference Protocol v2 (REST, JSON and binary tensors) for one bundle. SIGTERM answers what was '
    'taken in and ends; SIGHUP, or POST v2/repository/models/NAME/load, opens the bundle anew and swaps it in.',
  )
  command.add_argument('bundle', metavar='BUNDLE', help='what `pinfm export` wrote')
  for field in fields(ServerSettings):
    kind = str if field.type in (str, str | None) else int if field.type in (int, int | None) else float
    option, default = f'--{field.name.replace("_", "-")}', '' if field.default is None else ' (default: %(default)s)'
    command.add_argument(option, type=kind, default=field.default, metavar='X', help=_HELP[field.name] + default)
  command.set_defaults(function=_serve)


def _serve(arguments: argparse.Namespace) -> None:
  try:
    serve(
      arguments.bundle,
      ServerSettings(**{field.name: getattr(arguments, field.name) for field in fields(ServerSettings)}),
    )
  except SystemExit as end:  # SIGTERM while it compiled: at an ordinary exit, compiling threads would crash
    os._exit(end.code)
