"""The search for the settings of our model and of SASRec+SS, with the same number of runs: arms for the launch files.

Command:   pinfm sweep experiments/sequential/beauty.py --arms experiments/sequential/search.py --seeds 1
           (sports.py, toys.py and ml1m.py alike; on the validation events, which is the default split of a sweep)
Hardware:  2 CPU cores, 3 GB of memory; or one GPU
Time:      see experiments/README.md; it goes on where it was stopped, and `--only NAME ..` runs some of the arms
Expected:  see experiments/README.md

Each arm is a model's settings with one change, or a few that belong together: of ours those of the launch file, of
SASRec+SS the published ones; so the table says what each change is worth. Choose by NDCG@10 in it, write the choice
into the launch file, and measure it with three seeds and `--split test`.
"""

from collections.abc import Mapping
from typing import Any

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.sequential import sasrec


def _width(width: int) -> dict[str, Any]:
  return {'model.tower.width': width, 'model.tower.output_width': width, 'model.tables.width': width}


def _dropout(rate: float) -> dict[str, Any]:
  return {f'model.tower.{kind}': rate for kind in ('dropout', 'embedding_dropout', 'attention_dropout')}


def _rate(rate: float) -> dict[str, Any]:
  return {'pretrain.update.learning_rate': rate, 'pretrain.update.table_learning_rate': rate}


def _drawn(count: int) -> dict[str, Any]:
  return {'pretrain.full_catalogue': False, 'pretrain.uniform_negatives': count, 'pretrain.log_q': 'counts'}


def _modern(on: bool) -> dict[str, Any]:
  return {f'model.tower.{part}': on for part in ('rotary', 'rms_norm', 'swiglu')}


_COSINE = {'model.tower.dot_product': False, 'pretrain.fixed_temperature': False}

OURS: Mapping[str, Mapping[str, Any]] = {
  'dropout 0.2': _dropout(0.2),
  'dropout 0.4': _dropout(0.4),
  'dropout 0.5': _dropout(0.5),
  'width 64': _width(64),
  'width 128': _width(128),
  'width 256': _width(256),
  '1 layer': {'model.tower.layers': 1},
  '2 layers': {'model.tower.layers': 2},
  '2 heads': {'model.tower.heads': 2},
  'rotary, RMSNorm, SwiGLU': _modern(True),
  'learned positions, LayerNorm, GELU': _modern(False),
  'SASRec blocks': {'model.tower.backbone': 'sasrec'},
  'GPT-2 blocks': {'model.tower.backbone': 'gpt2'},
  'HSTU': {'model.tower.backbone': 'hstu', 'model.tower.attention_dropout': 0.0, **_modern(False)},
  'full softmax': {'pretrain.full_catalogue': True, 'pretrain.uniform_negatives': 0, 'pretrain.log_q': 'none'},
  '2,048 negatives, logQ': _drawn(2048),
  'rate 5e-4': _rate(5e-4),
  'rate 2e-3': _rate(2e-3),
  'rate ends at 0.1': {'pretrain.update.final_ratio': 0.1},
  'rate ends at 0.4': {'pretrain.update.final_ratio': 0.4},
  'rate held': {'pretrain.update.final_ratio': 1.0},
  'cosine, temperature 0.07': _COSINE | {'pretrain.temperature': 0.07},
  'token dropout 0.2': {'model.tower.token_dropout': 0.2},
  'item dropout 0.2': {'pretrain.item_dropout': 0.2},
  'initial scale 0.1': {'model.tables.init_scale': 0.1},
  'initial scale 0.02': {'model.tables.init_scale': 0.02},
  'next token alone': {'pretrain.mtl_weight': 0.0},
  'half of the multi-token loss': {'pretrain.mtl_weight': 0.5, 'pretrain.window': 4, 'pretrain.pairs': 2},
  'multi-token': {'pretrain.mtl_weight': 1.0, 'pretrain.window': 6, 'pretrain.pairs': 3},
  'twice the multi-token loss': {'pretrain.mtl_weight': 2.0, 'pretrain.window': 8, 'pretrain.pairs': 4},
  'average 0.99': {'pretrain.ema_decay': 0.99},
  'average 0.998': {'pretrain.ema_decay': 0.998},
  'average 0.999': {'pretrain.ema_decay': 0.999},
}
SASREC: Mapping[str, Mapping[str, Any]] = {
  'dropout 0.3': _dropout(0.3) | {'pretrain.item_dropout': 0.3},
  'dropout 0.5': _dropout(0.5) | {'pretrain.item_dropout': 0.5},
  'dropout 0.1': _dropout(0.1) | {'pretrain.item_dropout': 0.1},
  'width 128': _width(128),
  'width 256': _width(256),
  '2 layers': {'model.tower.layers': 2},
  '2 heads': {'model.tower.heads': 2},
  'rate 5e-4': _rate(5e-4),
  'rate 2e-3': _rate(2e-3),
  '256 negatives': {'pretrain.uniform_negatives': 256, 'pretrain.count_as': 0},
  '2,048 negatives': {'pretrain.count_as': 0},
  '2,048 negatives as 1,024': {'pretrain.count_as': 1024},
  'SASRec blocks without padding': {'model.tower.backbone': 'sasrec'},
  'GPT-2 blocks': {'model.tower.backbone': 'gpt2'},
  'no item dropout': {'pretrain.item_dropout': 0.0},
  'item dropout 0.4': {'pretrain.item_dropout': 0.4},
  'multi-token': {'pretrain.mtl_weight': 1.0, 'pretrain.window': 6, 'pretrain.pairs': 3},
  'wider MLP': {'model.tower.mlp_ratio': 4},
  'initial scale 0.02': {'model.tables.init_scale': 0.02},
  'initial scale 0.1': {'model.tables.init_scale': 0.1},
  'average 0.99': {'pretrain.ema_decay': 0.99, 'pretrain.ema_tables': True},
  'average 0.998': {'pretrain.ema_decay': 0.998, 'pretrain.ema_tables': True},
  'rotary, RMSNorm, SwiGLU': {'model.tower.backbone': 'sasrec'} | _modern(True),
}


def arms(experiment: Experiment) -> tuple[Arm, ...]:
  """Both models and as many changes of each, in turns: a search that is stopped has spent the same on both."""
  published = sasrec(experiment)
  ours = [Arm('PinFM', {})]
  for name, change in OURS.items():
    if apply_overrides(experiment, change) != experiment:  # else it is what the launch file has
      ours.append(Arm(f'PinFM, {name}', change))
  theirs = [Arm('SASRec+SS', published)]
  theirs += [Arm(f'SASRec+SS, {name}', {**published, **change}) for name, change in SASREC.items()]
  if len(ours) != len(theirs):
    raise UserError(
      f'{len(ours)} arms of our model and {len(theirs)} of SASRec+SS, which are to be as many: changes that the '
      'settings have already are left out; start from the launch file as it is'
    )
  return tuple(arm for pair in zip(ours, theirs, strict=True) for arm in pair)


about = 'PinFM and SASRec+SS without a change are the launch file as it is and the published settings.'
baseline = 'PinFM'
