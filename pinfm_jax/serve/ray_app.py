"""A bundle on Ray Serve: several replicas, on one machine or many, behind Ray's proxies, with Ray's own batching.

  serve run pinfm_jax.serve.ray_app:application bundle=/models/quickstart replicas=4

A POST holds one ranking request as JSON, as `pinfm score` takes it, and is answered with its result. Every replica
opens the bundle; on one machine the mapped tables are in memory once. Each has its own cache of users.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pinfm_jax.errors import UserError
from pinfm_jax.serve.batches import Sizes
from pinfm_jax.serve.scorer import Scorer


@dataclass(frozen=True)
class RaySettings:
  """Arguments of the application.

  Attributes:
    bundle: its directory, on every machine.
    replicas: processes that score.
    cpus: that Ray sets aside for each.
    gpus: the same; may be a fraction.
    max_batch: requests scored at once.
    max_delay_ms: longest that a request waits for others.
    cache_users: users whose keys and values each replica keeps; 0 = what fits in 1 GiB, at most 1,024.
    max_queue: requests that may wait for the replicas; Ray answers more with 503.
  """

  bundle: str
  replicas: int = 1
  cpus: float = 1.0
  gpus: float = 0.0
  max_batch: int = 32
  max_delay_ms: float = 2.0
  max_queue: int = 256
  cache_users: int = 0

  @classmethod
  def parse(cls, arguments: Mapping[str, Any]) -> 'RaySettings':
    """Reads arguments as Ray passes them: strings from the command line, values from a configuration file.

    Raises:
      UserError: an unknown or missing argument, or a value that cannot work.
    """
    known = {field.name: field.type for field in fields(cls)}
    unknown = sorted(set(arguments) - set(known))
    if unknown or 'bundle' not in arguments:
      raise UserError(f'got the arguments {sorted(arguments)}, expected bundle=DIR and some of {", ".join(known)}')
    values: dict[str, Any] = {}
    for name, value in arguments.items():
      try:
        values[name] = known[name](value)
      except (TypeError, ValueError):
        raise UserError(f'got {name}={value!r}, expected {known[name].__name__}') from None
    settings = cls(**values)
    for name, least in (('replicas', 1), ('max_batch', 1), ('max_queue', 1), ('cpus', 0), ('gpus', 0)):
      if not getattr(settings, name) >= least:
        raise UserError(f'got {name}={getattr(settings, name)}, expected at least {least}')
    return settings


class BundleReplica:
  """One process that scores with a bundle."""

  def __init__(self, settings: RaySettings):
    """Opens the bundle and compiles its programs; Ray sends no request before that is done."""
    self._scorer = Scorer.load(settings.bundle, sizes=Sizes(settings.cache_users or None, settings.max_batch))
    self._scorer.check_ranks()
    self._scorer.warm_up()
    self.results.set_max_batch_size(settings.max_batch)
    self.results.set_batch_wait_timeout_s(settings.max_delay_ms / 1e3)

  async def __call__(self, request: Request) -> Response:
    """Answers one ranking request; 400 with {"error"} where it is malformed."""
    try:
      document = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
      return JSONResponse({'error': f'not valid JSON ({error}); expected one ranking request'}, 400)
    result = await self.results(document)
    return JSONResponse(result, 400 if 'error' in result else 200)

  @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)
  async def results(self, documents: list[Any]) -> list[dict[str, Any]]:
    """The result of each document, or {"error"}; a bad one harms no other."""
    return await asyncio.to_thread(self._results, documents)

  def _results(self, documents: list[Any]) -> list[dict[str, Any]]:
    answers: list[Any] = []
    for document in documents:
      try:
        answers.append(self._scorer.parse(document))
      except UserError as error:
        answers.append({'error': str(error)})
    scored = iter(self._scorer.results([answer for answer in answers if not isinstance(answer, dict)]))
    return [answer if isinstance(answer, dict) else next(scored) for answer in answers]


def application(arguments: Mapping[str, Any]) -> serve.Application:
  """The application builder that `serve run`, and a configuration file's `import_path`, name.

  Args:
    arguments: see RaySettings.

  Raises:
    UserError: an argument that cannot work.
  """
  settings = RaySettings.parse(arguments)
  return serve.deployment(
    BundleReplica,
    name='pinfm',
    num_replicas=settings.replicas,
    max_ongoing_requests=2 * settings.max_batch,  # the next batch gathers while one is scored
    max_queued_requests=settings.max_queue,
    ray_actor_options={'num_cpus': settings.cpus, 'num_gpus': settings.gpus},
  ).bind(settings)
