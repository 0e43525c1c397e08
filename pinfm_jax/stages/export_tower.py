"""Exports a pretrained tower without a ranker, and checks what a run without rankers serves."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pinfm_jax.config import RankerConfig
from pinfm_jax.data.featurize import FeatureSchema
from pinfm_jax.data.info import Features
from pinfm_jax.data.tokens import TokenInputs
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.retrieval import Retrieval
from pinfm_jax.evaluate.tables import Table
from pinfm_jax.progress import Progress
from pinfm_jax.serve.bundle import TrainedRanker, export_bundle
from pinfm_jax.serve.documents import in_batches
from pinfm_jax.serve.from_dataset import dataset_users
from pinfm_jax.serve.scorer import Scorer
from pinfm_jax.stages.card import tower_card
from pinfm_jax.stages.context import Run
from pinfm_jax.stages.evaluate import tower_figures
from pinfm_jax.stages.pretrain import retrieval_of
from pinfm_jax.train.finetune import feature_spec
from pinfm_jax.train.restore import stored_state
from pinfm_jax.workdir import claim, is_trained, write_text

_USERS = 256
_EXACT_BYTES = 4 << 30  # of float32 tables that are written once more for the check


def trained_tower(run: Run, seed: int, storage: str, clip: bool) -> TrainedRanker:
  """What a seed's pretrained tower and the run know of it.

  Args:
    run: of the launch file, or of the arm that starts from the tower.
    seed: of the pretraining.
    storage: of the tables.
    clip: how their rows are rounded.

  Raises:
    UserError: it is not pretrained to its end, or was with other settings.
  """
  directory, experiment, info = run.pretrain_directory(seed), run.experiment, run.dataset.info
  if not is_trained(directory):
    arms = '; if just arms pretrain, name one: --arm NAME --tower' if experiment.arms and run.base is None else ''
    raise UserError(f'{directory} is not pretrained to its end; run the pretrain stage first (pinfm run FILE){arms}')
  claim(directory, run.pretrain_settings(seed))  # other settings would make another model of the arrays
  stored = stored_state(directory, experiment.pretrain.use_checkpoint)
  tables, items = run.model.tables, run.dataset.items
  params = {'pinfm': stored.parts('params')['params']['pinfm']}
  content = TokenInputs.of(run.model, run.dataset).items
  if run.model.id_mask:  # the model learned to read new items by their content
    content = replace(content, known_V=np.isin(content.keys_V, run.pretrained_items))
  else:
    items = items.filter(pl.col('item_key').is_in(pl.Series(run.pretrained_items).implode()))
  # The window that the tower reads; no features and no labels.
  length, surfaces = experiment.pretrain.downstream_length, len(info.surfaces)
  schema = FeatureSchema(Features(), 0, surfaces, item_buckets=0, history_length=length, labels=())
  return TrainedRanker(
    model_config=run.model,
    ranker_config=RankerConfig(),
    schema=schema,
    spec=feature_spec(schema),
    params=params,
    rows_GE=stored.table_rows(tables.sub_tables * tables.rows),
    stats=None,
    actions=info.actions,
    surfaces=info.surfaces,
    id_type=info.id_type,
    history_block=experiment.finetune.history_block,
    run={
      'experiment': experiment.name,
      'tower': directory.name,
      'seed': seed,
      'data': info.checksum,
      'source': info.source,
    },
    items=content,
    catalogue=items,
    card=tower_card(run, seed, params, storage, clip, items),
    clip=clip,
  )


def checked_tower(run: Run, seed: int) -> dict[str, float]:
  """Exports a seed's tower as the run's bundle, and measures the run's ranking of the catalogue through it.

  Its users pass through the bundle's JSON interface, once with float32 tables (left out where these are large) and once
  as they are served. With float32 nothing but rounding may differ from the evaluation; in a model with hidden ids also
  items that pretraining never saw, whose ids the bundle hides.

  Returns:
    The figures of the tables (`results.json`).

  Raises:
    UserError: the tower is not trained or not measured.
  """
  serve, evaluate, evaluated = run.experiment.serve, run.experiment.evaluate, tower_figures(run, seed)
  measure, served = retrieval_of(run, evaluate.split, evaluate.ks), {}
  tables = run.model.tables
  export_bundle(run.workdir / 'bundle', trained_tower(run, seed, serve.storage, serve.clip), serve.storage, True)
  if 4 * tables.sub_tables * tables.rows * tables.width <= _EXACT_BYTES:
    with tempfile.TemporaryDirectory(dir=run.workdir, prefix='.check-') as scratch:
      exact = export_bundle(Path(scratch) / 'bundle_float32', trained_tower(run, seed, 'float32', False), 'float32')
      served['float32'] = served_retrieval(run, measure, exact)
  served[serve.storage] = served_retrieval(run, measure, run.workdir / 'bundle')
  table, figures = _comparison(evaluated, served, evaluate.ks)
  print(table.text())
  write_text(run.workdir / 'bundle_check.md', table.markdown())
  return figures


def export_settings(run: Run, seed: int) -> dict[str, Any]:
  """Everything that the bundle of a tower and its check depend on, but for the storage."""
  evaluate = run.experiment.evaluate
  settings = {name: getattr(evaluate, name) for name in ('retrieval_users', 'ks', 'filter_seen', 'whole_catalogue')}
  return run.pretrain_settings(seed) | {'history_block': run.experiment.finetune.history_block, 'evaluate': settings}


def served_retrieval(run: Run, measure: Retrieval, bundle: Path) -> dict[str, float]:
  """The figures of the vectors that a bundle makes of the task's users, read as JSON, and of its catalogue."""
  task, scorer = measure.task, Scorer.load(bundle)
  progress, vectors = Progress(f'users through {bundle.name}', len(task.user_Q), 'users'), []
  for documents in in_batches(dataset_users(run.dataset, task.user_Q, task.end_Q), _USERS):
    vectors.append(scorer.users([scorer.parse(document) for document in documents]))
    progress.update(sum(map(len, vectors)))
  progress.close()
  items = scorer.items(task.catalogue_V)['target']
  return measure.of_vectors(np.concatenate(vectors), items)


def _comparison(
  evaluated: dict[str, float], served: dict[str, dict[str, float]], ks: tuple[int, ...]
) -> tuple[Table, dict[str, float]]:
  """The evaluation's figures, and those through bundles with their shares of these."""
  names = [f'tower/{metric}@{k}' for k in ks for metric in ('hr', 'ndcg')]
  base = {name: evaluated[f'retrieval/{name}'] for name in names}
  rows = [('evaluation', *(f'{base[name]:.4f}' for name in names))]
  for storage, found in served.items():
    shares = (f'{found[name]:.4f} ({_percent(found[name], base[name])})' for name in names)
    rows.append((f'bundle, {storage} tables', *shares))
  figures = {f'bundle/{storage}/{name}': found[name] for storage, found in served.items() for name in names}
  header = ('', *(name.removeprefix('tower/').upper() for name in names))
  note = 'The users of the evaluation through the JSON interface of the bundle; in brackets the share that is kept.'
  return Table('The exported bundle', header, tuple(rows), note), figures


def _percent(value: float, base: float) -> str:
  return f'{100 * value / base:.2f} %' if base else '-'
