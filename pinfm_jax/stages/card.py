"""The facts of a run that its bundle's model card states."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

from pinfm_jax import __version__
from pinfm_jax.config import Experiment
from pinfm_jax.data.info import DatasetInfo
from pinfm_jax.model.interaction.settings import describe_interaction
from pinfm_jax.serve.model_card import DataFacts, ModelFacts, model_card
from pinfm_jax.stages.context import Run, needs_pretraining
from pinfm_jax.stages.evaluate import retrieval_table
from pinfm_jax.workdir import is_done, read_results

_PRETRAINED = 'pretrained on the events of'
_ROUNDING = {True: 'with the least squared error of a row', False: 'between the minimum and the maximum of a row'}


def run_card(
  run: Run,
  experiment: Experiment,
  arm: str,
  seed: int,
  params: Any,
  storage: str,
  clip: bool,
  catalogue: pl.DataFrame | None,
) -> str:
  """The model card of one fine-tuned ranker.

  Args:
    run: the run.
    experiment: of the arm.
    arm: its name.
    seed: of the training.
    params: its dense parameters.
    storage: of the tables.
    clip: how their rows are rounded (`serve.clip`).
    catalogue: of the bundle; None without one.
  """
  with_pinfm = experiment.ranker.sequence == 'pinfm'
  model = ModelFacts(
    name=experiment.name,
    arm=arm,
    seed=seed,
    version=__version__,
    storage=storage if with_pinfm else None,
    parameters={'ranker': _count(params, but='pinfm')} | (_tower_parameters(run, params) if with_pinfm else {}),
    sizes=_ranker_sizes(experiment)
    | (_tower_sizes(run, experiment.finetune.history_length, experiment) if with_pinfm else {}),
    pretraining=_pretraining(experiment) if needs_pretraining(experiment) else {},
    finetuning=_finetuning(experiment),
    utility=experiment.evaluate.utility,
    catalogue=None if catalogue is None else len(catalogue),
    rounding='' if storage == 'float32' else _ROUNDING[clip],
  )
  return model_card(_data(run), model, _results(run.workdir), experiment.evaluate.split, len(experiment.seeds))


def tower_card(run: Run, seed: int, params: Any, storage: str, clip: bool, catalogue: pl.DataFrame) -> str:
  """The model card of a pretrained tower alone; see `run_card`."""
  experiment, data = run.experiment, _data(run)
  model = ModelFacts(
    name=experiment.name,
    arm='',
    seed=seed,
    version=__version__,
    storage=storage,
    parameters=_tower_parameters(run, params),
    sizes=_tower_sizes(run, experiment.pretrain.downstream_length, experiment),
    pretraining=_pretraining(experiment),
    finetuning={},
    catalogue=len(catalogue),
    rounding='' if storage == 'float32' else _ROUNDING[clip],
  )
  pretrained = {name: days for name, days in data.days.items() if name == _PRETRAINED}
  data, results = replace(data, days=pretrained), _own_results(run, seed)
  return model_card(data, model, results, experiment.evaluate.split, seeds=1)


def _data(run: Run) -> DataFacts:
  info, split = run.dataset.info, run.split
  counts = {'users': info.counts.users, 'items': info.counts.items, 'events': info.counts.events.kept}
  counts |= {'impressions': info.counts.impressions.kept, 'requests': info.counts.requests}
  days = {
    _PRETRAINED: (info.time_range_ms[0], split.pretrain_until)
    if info.time_known.histories and split.pretrain_until is not None
    else (0, 0),
    'fine-tuned on the requests of': split.finetune,
    'validation requests': split.validation,
    'test requests': split.test,
  }
  simulated = run.experiment.data.source == 'simulator'
  return DataFacts(
    source=info.source,
    licence=info.licence or ('none, the data are simulated' if simulated else None),
    notes=info.notes or '',
    checksum=info.checksum,
    counts=counts,
    days=days,
    actions=info.actions,
    surfaces=info.surfaces,
    labels=info.labels,
    features=_features(info),
  )


def _features(info: DatasetInfo) -> list[str]:
  features = info.features
  named = (*features.sparse, *features.embedding)
  return [*features.dense, *(f.name for f in named), *(['content'] if info.content_width else [])]


def _count(params: Any, but: str = '') -> int:
  return sum(math.prod(np.shape(x)) for name, tree in params.items() if name != but for x in jax.tree.leaves(tree))


def _tower_parameters(run: Run, params: Any) -> dict[str, int]:
  tables = run.model.tables
  return {'PinFM tower': _count(params['pinfm']), 'item tables': tables.sub_tables * tables.rows * tables.width}


def _ranker_sizes(experiment: Experiment) -> dict[str, str]:
  ranker = experiment.ranker
  sizes = {'ranker': f'{describe_interaction(ranker)}, MLP {" x ".join(map(str, ranker.mlp))}'}
  sizes['ranker'] += f', {ranker.item_buckets:,} buckets of item ids' if ranker.item_buckets else ', no item ids'
  if ranker.transact.length:
    transact = ranker.transact
    sizes['TransAct'] = f'the newest {transact.length} events, {transact.layers} layers, width {3 * transact.width}, '
    sizes['TransAct'] += f'{transact.heads} heads, {transact.item_buckets:,} buckets of item ids'
  return sizes


def _tower_sizes(run: Run, window: int, experiment: Experiment) -> dict[str, str]:
  tower, tables = run.model.tower, run.model.tables
  content = f' and content vectors of {run.model.content_width}' if run.model.content else ''
  return {
    'tower': f'{tower.backbone}, {tower.layers} layers, width {tower.width}, {tower.heads} heads, '
    f'output {tower.output_width}',
    'item tables': f'{tables.sub_tables} x {tables.rows:,} rows x {tables.width}, hash seed {tables.hash_seed}',
    'window': f'the newest {window} events, moving in blocks of {experiment.finetune.history_block}',
    'items are read': f'by id{content}',
  }


def _pretraining(experiment: Experiment) -> dict[str, Any]:
  pretrain = experiment.pretrain
  names = ('steps', 'batch_segments', 'segment_length', 'ntl_weight', 'mtl_weight', 'ftl_weight', 'max_columns')
  return {name: getattr(pretrain, name) for name in names} | {
    'positive_actions': pretrain.positive_actions or ('every event',),
    'learning_rate': pretrain.update.learning_rate,
    'table_learning_rate': pretrain.update.table_learning_rate,
    **({'continue_from': pretrain.continue_from} if pretrain.continue_from else {}),
  }


def _finetuning(experiment: Experiment) -> dict[str, Any]:
  finetune = experiment.finetune
  names = ('epochs', 'batch_requests', 'candidates', 'history_length', 'init', 'module_weight', 'tie_weight')
  cold = finetune.cold_start
  return {name: getattr(finetune, name) for name in (*names, 'ntl_weight')} | {
    'label_weights': finetune.label_weights or ('all 1',),
    'learning_rate': finetune.update.learning_rate,
    'pretrained_ratio': finetune.update.pretrained_ratio,
    'share of candidate ids randomised': cold.randomise,
    'dropout of the module by item age': tuple(
      f'{rate:g} below {edge:g} h' for edge, rate in zip(cold.age_edges_hours, cold.age_dropout, strict=True)
    ),
  }


def _results(workdir: Path) -> str:
  """The tables of `results.md`; empty if the run was not evaluated."""
  path = workdir / 'results.md'
  text = path.read_text(encoding='utf-8') if path.is_file() else ''
  return text[text.index('### ') :] if '### ' in text else ''


def _own_results(run: Run, seed: int) -> str:
  """The table of a tower's own figures; empty if it was not measured on the evaluation split."""
  measured = run.tower_results(seed)
  if not is_done(measured):
    return ''
  figures = read_results(measured)
  ks = tuple(k for k in run.experiment.evaluate.ks if f'retrieval/tower/hr@{k}' in figures)
  return retrieval_table(figures, ks).markdown()
