"""Reads a compiled program's text: what its collectives carry and what its matmuls compute, loops multiplied out.

XLA's own cost analysis counts a loop's body once, so a decoder that is scanned over its layers would show two layers.
Here a computation counts as often as it runs: in a loop, as often as XLA states (`known_trip_count`), or as its
condition `counter < constant` says. A loop of unknown length (the exchange's rounds: one when ids are uniform) counts
once, and is reported.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

KINDS = ('all-to-all', 'all-gather', 'reduce-scatter', 'all-reduce', 'collective-permute')

_BITS = {'pred': 8, 's4': 4, 'u4': 4, 'bf16': 16, 'token': 0, 'opaque': 0}
_SHAPE = re.compile(r'([a-z]\w*)\[([\d,]*)\]')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass
class Traffic:
  """One kind of collective in one step of one device.

  Attributes:
    calls: how often it runs.
    payload: bytes that the device puts in.
    sent: bytes that it sends to others, by the usual ring or direct algorithm.
  """

  calls: int = 0
  payload: float = 0.0
  sent: float = 0.0


@dataclass
class ProgramCounts:
  """What was counted in a program.

  Attributes:
    traffic: by kind of collective.
    matmul_flops: 2 x output elements x contracted elements, of every `dot`.
    open_loops: loops of unknown length outside other such loops, counted once.
  """

  traffic: dict[str, Traffic] = field(default_factory=lambda: defaultdict(Traffic))
  matmul_flops: float = 0.0
  open_loops: int = 0


@dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  opcode: str
  rest: str


def count_program(text: str) -> ProgramCounts:
  """Walks the program from its entry computation.

  Args:
    text: of a compiled module (`compiled.as_text()`).
  """
  computations, entry = _parse(text)
  counts = ProgramCounts()
  for name, times in _runs(computations, entry, counts).items():
    shapes = {instruction.name: instruction.shape for instruction in computations[name]}
    for instruction in computations[name]:
      _count(instruction, shapes, times, counts)
  return counts


def shape_bytes(shape: str) -> list[int]:
  """Bytes of each array of an HLO shape, `f32[8,4]{1,0}` or a tuple of such."""
  return [-(-math.prod(_dimensions(size)) * _bits(kind) // 8) for kind, size in _SHAPE.findall(_without_layouts(shape))]


def group_size(rest: str) -> int:
  """Devices that take part in one group of a collective; 0 = all of them (or pairs, for a permutation)."""
  match = re.search(r'replica_groups=\[(\d+),(\d+)\]', rest)
  if match:
    return int(match[2])
  match = re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', rest)
  if match:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
    return math.prod(int(part) if part else sizes[name] for name, part in axes)
  match = re.search(r'replica_groups=\{\{([\d,]*)\}', rest)
  return len(match[1].split(',')) if match else 0


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  computations: dict[str, list[_Instruction]] = {}
  entry, current = '', None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif current is not None:
      instruction = _INSTRUCTION.match(line)
      if instruction:
        current.append(_instruction(instruction[1], instruction[2]))
  return computations, entry


def _instruction(name: str, text: str) -> _Instruction:
  """Splits `SHAPE OPCODE(OPERANDS), ATTRIBUTES`; a tuple's shape has brackets of its own."""
  depth = 0
  for place, character in enumerate(text):
    depth += (character in '([{') - (character in ')]}')
    if character == ' ' and depth == 0:
      opcode, _, rest = text[place + 1 :].partition('(')
      return _Instruction(name, text[:place], opcode, rest)
  return _Instruction(name, text, '', '')


def _runs(computations: dict[str, list[_Instruction]], entry: str, counts: ProgramCounts) -> dict[str, float]:
  """How often each computation runs a step."""
  times: dict[str, float] = defaultdict(float)

  def visit(name: str, factor: float) -> None:
    times[name] += factor
    for instruction in computations[name]:
      inner = factor
      if instruction.opcode == 'while':
        trips = _trip_count(instruction, computations)
        inner = factor * (trips or 1)
        counts.open_loops += trips is None
      for called in _called(instruction.rest):
        if called in computations:
          visit(called, inner)

  visit(entry, 1.0)
  return times


