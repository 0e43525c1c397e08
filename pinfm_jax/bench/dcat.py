"""`pinfm bench dcat`: candidates a second of DCAT and of the other forms, serving and training, and its cost curves."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax

from pinfm_jax.bench import plot
from pinfm_jax.bench.dcat_runs import Case, matmul_flops, pass_flops, serving_runs, training_runs
from pinfm_jax.bench.results import Figure, Findings, environment, make_directory, write_findings
from pinfm_jax.bench.timing import Spread, interleave, ratios
from pinfm_jax.config import TowerConfig
from pinfm_jax.errors import UserError

PARTS = ('serving', 'training', 'curve')

_QUICKSTART = Case(
  'quickstart', TowerConfig(layers=2, width=64, heads=4, output_width=64), item_width=64, candidates=1000, length=256,
  dense_rows=8, gather_rows=1000, chunk_rows=25, training_users=4,
)  # fmt: skip
_PAPER = Case(
  'paper', TowerConfig(layers=12, width=512, heads=8, output_width=256), item_width=256, candidates=1000, length=256,
  dense_rows=4, gather_rows=1000, chunk_rows=25, training_users=1,
)  # fmt: skip

# Case -> how many times the candidates/s of the dense and of the gather form are asked, on CPU and on GPU.
ASKED = {'cpu': {'quickstart': (100.0, 4.0), 'paper': (100.0, 2.0)}, 'gpu': {'paper': (20.0, None)}}
ASKED_TRAINING = 5.0
ASKED_SHARE = {'gpu': 0.35}  # of the measured matmul peak


@dataclass(frozen=True)
class DcatSizes:
  """What is measured.

  Attributes:
    cases: towers, each with the sizes of its passes.
    train_candidates: of each history in training.
    curve_candidates: candidates a user, with the first case's tower and history.
    curve_lengths: lengths of history, with its candidates.
    rounds: timed rounds.
    peak: side of the square matmul whose FLOP/s are the machine's peak.
    quick: nothing is asked of these sizes.
  """

  cases: tuple[Case, ...] = (_QUICKSTART, _PAPER)
  train_candidates: int = 10
  curve_candidates: tuple[int, ...] = (1, 10, 100, 1_000, 10_000)
  curve_lengths: tuple[int, ...] = (64, 128, 256, 512, 1_024, 2_048)
  rounds: int = 5
  peak: int = 2048
  quick: bool = False


FULL = DcatSizes()
QUICK = DcatSizes(
  (Case(
    'quickstart', TowerConfig(layers=2, width=16, heads=2, output_width=8), item_width=8, candidates=8, length=6,
    dense_rows=4, gather_rows=8, chunk_rows=4, training_users=2,
  ),),
  train_candidates=2, curve_candidates=(1, 4), curve_lengths=(4, 8), rounds=2, peak=64, quick=True,
)  # fmt: skip


def bench_dcat(out: str | Path, parts: tuple[str, ...] = PARTS, sizes: DcatSizes = FULL) -> Findings:
  """Measures the forms in one process, interleaved.

  Args:
    out: directory of results.json, results.md and a plot of each part.
    parts: some of PARTS.
    sizes: what is measured.

  Raises:
    UserError: a part that does not exist, or no directory.
  """
  unknown = [part for part in parts if part not in PARTS]
  if unknown:
    raise UserError(f"--parts names '{unknown[0]}'; expected some of: {','.join(PARTS)}")
  directory, machine = make_directory(out), environment()
  platform = jax.default_backend()
  if platform == 'gpu':
    sizes = replace(sizes, cases=tuple(_on_gpu(case) for case in sizes.cases), peak=4 * sizes.peak)
  figures: list[Figure] = []
  if 'serving' in parts:
    figures += _serving(sizes, platform, directory)
  if 'training' in parts:
    figures += _training(sizes, directory)
  if 'curve' in parts:
    figures += _curve(sizes, directory)
  if sizes.quick:
    figures = [replace(figure, at_most=None, at_least=None) for figure in figures]
  settings = {case.name: case.describe() for case in sizes.cases} | {'rounds': sizes.rounds}
  findings = Findings('DCAT: candidates a second', settings, figures, _NOTES, machine)
  write_findings(findings, directory)
  return findings


def _on_gpu(case: Case) -> Case:
  """32 users at once in bfloat16; cuDNN's flash attention, for dense and context pass, needs an even length."""
  tower = replace(case.tower, dtype='bfloat16')
  return replace(
    case, tower=tower, users=32, length=case.length - 1, dense_rows=32 * 20, gather_rows=4_000, chunk_rows=1_000
  )


