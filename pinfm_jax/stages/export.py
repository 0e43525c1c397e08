"""Stage `export`: a serving bundle, checked against the evaluation, and example scores from it. See `export_tower`."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.predict import predictions_of
from pinfm_jax.evaluate.ranking import RankingPredictions, ranking_metrics
from pinfm_jax.evaluate.tables import Table
from pinfm_jax.model.ranker import DenseStats
from pinfm_jax.overrides import to_dict
from pinfm_jax.progress import Progress
from pinfm_jax.serve.bundle import TrainedRanker, export_bundle
from pinfm_jax.serve.delta import export_delta
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.portable.export import export_portable
from pinfm_jax.serve.scorer import Scorer, score_file
from pinfm_jax.stages.card import run_card
from pinfm_jax.stages.context import Run
from pinfm_jax.stages.export_tower import checked_tower, export_settings, trained_tower
from pinfm_jax.train.finetune import feature_spec
from pinfm_jax.train.stored_tables import StoredState
from pinfm_jax.workdir import OtherSettingsError, claim, is_done, read_results, write_json, write_text

EXAMPLES = 20


def export_stage(run: Run) -> None:
  """Exports the first seed's last PinFM arm, compares its scores with the evaluation's, and scores examples.

  The comparison runs the evaluation's requests through the bundle's own JSON interface, once with float32 tables
  (nothing but rounding may differ) and once as it is served. A run without rankers exports its tower, and compares its
  ranking of the catalogue.
  """
  arms, seed, state = pinfm_arms(run), run.experiment.seeds[0], run.workdir / 'export'
  if run.experiment.arms and not arms:
    print('no arm has PinFM: nothing to export')
    return
  settings = run.of_arm(arms[-1]).finetune_settings(seed) if arms else export_settings(run, seed)
  settings |= {'split': run.experiment.evaluate.split} | run.measured_settings()
  settings |= {**to_dict(run.experiment.serve), 'utility': dict(run.experiment.evaluate.utility)}
  try:
    claim(state, settings, is_done(state))
  except OtherSettingsError:  # an export costs little: make it again
    shutil.rmtree(state)
    claim(state, settings)
  if is_done(state) and (run.workdir / 'bundle').is_dir():
    print(f'{run.workdir / "bundle"}: finished earlier')
  else:
    for leftover in run.workdir.glob('.check-*'):  # of a run that was killed here
      shutil.rmtree(leftover)
    write_json(state / 'results.json', _export_and_check(run, arms[-1], seed) if arms else checked_tower(run, seed))
  earlier = read_results(run.workdir) if is_done(run.workdir) else {}
  earlier = {name: value for name, value in earlier.items() if not name.startswith('bundle/')}  # of another storage
  write_json(run.workdir / 'results.json', earlier | read_results(state))


def _export_and_check(run: Run, arm: Arm, seed: int) -> dict[str, float]:
  storage = run.experiment.serve.storage
  bundle = export_arm(run, run.workdir / 'bundle', overwrite=True)
  evaluated = RankingPredictions.load(run.measured_directory(seed, arm) / 'predictions.npz')
  with tempfile.TemporaryDirectory(dir=run.workdir, prefix='.check-') as scratch:
    exact = export_arm(run, Path(scratch) / 'bundle_float32', storage='float32')
    served = {'float32': served_predictions(run, arm, exact), storage: served_predictions(run, arm, bundle)}
  table, figures = _comparison(run, evaluated, served)
  print(table.text())
  write_text(run.workdir / 'bundle_check.md', table.markdown())
  _score_examples(run, arm, bundle)
  return figures


def export_arm(
  run: Run,
  out: str | Path,
  arm_name: str | None = None,
  seed: int | None = None,
  storage: str | None = None,
  overwrite: bool = False,
  base: str | Path | None = None,
  clip: bool | None = None,
  form: str = 'bundle',
  tower: bool = False,
) -> Path:
  """Writes the bundle of a fine-tuned ranker, or what it has and an earlier bundle has not, or another form of it.

  A run without rankers has its pretrained tower to export.

  Args:
    run: the run.
    out: the bundle's directory.
    arm_name: which ranker; None = the last one with PinFM, else the last.
    seed: of which seed; None = the first.
    storage: of the tables; None = the experiment's.
    overwrite: replace what stands at `out`.
    base: a bundle; what is written is then a delta against it.
    clip: how table rows are rounded (`serve.clip`); None = as the experiment says.
    form: 'bundle', or 'onnx' or 'savedmodel' (`serve.portable.export`).
    tower: the pretrained tower alone, without a ranker: the launch file's, or that which the arm starts from.

  Raises:
    UserError: no such arm, or it is not trained.
  """
  names, serve = [arm.name for arm in run.experiment.arms], run.experiment.serve
  if arm_name is not None and arm_name not in names:
    expected = f'expected one of: {", ".join(names)}' if names else 'this run has no rankers: drop --arm for its tower'
    raise UserError(f"no arm '{arm_name}'; {expected}")
  seed, storage = run.experiment.seeds[0] if seed is None else seed, storage or serve.storage
  clip = serve.clip if clip is None else clip
  named = [arm for arm in run.experiment.arms if arm.name == arm_name]
  if tower or not names:
    ranker = trained_tower(run.of_arm(named[0]) if named else run, seed, storage, clip)
  else:
    chosen = named or pinfm_arms(run) or run.experiment.arms
    ranker = _trained_ranker(run, chosen[-1], seed, storage, clip)
  if form != 'bundle':
    return export_portable(out, ranker, form, storage, overwrite)
  if base is None:
    return export_bundle(out, ranker, storage, overwrite)
  print(export_delta(out, base, ranker, storage, overwrite).text())
  return Path(out)


def _trained_ranker(run: Run, arm: Arm, seed: int, storage: str, clip: bool) -> TrainedRanker:
  """What the arm's newest checkpoint and the run know of a ranker.

  Raises:
    UserError: it is not fine-tuned, or was with other settings.
  """
  directory, run = run.arm_directory(seed, arm), run.of_arm(arm)
  experiment = run.experiment
  if not is_done(directory):
    raise UserError(f'{directory} is not fine-tuned; run the finetune stage first (pinfm run FILE)')
  claim(directory, run.finetune_settings(seed))  # other settings would make another model of the arrays
  stored, info = StoredState(directory / 'checkpoints'), run.dataset.info
  state = stored.parts('params', 'constants')
  params = {name: value for name, value in state['params'].items() if name != 'log_temperature'}
  tables, schema, catalogue = run.model.tables, run.schema, _catalogue(run, experiment)
  return TrainedRanker(
    model_config=run.model,
    ranker_config=experiment.ranker,
    schema=schema,
    spec=feature_spec(schema),
    params=params,
    rows_GE=stored.table_rows(tables.sub_tables * tables.rows) if stored.has_tables else None,
    stats=DenseStats(**state['constants']),
    actions=info.actions,
    surfaces=info.surfaces,
    id_type=info.id_type,
    history_block=experiment.finetune.history_block,
    utility=experiment.evaluate.utility,
    run={'experiment': experiment.name, 'arm': arm.name, 'seed': seed, 'data': info.checksum, 'source': info.source},
    items=run.tokens.items if experiment.ranker.sequence == 'pinfm' else None,
    catalogue=catalogue,
    card=run_card(run, experiment, arm.name, seed, params, storage, clip, catalogue),
    clip=clip,
  )


def _catalogue(run: Run, experiment: Experiment) -> pl.DataFrame | None:
  """The items that training saw, or all of them if the model learned to read new ones by their content."""
  if experiment.ranker.sequence != 'pinfm':
    return None
  items = run.dataset.items
  return items if run.model.id_mask else items.filter(pl.col('first_seen') < run.split.finetune[1])


def pinfm_arms(run: Run) -> list[Arm]:
  """The arms whose ranker has PinFM."""
  return [arm for arm in run.experiment.arms if run.of_arm(arm).experiment.ranker.sequence == 'pinfm']


def served_predictions(run: Run, arm: Arm, bundle: Path) -> RankingPredictions:
  """The evaluation's requests scored through the bundle."""
  run = run.of_arm(arm)
  requests = run.requests(run.experiment.evaluate.split)
  scorer, rows = Scorer.load(bundle), np.unique(requests.request_row)
  documents = dataset_requests(run.dataset, rows, run.schema.most_events)
  progress, scores = Progress(f'score through {bundle.name}', len(rows), 'requests'), []
  for count, result in enumerate(scorer.score(documents), 1):
    scores += [[candidate[label] for label in requests.schema.labels] for candidate in result['scores']]
    progress.update(count)
  progress.close()
  return predictions_of(requests, np.array(scores, np.float32))


