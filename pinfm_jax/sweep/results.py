"""What a sweep found: one row a run, and the tables over all arms and seeds that are complete."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pinfm_jax.config import Experiment
from pinfm_jax.evaluate.comparison import RankingComparison
from pinfm_jax.evaluate.ranking import RankingPredictions, figure_name, ranking_metrics
from pinfm_jax.evaluate.tables import Table, mean_std
from pinfm_jax.stages.evaluate import compare_arms, held_out_part
from pinfm_jax.sweep.jobs import FINISHED, Outcome
from pinfm_jax.sweep.plan import Plan, Trained
from pinfm_jax.workdir import is_done, read_results, write_json, write_text

_COLUMNS = ('kind', 'arm', 'settings', 'seed', 'status', 'seconds', 'directory', 'log')
NOT_RUN = 'not run'


class Rows:
  """runs.csv: one row for each tower and ranker with each seed, written anew whenever something changes.

  A run that finished in an earlier call keeps the seconds it took then, where they are known.
  """

  def __init__(self, plan: Plan, path: Path):
    """Reads what finished earlier."""
    self._plan, self._path = plan, path
    self._seconds = _earlier_seconds(path)
    self._outcomes: dict[Path, Outcome] = {}
    self._figures: dict[Path, dict[str, float]] = {}

  def ended(self, directory: Path, outcome: Outcome) -> None:
    """Takes down what became of a run."""
    self._outcomes[directory] = outcome
    if outcome.seconds:
      self._seconds[str(directory)] = f'{outcome.seconds:.1f}'
    self.write()

  def write(self) -> None:
    """Writes the file."""
    experiment, rows = self._plan.run.experiment, []
    for one in self._plan.trained:
      rows.append(self._row(one) | {name: f'{v:.6g}' for name, v in self._read(one, experiment).items()})
    names = list(dict.fromkeys([*_COLUMNS, *(name for row in rows for name in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval='', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_text(self._path, text.getvalue())

  def status(self, one: Trained) -> str:
    """'finished', or what became of it."""
    if is_done(one.directory):
      return FINISHED
    return self._outcomes[one.directory].status if one.directory in self._outcomes else NOT_RUN

  def message(self, one: Trained) -> str:
    """Why it is not finished: the last lines of its log."""
    return self._outcomes[one.directory].message if one.directory in self._outcomes else ''

  def _row(self, one: Trained) -> dict[str, str]:
    workdir = self._plan.run.workdir
    values = (one.kind, one.name, one.settings, str(one.seed), self.status(one),
              self._seconds.get(str(one.directory), ''), str(one.directory.relative_to(workdir)),
              str(one.job.log.relative_to(workdir)) if one.job.log.exists() else '')  # fmt: skip
    return dict(zip(_COLUMNS, values, strict=True))

  def _read(self, one: Trained, experiment: Experiment) -> dict[str, float]:
    if one.directory not in self._figures and is_done(one.directory):
      self._figures[one.directory] = _run_figures(one, experiment)
    return self._figures.get(one.directory, {})


@dataclass(frozen=True)
class Findings:
  """The result of a sweep.

  Attributes:
    title: of the tables' page.
    about: the launch file's data, the split, the seeds, and what the file of arms says.
    comparison: of the rankers; None without rankers or while the baseline has not finished.
    towers: table of the pretrained towers; None if there are none.
    failed: lines on what is missing.
    figures: named figures for results.json.
  """

  title: str
  about: str
  comparison: RankingComparison | None
  towers: Table | None
  failed: tuple[str, ...]
  figures: Mapping[str, float]

  def write(self, directory: Path) -> None:
    """Writes results.md and results.json."""
    parts = [f'# {self.title}', self.about]
    if self.comparison:
      parts.append(self.comparison.markdown())
    if self.towers:
      parts.append(self.towers.markdown())
    if self.failed:
      parts += ['### Not complete', '\n'.join(f'- {line}' for line in self.failed)]
    write_text(directory / 'results.md', '\n\n'.join(part.rstrip('\n') for part in parts) + '\n')
    write_json(directory / 'results.json', dict(self.figures))

  def text(self) -> str:
    """The same for the terminal."""
    parts = [self.about, *([self.comparison.text()] if self.comparison else [])]
    parts += [self.towers.text()] if self.towers else []
    parts += ['\n'.join(['Not complete', '', *self.failed])] if self.failed else []
    return '\n\n'.join(parts)


def findings(plan: Plan, rows: Rows, title: str, about: str) -> Findings:
  """Compares all arms that are complete with all seeds of which the baseline is."""
  experiment = plan.run.experiment
  done = {name: {one.seed: one for one in runs if is_done(one.directory)} for name, runs in plan.of('ranker').items()}
  comparison, seeds = None, sorted(done.get(experiment.baseline, {}))
  if seeds:
    arms = {
      name: [RankingPredictions.load(runs[seed].directory / 'predictions.npz') for seed in seeds]
      for name, runs in done.items()
      if all(seed in runs for seed in seeds)
    }
    comparison = compare_arms(experiment, arms)
  towers, tower_figures = _towers(plan, experiment.evaluate.ks)
  figures = (comparison.figures() if comparison else {}) | tower_figures
  return Findings(title, _about(plan, about, seeds), comparison, towers, _missing(plan, rows, seeds), figures)


def _run_figures(one: Trained, experiment: Experiment) -> dict[str, float]:
  """The main figures of one run."""
  if one.kind == 'tower':
    results, k = read_results(one.directory), experiment.evaluate.ks[0]
    return {name: results[f'retrieval/tower/{name}'] for name in (f'hr@{k}', f'ndcg@{k}', 'mrr')}
  evaluate = experiment.evaluate
  predictions = RankingPredictions.load(one.directory / 'predictions.npz')
  metrics = ranking_metrics(predictions, evaluate.utility, evaluate.age_edges_hours)
  names = [figure_name(evaluate.main_label, '', metric) for metric in ('auc', 'hit@3', 'logloss')]
  return {name: metrics[name] for name in names}


_HOLDOUTS = {'': '', 'all/': ', all users and items'}  # prefix of the figures -> the rows' addition


def _towers(plan: Plan, ks: Sequence[int]) -> tuple[Table | None, dict[str, float]]:
  metrics = [f'{metric}@{k}' for k in ks for metric in ('hr', 'ndcg')] + ['mrr']
  rows, figures, note = [], {}, ''
  for name, runs in plan.of('tower').items():
    results = [read_results(one.directory) for one in runs if is_done(one.directory)]
    if not results:
      continue
    holdouts = {prefix: label for prefix, label in _HOLDOUTS.items() if f'retrieval/{prefix}tower/mrr' in results[0]}
    if not rows:
      note = _towers_note(results[0])
      for prefix, label in holdouts.items():
        popularity = [results[0][f'retrieval/{prefix}popularity/{metric}'] for metric in metrics]
        rows.append((f'popularity{label}', '', *(mean_std(value, float('nan')) for value in popularity)))
    for prefix, label in holdouts.items():
      values = {metric: _over(results, f'retrieval/{prefix}tower/{metric}') for metric in metrics}
      rows.append((f'{name}{label}', str(len(results)), *(mean_std(*value) for value in values.values())))
      for metric, (mean, std) in values.items():
        key = f'{prefix}tower/{name}/{metric}'
        figures |= {f'{key}/mean': mean} | ({f'{key}/std': std} if std == std else {})
  header = ('', 'seeds', *(metric.upper() for metric in metrics))
  note += _same_towers(plan)
  return (Table('Whole-catalogue next item of the towers', header, tuple(rows), note) if rows else None), figures


def _same_towers(plan: Plan) -> str:
  """Names the arms that differ in what no tower reads, as their rows are equal."""
  arms: dict[Path, list[str]] = {}
  for one in plan.of('tower').values():
    arms.setdefault(one[0].directory, []).append(one[0].name)
  return ''.join(f' One tower: {"; ".join(names)}.' for names in arms.values() if len(names) > 1)


def _towers_note(results: Mapping[str, float]) -> str:
  users, catalogue = (f'{results[f"retrieval/{name}"]:.0f}' for name in ('users', 'catalogue'))
  note = f'{users} users; all {catalogue} items are ranked.'
  if 'retrieval/all/users' not in results:
    return note
  users, catalogue = (f'{results[f"retrieval/all/{name}"]:.0f}' for name in ('users', 'catalogue'))
  return f'Users whose next item was seen in training: {note} The others too: {users} users, {catalogue} items.'


def _over(results: Sequence[Mapping[str, float]], name: str) -> tuple[float, float]:
  values = np.array([result[name] for result in results])
  return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float('nan')


def _about(plan: Plan, about: str, seeds: Sequence[int]) -> str:
  experiment, info = plan.run.experiment, plan.dataset.info
  if plan.towers_alone:
    part = held_out_part(experiment)
  else:
    part = f'measured on the {experiment.evaluate.split} split'
    if experiment.evaluate.split == 'validation':
      part += ' (the test split was not read)'
    part += f'; seeds {", ".join(map(str, seeds))}'
  licence = f' Terms of the data: {info.licence}.' if info.licence else ''
  return f'Data: {info.source}; {part}.{licence}' + (f'\n\n{about}' if about else '')


def _missing(plan: Plan, rows: Rows, seeds: Sequence[int]) -> tuple[str, ...]:
  """What the tables leave out, and why."""
  lines = []
  for one in plan.trained:
    status = rows.status(one)
    if status != FINISHED:
      message = rows.message(one).splitlines()
      lines.append(f'{one.job.label}: {status}' + (f' ({message[-1]}; log: {one.job.log})' if message else ''))
  rankers = plan.of('ranker')
  left_out = [name for name, runs in rankers.items() if not all(is_done(o.directory) for o in runs if o.seed in seeds)]
  if rankers and not seeds:
    lines.append(f"no table: the baseline '{plan.run.experiment.baseline}' has no finished seed")
  elif left_out:
    lines.append(f'left out of the tables until all their seeds are there: {", ".join(left_out)}')
  return tuple(lines)


def _earlier_seconds(path: Path) -> dict[str, str]:
  if not path.exists():
    return {}
  with path.open(encoding='utf-8', newline='') as file:
    workdir = path.parent.parent.parent
    return {str(workdir / row['directory']): row['seconds'] for row in csv.DictReader(file) if row.get('seconds')}
