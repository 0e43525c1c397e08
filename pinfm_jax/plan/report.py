"""The plan as text."""

from pinfm_jax.plan.chips import USABLE, Chip
from pinfm_jax.plan.compile import Compiled
from pinfm_jax.plan.fit import Memory, Suggestion
from pinfm_jax.plan.problem import NUM_ACTIONS, NUM_SURFACES, Problem
from pinfm_jax.plan.roofline import Estimate
from pinfm_jax.plan.work import Bytes, Flops

_WIDTH = 36


def heading(problem: Problem, chip: Chip, parameters: tuple[int, int]) -> list[str]:
  """What is planned."""
  experiment, model, pretrain = problem.experiment, problem.model, problem.experiment.pretrain
  data, fsdp, tensor = problem.shape
  tables, tower = model.tables, model.tower
  lines = [
    f'plan: pretraining of {experiment.name} on {problem.devices} x {chip.name}, mesh data {data} x fsdp {fsdp} x '
    f'model {tensor}, table rows over {",".join(problem.layout.table_axes)}',
    f'{_si(parameters[0])} parameters in tables ({tables.sub_tables} x {tables.rows:,} x {tables.width}, '
    f'{tables.dtype}), {_si(parameters[1])} in the tower ({tower.layers} layers x {tower.width}, {tower.dtype})',
    f'global batch: {pretrain.batch_segments} segments x {pretrain.segment_length} events = {problem.tokens:,} tokens',
  ]
  if not (experiment.model.num_actions and experiment.model.num_surfaces):
    lines.append(f'vocabularies without a data set: {NUM_ACTIONS} actions, {NUM_SURFACES} surfaces')
  return lines


def memory_table(memory: Memory, compiled: Compiled, chip: Chip) -> list[str]:
  """Memory by part, how each figure came about, and whether it fits."""
  state = memory.state
  rows = [
    ('tables', state.tables, 'arithmetic'),
    ('accumulators', state.accumulators, 'arithmetic'),
    ('tower parameters', state.tower, 'arithmetic'),
    ('optimizer moments', state.moments, 'arithmetic'),
    ('step, keys, counters', state.rest, 'arithmetic'),
    ('batch inputs (two batches)', memory.batches, 'arithmetic'),
    ('padding in the layout of the chip', memory.padding, f'compiled for {compiled.devices}'),
    ('activations and temporaries', memory.temporaries, f'compiled for {compiled.devices}'),
    ('outputs not in place', memory.not_in_place, f'compiled for {compiled.devices}'),
  ]
  lines = ['', 'memory of one device']
  lines += [_line(name, _bytes(size), how) for name, size, how in rows]
  verdict = 'fits' if memory.total <= chip.usable else 'does not fit'
  lines.append(_line('total', _bytes(memory.total), f'{verdict}: {_bytes(chip.usable)} usable ({USABLE:.0%} of '
                     f'{_bytes(chip.memory)})'))  # fmt: skip
  if 'simulated' in compiled.devices:
    lines.append("  (CPU computes bfloat16 in float32 and has layouts of its own: the chip's temporaries differ)")
  return lines