def _serving(sizes: DcatSizes, platform: str, directory: Path) -> list[Figure]:
  """Candidates/s of every form, context pass included, and the ratios to ours."""
  figures, speeds = [], {}
  for case in sizes.cases:
    print(f'== serving, {case.name}: {case.describe()}', flush=True)
    runs = serving_runs(case)
    seconds = interleave({name: run.call for name, run in runs.items()}, sizes.rounds, warmup=1)
    each = {name: tuple(s / runs[name].candidates for s in seconds[name]) for name in runs}  # seconds a candidate
    asked = dict(zip(('dense', 'gather'), ASKED.get(platform, {}).get(case.name, ()), strict=False))
    for name in runs:
      if name != 'DCAT':
        text = f'{case.name} tower: DCAT over {name}'
        ratio = ratios(each[name], each['DCAT'])
        figures.append(Figure.of(f'serving/{case.name}/over {name}', text, ratio, at_least=asked.get(name)))
    for name in runs:
      speed = Spread.of(tuple(1 / s for s in each[name]))
      text = f'{case.name} tower: {name}'
      figures.append(Figure.of(f'serving/{case.name}/{name}', text, speed, unit='candidates/s'))
      speeds[f'{case.name}: {name}'] = speed.median
    figures.append(_share(case, seconds['DCAT'], sizes.peak, platform))
  plot.bars(directory / 'serving.png', 'Serving: candidates a second', speeds, 'candidates/s (context pass included)')
  return figures


def _share(case: Case, seconds: tuple[float, ...], peak: int, platform: str) -> Figure:
  """FLOP/s of our passes as a share of what one large matmul reaches."""
  rate = pass_flops(case.tower, case.length, case.candidates) * case.users / min(seconds)
  share = rate / matmul_flops(peak, case.tower.dtype)
  text = f'{case.name} tower: DCAT, share of the FLOP/s of a large matmul, at best'
  asked = ASKED_SHARE.get(platform) if case.name == 'paper' else None
  return Figure(f'serving/{case.name}/share', text, share, at_least=asked)


def _training(sizes: DcatSizes, directory: Path) -> list[Figure]:
  """Forward and backward pass of both forms."""
  figures, speeds = [], {}
  for case in sizes.cases:
    print(f'== training, {case.name}, 1:{sizes.train_candidates}', flush=True)
    runs = training_runs(case, sizes.train_candidates)
    seconds = interleave({name: run.call for name, run in runs.items()}, min(3, sizes.rounds), warmup=1)
    text = f'{case.name} tower, training 1:{sizes.train_candidates}: DCAT over dense'
    ratio = ratios(seconds['dense'], seconds['DCAT'])
    figures.append(Figure.of(f'training/{case.name}/over dense', text, ratio, at_least=ASKED_TRAINING))
    for name, run in runs.items():
      speed = Spread.of(tuple(run.candidates / s for s in seconds[name]))
      text = f'{case.name} tower, training: {name}'
      figures.append(Figure.of(f'training/{case.name}/{name}', text, speed, unit='candidates/s'))
      speeds[f'{case.name}: {name}'] = speed.median
  title = f'Training, 1:{sizes.train_candidates}, forward and backward'
  plot.bars(directory / 'training.png', title, speeds, 'candidates/s')
  return figures


def _curve(sizes: DcatSizes, directory: Path) -> list[Figure]:
  """Candidates/s against candidates a user and against the length, beside what the count of FLOPs would give."""
  case, figures, panels = sizes.cases[0], [], []
  for what, values in (('candidates', sizes.curve_candidates), ('length', sizes.curve_lengths)):
    print(f'== curve, {case.name}: {what} {values}', flush=True)
    speeds: dict[str, list[float]] = {'DCAT': [], 'gather': []}
    flops = []
    for value in values:
      point, where = replace(case, **{what: value}), f'{case.name} tower, {what} {value:,}'
      runs = serving_runs(replace(point, gather_rows=min(point.gather_rows, point.candidates)), tuple(speeds))
      seconds = interleave({name: run.call for name, run in runs.items()}, min(3, sizes.rounds), warmup=1)
      flops.append(pass_flops(point.tower, point.length, point.candidates) / point.candidates)
      for name in speeds:
        speed = Spread.of(tuple(runs[name].candidates / s for s in seconds[name]))
        figures.append(Figure.of(f'curve/{what}/{value}/{name}', f'{where}: {name}', speed, unit='candidates/s'))
        speeds[name].append(speed.median)
      figures.append(Figure(f'curve/{what}/{value}/flops', f'{where}: FLOPs a candidate', flops[-1], unit='FLOPs'))
    best = max(s * f for s, f in zip(speeds['DCAT'], flops, strict=True))
    speeds['DCAT, by FLOPs alone'] = [best / f for f in flops]
    xlabel = 'candidates a user' if what == 'candidates' else 'events of history'
    panels.append((f'Against {xlabel}', xlabel, {name: (values, y) for name, y in speeds.items()}))
  plot.lines(directory / 'curve.png', panels, 'candidates/s', log_y=True)
  return figures


_NOTES = (
  'Every form starts from item vectors and the same parameters. DCAT and gather include the context pass over the '
  "user's history; dense embeds and runs history and candidate for each candidate, on fewer candidates (candidates/s "
  'are compared). "dense, last output" skips, of the last layer, all but the candidate: the dense form at its best.',
  'Gather copies K/V to each row, heads first, and concatenates its own, for 1,000 rows at once; "gather in chunks" '
  'does so for as few rows at a time as the cache holds, which the paper does not. Rotate-replace is not exact: in a '
  'full window it loses the oldest event.',
  'Training: DCAT also computes H of every event, as the next-token loss needs it; gradients by parameters and item '
  'vectors.',
  'FLOPs count the matmuls, and of the context pass just what causality leaves.',
)