def _comparison(
  run: Run, evaluated: RankingPredictions, served: dict[str, RankingPredictions]
) -> tuple[Table, dict[str, float]]:
  """How far served scores and metrics are from the evaluation's."""
  evaluate = run.experiment.evaluate
  weights, label, edges = evaluate.utility, evaluate.main_label, evaluate.age_edges_hours
  base, rows, figures = ranking_metrics(evaluated, weights, edges), [], {}
  for storage, predictions in served.items():
    metrics = ranking_metrics(predictions, weights, edges)
    figures[f'bundle/{storage}/max_difference'] = float(np.abs(predictions.scores_MT - evaluated.scores_MT).max())
    for metric in ('auc', 'hit@3'):
      figures[f'bundle/{storage}/{label}/{metric}/change'] = metrics[f'{label}/{metric}'] - base[f'{label}/{metric}']
    names = ('max_difference', f'{label}/auc/change', f'{label}/hit@3/change')
    rows.append((storage, *(f'{figures[f"bundle/{storage}/{name}"]:+.2e}' for name in names)))
  header = ('tables', 'largest difference of a score', f'change of {label} AUC', f'change of {label} HIT@3')
  note = 'Scores of the bundle, through its JSON interface, against those of the evaluation on the same requests.'
  return Table('The exported bundle', header, tuple(rows), note), figures


def _score_examples(run: Run, arm: Arm, bundle: Path) -> None:
  """requests.jsonl and scores.jsonl: what `pinfm score` takes and gives."""
  own = run.of_arm(arm)
  rows = np.unique(own.requests(own.experiment.evaluate.split).request_row)[-EXAMPLES:]
  documents = dataset_requests(run.dataset, rows, own.schema.most_events)
  path = run.workdir / 'requests.jsonl'
  write_text(path, ''.join(json.dumps(document) + '\n' for document in documents))
  score_file(bundle, path, run.workdir / 'scores.jsonl')
  print(f'example requests: {path}, their scores: {run.workdir / "scores.jsonl"}, the bundle: {bundle}')