def _trip_count(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
  """How often a loop's body runs; None if the program does not say. JAX's counters start at 0 and lie in front."""
  stated = _TRIPS.search(loop.rest)
  if stated:
    return int(stated[1])
  condition = re.search(r'condition=%?([\w.\-]+)', loop.rest)
  by_name = {instruction.name: instruction for instruction in computations[condition[1]]}
  compare = computations[condition[1]][-1]
  operands = re.match(r'%([\w.\-]+), %([\w.\-]+)\), direction=LT', compare.rest)
  if compare.opcode != 'compare' or not operands:
    return None
  counter, limit = by_name[operands[1]], by_name[operands[2]]
  if counter.opcode != 'get-tuple-element' or 'index=0' not in counter.rest or limit.opcode != 'constant':
    return None
  return int(limit.rest.partition(')')[0])


def _called(rest: str) -> Iterator[str]:
  yield from _CALLED.findall(rest)
  for names in _BRANCHES.findall(rest):
    yield from (name.strip().lstrip('%') for name in names.split(','))


def _count(instruction: _Instruction, shapes: dict[str, str], times: float, counts: ProgramCounts) -> None:
  opcode = instruction.opcode
  if opcode == 'dot':
    counts.matmul_flops += times * _dot_flops(instruction, shapes)
    return
  kind = opcode.removesuffix('-start')
  if kind not in KINDS:
    return
  payload, sent = _collective_bytes(kind, opcode != kind, instruction)
  traffic = counts.traffic[kind]
  traffic.calls += int(times)
  traffic.payload += times * payload
  traffic.sent += times * sent


def _collective_bytes(kind: str, started: bool, instruction: _Instruction) -> tuple[float, float]:
  """Bytes that one device puts in and sends.

  all-reduce: a ring sends 2 (n - 1) / n of its input; reduce-scatter: (n - 1) / n of its input; all-gather: (n - 1)
  times its part; all-to-all: (n - 1) / n of its input; collective-permute: its input.
  """
  arrays = shape_bytes(instruction.shape)
  size = group_size(instruction.rest)
  if kind == 'collective-permute':
    payload = float(arrays[0] if started else sum(arrays))
    return payload, payload
  if started and kind == 'all-gather':  # (inputs, outputs)
    arrays = arrays[len(arrays) // 2 :]
  total = float(sum(arrays))
  size = max(size, 1)
  share = (size - 1) / size
  if kind == 'all-gather':
    return total / size, total * share
  if kind == 'reduce-scatter':
    return total * size, total * (size - 1)
  return total, total * share * (2 if kind == 'all-reduce' else 1)


def _dot_flops(instruction: _Instruction, shapes: dict[str, str]) -> float:
  output = math.prod(_dimensions(_SHAPE.findall(instruction.shape)[0][1]))
  operands, _, attributes = instruction.rest.partition(')')
  left = operands.split('%')[1].split(',')[0].strip() if '%' in operands else operands.split(',')[0].split()[-1]
  sizes = _dimensions(_SHAPE.findall(shapes[left])[0][1])
  contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', attributes)
  return 2.0 * output * math.prod(sizes[int(i)] for i in contracted[1].split(',') if i) if contracted else 2.0 * output


def _dimensions(text: str) -> list[int]:
  return [int(size) for size in text.split(',') if size]


def _bits(kind: str) -> int:
  if kind in _BITS:
    return _BITS[kind]
  digits = re.match(r'[a-z]+(\d+)', kind)
  return int(digits[1]) if digits else 0


def _without_layouts(shape: str) -> str:
  return re.sub(r'\{[^}]*\}|/\*.*?\*/', '', shape)