def work_table(flops: Flops, moved: Bytes, compiled: Compiled, devices: int) -> list[str]:
  """FLOPs, memory traffic and collectives of one step."""
  lines = ['', 'work of one step']
  share = flops.one_device(devices)
  lines += [
    _line('FLOPs, all devices', _si(flops.model), f'arithmetic: dense {_si(flops.dense)}, attention '
          f'{_si(flops.attention)}, logits {_si(flops.logits)}; recomputed besides {_si(flops.recomputed)}'),
    _line('FLOPs, one device', _si(share), 'arithmetic, recomputation included, spread evenly'),
  ]  # fmt: skip
  if compiled.matmul_flops:
    lines.append(_line('', _si(compiled.matmul_flops), f'matmuls of the program for {compiled.devices}, loops counted'))
    if compiled.matmul_flops > 1.2 * share:
      times = compiled.matmul_flops / share
      lines.append(f'  (the program computes {times:.1f} times the even share: several devices do the same work)')
  lines.append(_line('', _si(compiled.cost_flops), "XLA's cost analysis, which takes a loop's body once"))
  lines += [
    _line('bytes moved, one device', _bytes(moved.total), f'arithmetic: tower {_bytes(moved.tower)}, rows '
          f'{_bytes(moved.rows)}, activations {_bytes(moved.activations)}, logits {_bytes(moved.logits)}'),
    _line('', _bytes(compiled.cost_bytes), "XLA's cost analysis, which takes a loop's body once"),
  ]  # fmt: skip
  lines += ['', f'collectives of one device in one step (in the program for {compiled.devices}; loops counted)']
  for kind, (calls, payload, sent) in sorted(compiled.traffic.items()):
    lines.append(_line(kind, _bytes(sent), f'sent, of {_bytes(payload)} put in, in {calls} calls'))
  lines.append(_line('total', _bytes(compiled.sent), 'sent'))
  if compiled.open_loops:
    lines.append(f'  ({compiled.open_loops} loops of unknown length, such as the rounds of the exchange, counted once)')
  return lines


def estimate_table(estimate: Estimate, flops: Flops, problem: Problem, chip: Chip) -> list[str]:
  """The roofline estimate."""
  peak = chip.flops * problem.devices
  lines = ['', f'estimate for {problem.devices} x {chip.name} at peak rates (a roofline, not a measurement)']
  for name, seconds in (
    ('compute', estimate.compute), ('memory', estimate.memory), ('network', estimate.network),
  ):  # fmt: skip
    lines.append(_line(name, _seconds(seconds), 'the bound' if name == estimate.bound else ''))
  for name, seconds in (('step, all overlapped', estimate.overlapped), ('step, nothing overlapped', estimate.serial)):
    lines.append(_line(name, _seconds(seconds), f'{problem.tokens / seconds:,.0f} tokens/s, MFU at most '
                       f'{flops.model / seconds / peak:.0%}'))  # fmt: skip
  return lines


def verdict(memory: Memory, chip: Chip, problem: Problem, suggestion: Suggestion | None) -> str:
  """One line: fits, or the nearest change that does."""
  if memory.total <= chip.usable:
    return f'fits: {_bytes(memory.total)} of {_bytes(chip.usable)} usable'
  over = f'does not fit: {_bytes(memory.total)} of {_bytes(chip.usable)} usable'
  if suggestion is None:
    return f'{over}; no change of batch, recomputation, table type, mesh or up to 256 times the devices fits'
  change = suggestion.change
  words = ' '.join(f'{key}={",".join(v) if isinstance(v, tuple) else v}' for key, v in change.settings.items())
  devices = f'--devices {change.devices} ' if change.devices != problem.devices else ''
  how = {
    'compiled': 'verified by compiling it',
    'arithmetic': 'by arithmetic scaled from the compiled plan, not compiled',
  }[suggestion.verified]
  option = f'--set {words}' if words else ''
  return f'{over}\nnearest change that fits: {devices}{option}'.rstrip() + f' -> {_bytes(suggestion.total)} ({how})'


def _line(name: str, figure: str, how: str) -> str:
  return f'  {name:{_WIDTH}} {figure:>10}  {how}'.rstrip()


def _bytes(size: float) -> str:
  for unit, scale in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
    if size >= scale:
      return f'{size / scale:.2f} {unit}'
  return f'{size:.0f} B'


def _si(count: float) -> str:
  for unit, scale in (('P', 1e15), ('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
    if count >= scale:
      return f'{count / scale:.2f} {unit}'
  return f'{count:.0f}'


def _seconds(seconds: float) -> str:
  return f'{seconds * 1e3:.2f} ms'
