"""Stage `evaluate`: compares the arms over all seeds, writes results.json and results.md, prints the tables."""

from collections.abc import Mapping

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.comparison import RankingComparison, compare
from pinfm_jax.evaluate.lifts import Arms
from pinfm_jax.evaluate.ranking import RankingPredictions, reliability
from pinfm_jax.evaluate.tables import Table
from pinfm_jax.stages.context import Run
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
  tables = [_retrieval_table(retrieval, evaluate.ks)] if retrieval else []
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
  retrieval = _retrieval_figures(run)
  if not retrieval:
    raise UserError(f'{run.workdir} has no pretrained tower yet; run the pretrain stage first (pinfm run FILE)')
  table = _retrieval_table(retrieval, run.experiment.evaluate.ks)
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
  """Mean over the seeds of the pretrained towers' retrieval figures."""
  directories = [run.pretrain_directory(seed) for seed in run.experiment.seeds]
  results = [read_results(directory) for directory in directories if is_done(directory)]
  return {name: sum(r[name] for r in results) / len(results) for name in results[0]} if results else {}


def _retrieval_table(figures: Mapping[str, float], ks: tuple[int, ...]) -> Table:
  names = [f'{metric}@{k}' for k in ks for metric in ('hr', 'ndcg')] + ['mrr']
  rows = [
    (label, *(f'{figures[f"retrieval/{row}/{name}"]:.4f}' for name in names))
    for row, label in (('tower', 'pretrained tower'), ('popularity', 'popularity'))
  ]
  note = (
    f'{figures["retrieval/users"]:.0f} users; all {figures["retrieval/catalogue"]:.0f} items seen before the split are '
    f'ranked; {100 * figures["retrieval/unseen_share"]:.1f} % of the users are left out, their next item is newer.'
  )
  return Table('Whole-catalogue next item', ('', *(name.upper() for name in names)), tuple(rows), note)


def _about(run: Run) -> str:
  info = run.dataset.info
  part = f'{run.experiment.evaluate.split} split' if run.experiment.arms else "each user's last event held out"
  licence = f' Terms of the data: {info.licence}.' if info.licence else ''
  return f'Data: {info.source}; {part}; {len(run.experiment.seeds)} seed(s).{licence}'
