"""One row of a study's tables, and how rows are judged."""

from collections.abc import Mapping
from dataclasses import dataclass

from pinfm_jax.bench.timing import Spread
from pinfm_jax.study.consistency import Disagreement
from pinfm_jax.study.costs import Cost
from pinfm_jax.study.recommend import Limits, Measured


@dataclass(frozen=True)
class Decision:
  """How blocks are judged.

  Attributes:
    metric: of the main label: 'auc', 'hit@3' or 'logloss'; tuning and recommendation go by it.
    limits: of memory and latency.
    device_bytes: memory of the device that the limit's share is of.
    device: the same as it was given, for the reader.
    segments: two numbers of events that part new, light and heavy users; empty = thirds of the requests.
  """

  metric: str = 'auc'
  limits: Limits = Limits()
  device_bytes: float = 80e9
  device: str = '80GB'
  segments: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
  """One block.

  Attributes:
    name: of the block.
    settings: what it was trained with, besides the launch file's.
    figures: 'save/auc' -> one value a seed.
    cost: parameters and memory.
    memory: peak training memory, as a ratio to the baseline's.
    share: of the device.
    step: training step time, as a ratio to the baseline's.
    latency: serving latency, likewise.
    disagreement: of its retrains; None of a single seed.
    slices: part of the split -> mean of the metric over seeds.
  """

  name: str
  settings: str
  figures: Mapping[str, tuple[float, ...]]
  cost: Cost
  memory: float
  share: float
  step: Spread
  latency: Spread
  disagreement: Disagreement | None
  slices: Mapping[str, float]

  def measured(self, figure: str) -> Measured:
    """What the recommendation reads."""
    return Measured(self.name, self.figures[figure], self.memory, self.latency.median, self.share)
