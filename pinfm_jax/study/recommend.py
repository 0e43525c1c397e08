"""Which block to take: the best of those within the limits, and whether the difference is more than seed noise."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from pinfm_jax.errors import UserError

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Measured:
  """What a decision needs to know of a block.

  Attributes:
    name: of the block.
    values: the metric, one value a seed.
    memory: peak training memory, as a ratio to the baseline's.
    latency: serving latency, likewise.
    share: peak training memory as a share of the device.
  """

  name: str
  values: tuple[float, ...]
  memory: float
  latency: float
  share: float

  @property
  def mean(self) -> float:
    """Mean over seeds."""
    return sum(self.values) / len(self.values)

  @property
  def std(self) -> float:
    """Standard deviation over seeds; NaN of a single one."""
    count = len(self.values)
    return math.sqrt(sum((v - self.mean) ** 2 for v in self.values) / (count - 1)) if count > 1 else math.nan


@dataclass(frozen=True)
class Limits:
  """What a block may cost.

  Attributes:
    memory: how much more peak training memory than the baseline, 0.05 = 5 % more.
    latency: how much more serving latency than the baseline.
    share: of the device's memory that training may take.
  """

  memory: float = 0.05
  latency: float = 0.0
  share: float = 0.6

  def broken(self, block: Measured) -> tuple[str, ...]:
    """The limits that a block does not keep, in words."""
    found = []
    if not block.memory <= 1 + self.memory:
      found.append(f'memory {100 * (block.memory - 1):+.1f} % of at most {100 * self.memory:+g} %')
    if not block.latency <= 1 + self.latency:
      found.append(f'latency {100 * (block.latency - 1):+.1f} % of at most {100 * self.latency:+g} %')
    if not block.share <= self.share:
      found.append(f'{100 * block.share:.1f} % of the device of at most {100 * self.share:g} %')
    return tuple(found)


@dataclass(frozen=True)
class Difference:
  """Mean of a block's metric less that of another, and how much of it seeds alone would make.

  Attributes:
    value: the difference.
    noise: half the width of its 95 % interval (Welch's t over seeds); NaN where a block has a single seed.
  """

  value: float
  noise: float

  @property
  def is_noise(self) -> bool:
    """Whether seeds alone could make it; so it is where one seed says nothing of that."""
    return not abs(self.value) > self.noise

  def text(self) -> str:
    """'+0.0012, within seed noise (± 0.0020)'."""
    if math.isnan(self.noise):
      return f'{self.value:+.4f}, from one seed, whose noise is not known'
    words = 'within seed noise' if self.is_noise else 'beyond seed noise'
    return f'{self.value:+.4f}, {words} (± {self.noise:.4f})'


@dataclass(frozen=True)
class Recommendation:
  """The decision.

  Attributes:
    name: the block to take; '' where none keeps the limits.
    difference: to the baseline; None without a block, or of the baseline itself.
    excluded: block -> why it was not considered.
    equals: blocks within the limits whose difference to it is within seed noise, cheapest latency first.
  """

  name: str
  difference: Difference | None
  excluded: Mapping[str, tuple[str, ...]]
  equals: tuple[str, ...] = ()

  def text(self, metric: str, baseline: str) -> str:
    """The decision in a paragraph."""
    if not self.name:
      reasons = '; '.join(f'{name}: {", ".join(why)}' for name, why in self.excluded.items())
      return f'Recommended: none, no block keeps the limits ({reasons}).'
    parts = [f'Recommended: {self.name}.']
    if self.difference is None:
      parts.append('It is the baseline: no block within the limits has a better mean.')
    else:
      parts.append(f'{metric} against {baseline}: {self.difference.text()}.')
      if self.difference.is_noise:
        parts.append(f'These seeds do not show that it is better than {baseline}.')
    if self.equals:
      parts.append(f'Not told apart from it by these seeds: {", ".join(self.equals)}.')
    if self.excluded:
      reasons = '; '.join(f'{name} ({", ".join(why)})' for name, why in self.excluded.items())
      parts.append(f'Beyond the limits: {reasons}.')
    return ' '.join(parts)


def recommend(blocks: Sequence[Measured], baseline: str, limits: Limits, metric: str = 'auc') -> Recommendation:
  """The block with the best mean metric among those that keep the limits.

  Args:
    blocks: the baseline among them; a block whose mean is undefined is left out.
    baseline: name of the block that ratios are relative to.
    limits: what a block may cost.
    metric: which metric it is; logloss is better when lower.

  Raises:
    ValueError: the baseline is not among the blocks.
  """
  named = {block.name: block for block in blocks}
  if baseline not in named:
    raise ValueError(f"the baseline '{baseline}' is not among the blocks: {', '.join(named)}")
  sign = -1 if metric == 'logloss' else 1
  excluded = {block.name: limits.broken(block) for block in blocks if limits.broken(block)}
  excluded |= {block.name: (f'{metric} is undefined',) for block in blocks if math.isnan(block.mean)}
  allowed = [block for block in blocks if block.name not in excluded]
  if not allowed:
    return Recommendation('', None, excluded)
  best = max(allowed, key=lambda block: (sign * block.mean, block.name == baseline))
  others = [b for b in allowed if b is not best and len(b.values) > 1 and difference(best, b).is_noise]
  equals = tuple(block.name for block in sorted(others, key=lambda block: block.latency))
  to_baseline = None if best.name == baseline else difference(best, named[baseline])
  return Recommendation(best.name, to_baseline, excluded, equals)


def difference(block: Measured, other: Measured) -> Difference:
  """Difference of two blocks' means with the noise that their seeds show (Welch's t, unequal variances)."""
  value, parts = block.mean - other.mean, [(b.std**2 / len(b.values), len(b.values)) for b in (block, other)]
  if any(count < 2 for _, count in parts):
    return Difference(value, math.nan)
  variance = sum(part for part, _ in parts)
  if variance == 0:
    return Difference(value, 0.0)
  freedom = variance**2 / sum(part**2 / (count - 1) for part, count in parts)
  return Difference(value, float(stdtrit(freedom, (1 + _CONFIDENCE) / 2)) * math.sqrt(variance))


def pareto_front(points: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
  """Names of the (cost, quality) points that no other one beats: cheaper and at least as good, or as cheap and better.

  In the order of their cost; of equal points all are named.
  """

  def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] >= b[1] and a != b

  front = [name for name, point in points.items() if not any(beats(other, point) for other in points.values())]
  return tuple(sorted(front, key=lambda name: points[name]))


def parse_percent(text: str, option: str, signed: bool) -> float:
  """'+5%' as 0.05.

  Args:
    text: what was given.
    option: where, for the message.
    signed: whether it is a change ('+5%', '-10%', '0%'), not a share ('60%').

  Raises:
    UserError: it is none.
  """
  found = re.fullmatch(r'([+-]?)(\d+(?:\.\d+)?)\s*%', text.strip())
  if not found or (not signed and (found[1] or not 0 < float(found[2]) <= 100)):
    example = 'a change such as +5% or -10%' if signed else 'a share such as 60%'
    raise UserError(f"{option} got '{text}'; expected {example}")
  return float(found[1] + found[2]) / 100


def parse_bytes(text: str, option: str) -> float:
  """'80GB' (10^9) or '80GiB' (2^30) as bytes.

  Raises:
    UserError: it is none, or 0.
  """
  found = re.fullmatch(r'(\d+(?:\.\d+)?)\s*([MGT])(i?)B', text.strip())
  if not found or not float(found[1]):
    raise UserError(f"{option} got '{text}'; expected a size such as 80GB or 24GiB")
  power = 'MGT'.index(found[2]) + 2
  return float(found[1]) * (1024.0 if found[3] else 1000.0) ** power


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
  """'5,50' as numbers.

  Raises:
    UserError: a part is none.
  """
  try:
    return tuple(float(part) for part in text.split(','))
  except ValueError:
    raise UserError(f"{option} got '{text}'; expected numbers with commas between them, such as 5,50") from None
