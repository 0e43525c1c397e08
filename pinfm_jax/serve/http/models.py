"""The bundle that answers, and its replacement by a new one while it answers."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pinfm_jax.errors import UserError
from pinfm_jax.serve.http.inputs import InputReader
from pinfm_jax.serve.http.metrics import Metrics
from pinfm_jax.serve.http.outputs import OutputWriter

_LOG = logging.getLogger('pinfm.serve')


@dataclass(frozen=True)
class Served:
  """An opened bundle that is ready to answer.

  Attributes:
    version: counts the bundles that this server has opened, from 1.
    scorer: scores its requests.
    inputs: reads tensors.
    outputs: writes tensors.
    programs: compiled before it was ready.
  """

  version: str
  scorer: Any
  inputs: InputReader
  outputs: OutputWriter
  programs: int

  def metadata(self, name: str) -> dict[str, Any]:
    """The model's metadata, as the protocol has it."""
    return {
      'name': name,
      'versions': [self.version],
      'platform': 'pinfm_jax',
      'inputs': [spec.describe() for spec in self.inputs.specs.values()],
      'outputs': self.outputs.describe(),
    }


class Models:
  """Holds the bundle that answers. A request keeps the bundle it was read with until it is answered."""

  def __init__(self, load: Callable[[], Any], metrics: Metrics):
    """Opens the first bundle.

    Args:
      load: opens the bundle that is in its place now, as a Scorer.
      metrics: told of each attempt.

    Raises:
      UserError: it cannot be served.
    """
    self._load, self._metrics = load, metrics
    self._opened = 0
    self._thread = ThreadPoolExecutor(1, 'loading')
    self._loading = asyncio.Lock()
    self.current = self._open()
    metrics.loaded(self.current.version, self.current.programs)

  @property
  def loading(self) -> bool:
    """Whether a bundle is being opened."""
    return self._loading.locked()

  async def reload(self) -> Served:
    """Opens the bundle anew beside the old one, compiles its programs, and lets it answer from now on.

    Raises:
      UserError: it cannot be served; the old one goes on.
    """
    async with self._loading:
      begin = time.monotonic()
      try:
        served = await asyncio.get_running_loop().run_in_executor(self._thread, self._open)
      except Exception as error:
        self._metrics.refused()
        _LOG.warning('the new bundle is refused, version %s goes on: %s', self.current.version, error)
        if isinstance(error, UserError):
          raise
        raise UserError(f'the new bundle cannot be opened ({type(error).__name__}: {error})') from error
      self.current = served
      self._metrics.loaded(served.version, served.programs)
      _LOG.info('version %s answers, after %.1f s', served.version, time.monotonic() - begin)
      return served

  def close(self) -> None:
    """Ends the loading thread."""
    self._thread.shutdown()

  def _open(self) -> Served:
    scorer = self._load()
    manifest = scorer.bundle.manifest
    inputs, outputs = InputReader(manifest), OutputWriter(manifest)
    programs = scorer.warm_up()
    self._opened += 1
    return Served(str(self._opened), scorer, inputs, outputs, programs)
