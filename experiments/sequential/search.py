"""The search for the settings of our model and of SASRec+SS, with the same number of runs: arms for the launch files.

Command:   pinfm sweep experiments/sequential/beauty.py --arms experiments/sequential/search.py --seeds 1
           (sports.py, toys.py and ml1m.py alike; on the validation events, which is the default split of a sweep)
Hardware:  2 CPU cores, 3 GB of memory
Time:      see experiments/README.md; it goes on where it was stopped, and `--only NAME ..` runs some of the arms
Expected:  see experiments/README.md

RUNS points of each of two spaces: the launch file's or the published settings, and points that are drawn by a fixed
seed. The values of an axis are drawn equally often, but for one draw, so that its mean over the table says what a value
is worth. The two models take turns, so that a search that is stopped has spent the same on both. Choose by NDCG@10 in
the table, write the choice into the launch file, and measure it with three seeds and `--split test`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.sequential import sasrec

RUNS = 12  # of each model
_SEED = 0

Space = Sequence[Sequence[Mapping[str, Any]]]


def _width(width: int) -> dict[str, Any]:
  return {'model.tower.width': width, 'model.tower.output_width': width, 'model.tables.width': width}


def _dropout(rate: float) -> dict[str, Any]:
  return {f'model.tower.{kind}': rate for kind in ('dropout', 'embedding_dropout', 'attention_dropout')}


def _rates(rate: float) -> dict[str, Any]:
  return {'pretrain.update.learning_rate': rate, 'pretrain.update.table_learning_rate': rate}


# Drawn columns, corrected for how they are drawn, cost a quarter of the full softmax: search with them, then confirm
# the choice with the launch file's full softmax.
_SAMPLED = {'pretrain.full_catalogue': False, 'pretrain.uniform_negatives': 2048, 'pretrain.log_q': 'counts'}
_INNER = {'model.tower.dot_product': True, 'pretrain.temperature': 1.0}
_COSINE = tuple({'pretrain.temperature': value} for value in (0.05, 0.07, 0.1))
_ROTARY = {'model.tower.rotary': True}
_MODERN = {f'model.tower.{part}': True for part in ('rotary', 'rms_norm', 'swiglu')}
_HSTU = {'model.tower.backbone': 'hstu', 'model.tower.attention_dropout': 0.0}

# Where two axes name the same setting, the later one counts.
OURS: Space = (
  tuple({'pretrain.keep_positives': keep} | _SAMPLED for keep in (False, True)),
  tuple({'pretrain.fixed_temperature': True} | kind for kind in (_INNER, *_COSINE)),
  ({'model.tables.init_scale': 0.02}, {'model.tables.init_scale': 0.1}),
  tuple(_dropout(rate) for rate in (0.2, 0.3, 0.5)),
  tuple({'model.tower.token_dropout': rate} for rate in (0.0, 0.1, 0.2)),
  (_width(64), _width(128)),
  ({'model.tower.layers': 1}, {'model.tower.layers': 2}),
  ({}, _ROTARY, _MODERN, _HSTU),
  tuple(_rates(rate) for rate in (5e-4, 1e-3, 2e-3)),
  ({}, {'pretrain.mtl_weight': 0.3, 'pretrain.window': 4, 'pretrain.pairs': 2}),
  ({'pretrain.ema_decay': 0.99}, {'pretrain.ema_decay': 0.999}),
)
SASREC: Space = (
  tuple(_rates(rate) for rate in (5e-4, 1e-3, 2e-3)),
  tuple(_dropout(rate) for rate in (0.2, 0.3, 0.5)),
  (_width(64), _width(128), _width(256)),
  ({'pretrain.uniform_negatives': 256}, {'pretrain.uniform_negatives': 1024}),
  ({'model.tower.layers': 1}, {'model.tower.layers': 2}),
  ({'model.tower.heads': 1}, {'model.tower.heads': 2}),
)


def arms(experiment: Experiment) -> tuple[Arm, ...]:
  """RUNS arms of each model, in turns."""
  published = sasrec(experiment)
  ours = [Arm('PinFM', {}), *(Arm(f'PinFM {i}', point) for i, point in enumerate(_points(OURS), 1))]
  theirs = [Arm(f'SASRec+SS {i}', {**published, **point}) for i, point in enumerate(_points(SASREC), 1)]
  return tuple(arm for pair in zip(ours, [Arm('SASRec+SS', published), *theirs], strict=True) for arm in pair)


def _points(space: Space) -> list[dict[str, Any]]:
  rng, count = np.random.default_rng(_SEED), RUNS - 1
  columns = [rng.permutation(np.resize(np.arange(len(values)), count)) for values in space]
  points = zip(*columns, strict=True)
  return [
    {key: value for values, place in zip(space, point, strict=True) for key, value in values[place].items()}
    for point in points
  ]


about = 'PinFM and SASRec+SS without a number are the launch file as it is and the published settings.'
baseline = 'PinFM'
