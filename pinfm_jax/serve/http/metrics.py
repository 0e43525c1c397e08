"""Prometheus metrics of the server."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = tuple(1 << power for power in range(0, 15, 2))
_CACHE = ('hits', 'extended', 'misses', 'evicted')


class Metrics:
  """Everything that /metrics shows; one registry a server."""

  def __init__(self) -> None:
    """Makes the registry."""
    self.registry = registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    self._http = Counter('pinfm_http_requests', 'HTTP requests answered', ('route', 'code'), registry=registry)
    self._requests = Counter('pinfm_ranking_requests', 'ranking requests scored', registry=registry)
    self._candidates = Counter('pinfm_candidates', 'candidates scored', registry=registry)
    self._batch_requests = Histogram(
      'pinfm_batch_requests', 'ranking requests of a batch', buckets=_SIZES[:6], registry=registry
    )
    self._batch_rows = Histogram('pinfm_batch_candidates', 'candidates of a batch', buckets=_SIZES, registry=registry)
    self._seconds = Histogram(
      'pinfm_seconds', 'time of an inference call by part: read, parse, queue, score (a batch), encode, total',
      ('part',), buckets=_SECONDS, registry=registry,
    )  # fmt: skip
    self._reloads = Counter('pinfm_reloads', 'bundles asked to be loaded', ('result',), registry=registry)
    self._programs = Gauge('pinfm_programs_warmed', 'programs compiled before the model was ready', registry=registry)
    self._version = Gauge('pinfm_model_version', 'version of the model that answers', registry=registry)

  def watch(self, pending: Callable[[], int], scorer: Callable[[], Any]) -> None:
    """Shows the queue's depth, and the counts of the scorer's cache if it has one, as they are when asked."""
    Gauge('pinfm_queue_requests', 'ranking requests taken in and not yet answered', registry=self.registry
          ).set_function(pending)  # fmt: skip
    self.registry.register(_CacheCollector(scorer))

  def http(self, route: str, code: int) -> None:
    """An HTTP request was answered."""
    self._http.labels(route, str(code)).inc()

  def batch(self, requests: int, rows: int, waited_s: Sequence[float], seconds: float) -> None:
    """A batch was scored."""
    self._requests.inc(requests)
    self._candidates.inc(rows)
    self._batch_requests.observe(requests)
    self._batch_rows.observe(rows)
    for waited in waited_s:
      self._seconds.labels('queue').observe(waited)
    self._seconds.labels('score').observe(seconds)

  @contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Times a part of an inference call."""
    begin = perf_counter()
    try:
      yield
    finally:
      self.seconds(name, perf_counter() - begin)

  def seconds(self, name: str, seconds: float) -> None:
    """A part of an inference call took so long."""
    self._seconds.labels(name).observe(seconds)

  def loaded(self, version: str, programs: int) -> None:
    """A bundle answers from now on."""
    self._reloads.labels('loaded').inc()
    self._version.set(int(version))
    self._programs.set(programs)

  def refused(self) -> None:
    """A bundle could not be loaded."""
    self._reloads.labels('refused').inc()

  def text(self) -> bytes:
    """The exposition, in the text format."""
    return generate_latest(self.registry)


class _CacheCollector:
  """Counts of the cache of users; they start anew with each bundle."""

  def __init__(self, scorer: Callable[[], Any]):
    self._scorer = scorer

  def collect(self) -> Iterator[CounterMetricFamily]:
    cache = getattr(self._scorer(), 'cache', None)
    if cache is None:
      return
    family = CounterMetricFamily('pinfm_user_cache', 'users by what the cache had of them', labels=('event',))
    for name in _CACHE:
      family.add_metric((name,), getattr(cache, name))
    yield family
