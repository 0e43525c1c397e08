"""A roofline estimate of a step's time: the work over the chip's peak rates."""

from dataclasses import dataclass

from pinfm_jax.plan.chips import Chip
from pinfm_jax.plan.problem import Problem
from pinfm_jax.plan.work import Bytes


@dataclass(frozen=True)
class Estimate:
  """Seconds of one step.

  The longest of the three is a bound if everything overlaps, their sum if nothing does; both at peak rates.
  """

  compute: float
  memory: float
  network: float

  @property
  def overlapped(self) -> float:
    """If everything overlaps."""
    return max(self.compute, self.memory, self.network)

  @property
  def serial(self) -> float:
    """If nothing overlaps."""
    return self.compute + self.memory + self.network

  @property
  def bound(self) -> str:
    """Which of the three is the longest."""
    terms = {'compute': self.compute, 'memory': self.memory, 'network': self.network}
    return max(terms, key=terms.get)


def estimate(problem: Problem, flops: float, moved: Bytes, sent: float, chip: Chip) -> Estimate:
  """The three terms.

  Args:
    problem: what runs.
    flops: of one device.
    moved: memory traffic of one device.
    sent: bytes that one device sends to others.
    chip: peak rates. More devices than a node holds are charged at the network's rate for everything, since most of
      an all-to-all's partners are then elsewhere.
  """
  rate = chip.flops * (1.0 if problem.model.tower.dtype == 'bfloat16' else chip.float32)
  link = chip.link if problem.devices <= chip.node else chip.network
  return Estimate(flops / rate, moved.total / chip.bandwidth, sent / link)
