"""One HTML page of a run, finished or not, that opens offline on any screen."""

import html
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pinfm_jax import __version__, markup, plots
from pinfm_jax.config import Arm
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.comparison_tables import bucket_text
from pinfm_jax.evaluate.tables import percent_interval
from pinfm_jax.progress import duration
from pinfm_jax.workdir import is_trained, write_text

_AGE_LIFT = re.compile(r'(?P<arm>.+?)/lift/(?P<label>[^/]+)/(?P<bucket>age[^/]+|seen|unseen)/(?P<metric>auc|hit@3)')
_LIFT = re.compile(r'(?P<arm>.+?)/lift/(?P<label>[^/]+)/(?P<metric>auc|hit@3)')
_METRICS = {'hit@3': 'HIT@3', 'auc': 'AUC'}
_CURVES = {  # figure of metrics.jsonl -> label
  'loss': 'loss',
  'eval/loss': 'held-out loss',
  'eval/ndcg@10': 'validation NDCG@10',
  'eval/hr@10': 'validation HR@10',
  'eval/mrr': 'validation MRR',
  'examples_per_s': 'examples / s',
}


@dataclass(frozen=True)
class Training:
  """The readable rows of one stage's metrics.jsonl; `stage` and `seed` come from its path."""

  stage: str
  seed: str
  rows: tuple[Mapping[str, float], ...]
  finished: bool

  def series(self, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a figure, where it was logged and is finite."""
    rows = [row for row in self.rows if math.isfinite(row.get(name, math.nan))]
    return [row['step'] for row in rows], [row[name] for row in rows]


@dataclass(frozen=True)
class RunFiles:
  """What a workdir holds, and what is missing or unreadable."""

  name: str
  experiment: Mapping[str, Any]
  figures: Mapping[str, float]
  reliability: Mapping[str, Any]
  results: str
  trainings: tuple[Training, ...]
  missing: tuple[str, ...]


def write_report(workdir: str | Path) -> Path:
  """Writes WORKDIR/report.html from the files of a run.

  Args:
    workdir: the directory of a `pinfm run`; what it does not hold yet is listed in the page.

  Returns:
    The page's path.

  Raises:
    UserError: the directory is not there or is not a run's.
  """
  path = Path(workdir) / 'report.html'
  write_text(path, _page(_read(Path(workdir))))
  return path


def _read(workdir: Path) -> RunFiles:
  if not workdir.is_dir():
    raise UserError(f'{workdir}: no such directory; expected the workdir of a run: pinfm run FILE --workdir {workdir}')
  if not (workdir / 'experiment.json').exists() and not any(workdir.glob('seed*/')):
    raise UserError(
      f'{workdir} holds neither experiment.json nor seed folders; expected the workdir of a run: '
      'give the directory that `pinfm run` wrote (runs/NAME unless --workdir said otherwise)'
    )
  missing: list[str] = []
  experiment = _json(workdir / 'experiment.json', missing)
  paths = sorted(workdir.glob('seed*/*/metrics.jsonl'), key=lambda p: (p.parent.name != 'pretrain', str(p)))
  trainings = tuple(_training(path, missing) for path in paths)
  for directory in _expected(workdir, experiment):
    if not (directory / 'metrics.jsonl').exists():
      missing.append(f'{directory.relative_to(workdir)}: not trained yet')
  figures = _json(workdir / 'results.json', missing)
  results = [path for path in (workdir / 'results.md', workdir / 'bundle_check.md') if path.exists()]
  if not (workdir / 'results.md').exists():
    missing.append('results.md: the evaluate stage has not run')
  return RunFiles(
    name=str(experiment.get('name') or workdir.resolve().name),
    experiment=experiment,
    figures={k: v for k, v in figures.items() if isinstance(v, int | float)},
    reliability=_reliability(workdir, missing),
    results='\n\n'.join(path.read_text(encoding='utf-8') for path in results),
    trainings=trainings,
    missing=tuple(missing),
  )


def _json(path: Path, missing: list[str]) -> Mapping[str, Any]:
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    missing.append(f'{path.name}: not written yet')
  except ValueError as error:
    missing.append(f'{path.name}: not readable as JSON ({error})')
  else:
    if isinstance(value, dict):
      return value
    missing.append(f'{path.name}: holds no JSON object')
  return {}


def _reliability(workdir: Path, missing: list[str]) -> Mapping[str, Any]:
  path = workdir / 'reliability.json'  # not there after the evaluation of an earlier version, or one without arms
  value = _json(path, missing) if path.exists() else {}
  try:
    return {'label': str(value['label']), 'arms': {k: [(p, y) for p, y, _ in v] for k, v in value['arms'].items()}}
  except (KeyError, TypeError, ValueError, AttributeError):
    if value:
      missing.append(f'{path.name}: holds no calibration curves')
    return {}


def _expected(workdir: Path, experiment: Mapping[str, Any]) -> list[Path]:
  arms = [Arm(str(arm.get('name'))).directory for arm in experiment.get('arms', ())]
  return [workdir / f'seed{seed}' / arm for seed in experiment.get('seeds', ()) for arm in arms]


def _training(path: Path, missing: list[str]) -> Training:
  by_step, broken = {}, 0  # a step that a resumed run did again counts once, the last time
  for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
    try:
      row = json.loads(line)
      figures = {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
      by_step[int(row['step'])] = by_step.get(int(row['step']), {}) | figures  # eval/... have lines of their own
    except (ValueError, KeyError, TypeError):
      broken += 1
  directory = path.parent
  name = f'{directory.parent.name}/{directory.name}'
  finished = is_trained(directory)
  if broken:
    missing.append(f'{name}/metrics.jsonl: {broken} unreadable line{"s" if broken > 1 else ""} left out')
  if not finished:
    missing.append(f'{name}: not finished, {f"last logged step {max(by_step)}" if by_step else "nothing logged yet"}')
  rows = tuple(by_step[step] for step in sorted(by_step))
  return Training(directory.name, directory.parent.name, rows, finished)


def _page(run: RunFiles) -> str:
  title = html.escape(run.name)
  sections = [
    _headline(run),
    _missing(run),
    _results(run),
    _cold_start(run),
    _calibration(run),
    _curves(run),
    _speed(run),
    _details(run),
  ]
  body = '\n'.join(section for section in sections if section)
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{title} · pinfm report</title>\n<style>{_css()}</style>\n</head>\n<body>\n<main>\n'
    f'<h1>{title}</h1>\n{body}\n<footer>pinfm_jax {__version__}</footer>\n</main>\n</body>\n</html>\n'
  )


def _section(title: str, *parts: str) -> str:
  return f'<section>\n<h2>{html.escape(title)}</h2>\n' + '\n'.join(parts) + '\n</section>'


def _headline(run: RunFiles) -> str:
  main = run.experiment.get('evaluate', {}).get('main_label')
  tiles = []
  for name in run.figures:
    match = _LIFT.fullmatch(name)
    if match and match['label'] == main:
      figure = f'{match["arm"]}/{main}/{match["metric"]}/mean'
      value = f'{run.figures[figure]:.4f}' if figure in run.figures else ''
      what = html.escape(f'{main} {_METRICS[match["metric"]]}, {match["arm"]}')
      lift = percent_interval(*_interval(run, name))
      tiles.append(f'<div class="tile"><span>{what}</span><b>{value}</b><span>{lift}</span></div>')
  return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ''


def _missing(run: RunFiles) -> str:
  if not run.missing:
    return ''
  items = ''.join(f'<li>{html.escape(text)}</li>' for text in run.missing)
  return f'<section class="missing"><h2>Not there yet</h2><ul>{items}</ul></section>'


def _results(run: RunFiles) -> str:
  text = re.sub(r'\A\s*# .*\n', '', run.results)  # the page has this title
  return _section('Results', markup.to_html(text)) if text.strip() else ''


def _cold_start(run: RunFiles) -> str:
  panels: dict[str, dict[str, dict[str, dict[str, plots.Interval]]]] = {}  # metric -> label -> arm -> bucket
  evaluate = run.experiment.get('evaluate', {})
  shown, utility = evaluate.get('labels') or (), evaluate.get('utility') or {}
  for name in run.figures:
    match = _AGE_LIFT.fullmatch(name)
    if not match or (shown and match['label'] not in shown):
      continue
    value, low, high = (100 * x for x in _interval(run, name))
    if math.isfinite(low) and math.isfinite(high):  # without an interval there are too few positives to say anything
      bucket = bucket_text(match['bucket'])
      arms = panels.setdefault(match['metric'], {}).setdefault(match['label'], {})
      arms.setdefault(match['arm'], {})[bucket] = plots.Interval(value, low, high)
  if not panels:
    return ''
  note = (
    '<p>Relative lift over the baseline with 95 % intervals, by the age of the item when it was shown, and for '
    'items that pretraining had seen and had not. HIT@3 asks for a positive of that kind among the top 3 of the whole '
    'request. Kinds with too few positives are left out.</p>'
  )
  parts = [note]
  for metric, title in _METRICS.items():
    labels = panels.get(metric, {})
    parts += [f'<h3>{title}</h3>'] if labels else []
    for label in [label for label in labels if metric == 'hit@3' and utility.get(label, 0) < 0]:
      labels[f'{label} (lower is better)'] = labels.pop(label)
    parts.append(_grid(plots.intervals(label, arms, f'{title} lift, %') for label, arms in labels.items()))
  return _section('Lift by item age', *parts)


def _calibration(run: RunFiles) -> str:
  arms = {arm: points for arm, points in run.reliability.get('arms', {}).items() if points}
  if not arms:
    return ''
  note = (
    '<p>Tenths of the rows by predicted probability, over all seeds: the share that turned out positive against the '
    'mean prediction. On the dotted line both agree.</p>'
  )
  return _section('Calibration', note, _grid([plots.reliability(run.reliability['label'], arms)], 'grid pairs'))


def _curves(run: RunFiles) -> str:
  figures = []
  for stage in dict.fromkeys(training.stage for training in run.trainings):
    for name, label in _CURVES.items():
      series = {t.seed: t.series(name) for t in run.trainings if t.stage == stage}
      series = {seed: points for seed, points in series.items() if points[0]}
      if series:
        figures.append(plots.curves(stage, series, label, from_zero=name == 'examples_per_s'))
  return _section('Learning curves', _grid(figures, 'grid pairs')) if figures else ''


def _speed(run: RunFiles) -> str:
  rows = []
  for training in run.trainings:
    if training.rows:
      first, last = training.rows[0], training.rows[-1]
      rates, waits = training.series('examples_per_s')[1], training.series('data_wait_share')[1]
      rows.append([
        f'{training.seed} {training.stage}',
        f'{last["step"]:.0f}' + ('' if training.finished else ' (running)'),
        f'{last["loss"]:.4f}' if 'loss' in last else '–',
        f'{median(rates):,.1f}' if rates else '–',
        f'{100 * fmean(waits):.1f} %' if waits else '–',
        duration(last['time'] - first['time']) if 'time' in first and 'time' in last else '–',
      ])  # fmt: skip
  header = ['stage', 'steps', 'last loss', 'examples/s (median)', 'waiting for data', 'first to last log']
  return _section('Training speed', markup.table(header, rows)) if rows else ''


def _details(run: RunFiles) -> str:
  parts = []
  if run.experiment:
    text = html.escape(json.dumps(run.experiment, indent=2, ensure_ascii=False))
    parts.append(f'<details><summary>Configuration</summary><pre>{text}</pre></details>')
  if run.figures:
    table = markup.table(['figure', 'value'], [[name, f'{value:.6g}'] for name, value in run.figures.items()])
    parts.append(f'<details><summary>All {len(run.figures)} figures</summary>{table}</details>')
  return _section('Details', *parts) if parts else ''


def _grid(figures: Iterable[str], kind: str = 'grid') -> str:
  return f'<div class="{kind}">' + '\n'.join(f'<figure>{svg}</figure>' for svg in figures) + '</div>'


def _interval(run: RunFiles, name: str) -> tuple[float, float, float]:
  return run.figures[name], run.figures.get(f'{name}/low', math.nan), run.figures.get(f'{name}/high', math.nan)


def _css() -> str:
  return Path(__file__).with_name('report.css').read_text(encoding='utf-8')
