"""Stage `evaluate`: compares the arms over all seeds, writes results.json and results.md, prints the tables."""

import statistics
from collections.abc import Mapping

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.comparison import RankingComparison, compare
from pinfm_jax.evaluate.lifts import Arms
from pinfm_jax.evaluate.ranking import RankingPredictions, reliability
from pinfm_jax.evaluate.tables import Table, mean_std
from pinfm_jax.stages.context import Run, needs_pretraining
from pinfm_jax.workdir import claim, is_done, read_results, write_json, write_text


def evaluate_stage(run: Run) -> None:
  """Reads every arm's predictions and the pretrained towers' figures.

  Raises:
    UserError: an arm is not fine-tuned yet.
  """
  experiment = run.experiment
  if not experiment.arms:
    _retrieval_alone(run)
    return
  arms = {arm.name: [_predictions(run, seed, arm) for seed in experiment.seeds] for arm in experiment.arms}
  evaluate, comparison = experiment.evaluate, compare_arms(experiment, arms)
  retrieval = _retrieval_figures(run)
  tables = [retrieval_table(retrieval, evaluate.ks)] if retrieval else []
  about = _about(run)
  markdown = [f'# {experiment.name}', about, comparison.markdown(), *(table.markdown() for table in tables)]
  curves = {name: reliability(runs, evaluate.main_label) for name, runs in arms.items()}
  write_json(run.workdir / 'reliability.json', {'label': evaluate.main_label, 'arms': curves})
  write_json(run.workdir / 'results.json', comparison.figures() | retrieval)
  write_text(run.workdir / 'results.md', '\n\n'.join(markdown) + '\n')
  print('\n\n'.join([about, comparison.text(), *(table.text() for table in tables)]))


def compare_arms(experiment: Experiment, arms: Arms) -> RankingComparison:
  """Compares predictions as the experiment's settings say; the challenger may be missing."""
  evaluate = experiment.evaluate
  return compare(
    arms,
    experiment.baseline,
    evaluate.utility,
    evaluate.labels,
    evaluate.age_edges_hours,
    resample=evaluate.resample,
    challenger=experiment.challenger if experiment.challenger in arms else '',
    paper={arm.name: arm.paper for arm in experiment.arms},
  )


def _retrieval_alone(run: Run) -> None:
  """The results of an experiment that trains no ranker: a log without impressions."""
  for seed in run.experiment.seeds:
    if not is_done(run.tower_results(seed)):
      raise UserError(
        f'{run.workdir} has no pretrained tower of seed {seed} yet; run the pretrain stage first (pinfm run FILE)'
      )
  retrieval = _retrieval_figures(run)
  table = retrieval_table(retrieval, run.experiment.evaluate.ks)
  write_json(run.workdir / 'results.json', retrieval)
  write_text(run.workdir / 'results.md', f'# {run.experiment.name}\n\n{_about(run)}\n\n{table.markdown()}')
  print(f'{_about(run)}\n\n{table.text()}')


def _predictions(run: Run, seed: int, arm: Arm) -> RankingPredictions:
  measured = run.measured_directory(seed, arm)
  if not is_done(measured):
    raise UserError(f'{measured} has no predictions yet; run the finetune stage first (pinfm run FILE)')
  claim(run.arm_directory(seed, arm), run.of_arm(arm).finetune_settings(seed))  # other settings: refused
  claim(measured, run.measured_settings())
  return RankingPredictions.load(measured / 'predictions.npz')


def _retrieval_figures(run: Run) -> dict[str, float]:
  """Mean over the seeds of the pretrained towers' retrieval figures; of several seeds also '.../std'.

  Of the launch file's tower, if a ranker starts from it or there is none.
  """
  arms, seed = [run.of_arm(arm) for arm in run.experiment.arms], run.experiment.seeds[0]
  towers = [arm.pretrain_directory(seed) for arm in arms if needs_pretraining(arm.experiment)]
  if arms and run.pretrain_directory(seed) not in towers:
    return {}
  results = [tower_figures(run, seed) for seed in run.experiment.seeds if is_done(run.tower_results(seed))]
  if not results:
    return {}
  names = [name for name in results[0] if all(name in each for each in results)]
  values = {name: [each[name] for each in results] for name in names}
  figures = {name: sum(each) / len(each) for name, each in values.items()}
  towers = {name: each for name, each in values.items() if '/tower/' in name and len(each) > 1}
  return figures | {f'{name}/std': statistics.stdev(each) for name, each in towers.items()}


def tower_figures(run: Run, seed: int) -> dict[str, float]:
  """The retrieval figures of a seed's tower.

  Raises:
    UserError: it was not measured, or with other settings.
  """
  claim(run.pretrain_directory(seed), run.pretrain_settings(seed))  # other settings: refused
  figures = read_results(run.tower_results(seed))
  missing = unmeasured(run, figures)
  if missing:
    raise UserError(
      f'{run.tower_results(seed)} has no figures with {missing}; run the pretrain stage too '
      '(--stages pretrain,evaluate): it measures again and trains nothing'
    )
  return figures


def unmeasured(run: Run, figures: Mapping[str, float]) -> str:
  """A setting with which a tower's retrieval figures were not measured, as KEY=VALUE; '' if there is none."""
  for k in run.experiment.evaluate.ks:
    if f'retrieval/tower/hr@{k}' not in figures:
      return f'evaluate.ks={k}'
  for key, value in run.retrieval_settings().items():
    if figures.get(measured_figure(key)) != value:
      return f'{key}={value}'
  return ''


def measured_figure(key: str) -> str:
  """The name under which a tower's results record a setting of `Run.retrieval_settings`."""
  return f'retrieval/{key.split(".")[1]}'


def retrieval_table(figures: Mapping[str, float], ks: tuple[int, ...]) -> Table:
  """The table of retrieval figures, by their names in results.json."""
  names = [f'{metric}@{k}' for k in ks for metric in ('hr', 'ndcg')] + ['mrr']
  labels = {'tower': 'pretrained tower', 'popularity': 'popularity'}
  note = ''
  if 'retrieval/all/users' in figures:
    labels |= {f'all/{row}': f'{label}, all users and items' for row, label in labels.items()}
    users, items = (f'{figures[f"retrieval/all/{name}"]:.0f}' for name in ('users', 'catalogue'))
    note = f' All users and items: {users} users, all {items} items of the data are ranked.'
  rows = [
    (label, *(_cell(figures, f'retrieval/{row}/{name}') for name in names))
    for row, label in labels.items()
    if f'retrieval/{row}/mrr' in figures
  ]
  note = (
    f'{figures["retrieval/users"]:.0f} users; all {figures["retrieval/catalogue"]:.0f} items seen before the split are '
    f'ranked; {100 * figures["retrieval/unseen_share"]:.1f} % of the users are left out, their next item is newer.'
    f'{note}'
  )
  return Table('Whole-catalogue next item', ('', *(name.upper() for name in names)), tuple(rows), note)


def _cell(figures: Mapping[str, float], name: str) -> str:
  return mean_std(figures[name], figures.get(f'{name}/std', float('nan')))


def held_out_part(experiment: Experiment) -> str:
  """What the towers of a log without impressions are measured on, in words."""
  if experiment.data.held_out_events == 1:
    return "each user's last event held out"
  split = experiment.evaluate.split
  return f"{split} split: each user's {'last' if split == 'test' else 'second last'} event"


def _about(run: Run) -> str:
  info = run.dataset.info
  part = f'{run.experiment.evaluate.split} split' if run.experiment.arms else held_out_part(run.experiment)
  licence = f' Terms of the data: {info.licence}.' if info.licence else ''
  return f'Data: {info.source}; {part}; {len(run.experiment.seeds)} seed(s).{licence}'
