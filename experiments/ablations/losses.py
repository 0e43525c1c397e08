"""Which losses of pretraining and of fine-tuning matter (PinFM Table 3), and the ranker's loss on the module itself.

Command:   pinfm sweep experiments/kuairand.py --arms experiments/ablations/losses.py --split test
           pinfm sweep experiments/globo.py --arms experiments/ablations/losses.py --split test
           pinfm sweep experiments/quickstart.py --arms experiments/ablations/losses.py --split test
Hardware:  2 CPU cores, 6 GB of memory
Time:      kuairand: three towers a seed, 2:40 each, and 2:42 to 3:31 a ranker, on one core; globo: three, 2:05 to
           2:22, and ten rankers, 1:40 to 3:35; quickstart: 10 minutes a seed on one core
Expected:  kuairand: no difference in long_view beyond seeds; globo: ntl alone has the most HIT@3
           (experiments/README.md); quickstart: ntl in fine-tuning matters, the losses of pretraining
           hardly differ

A row is named "losses of pretraining / sequence losses of fine-tuning". Weights are the launch file's; a loss that it
has switched off gets weight 1 in pretraining and 0.1 in fine-tuning.
"""

from typing import Any

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.sweep.ablations import WITHOUT_PINFM, content_arms
from pinfm_jax.sweep.arms_file import DataFacts

REFERENCE = 'ntl / ntl'
about = (
  'Losses of pretraining / sequence losses of fine-tuning: next token (ntl), multi token (mtl), future token (ftl). '
  f"The paper's figures are lifts of HIT@3 on Home Feed over its row {REFERENCE}: Save / Hide (lower is better)."
)
baseline = REFERENCE


def arms(experiment: Experiment, facts: DataFacts) -> tuple[Arm, ...]:
  """The rows, the reference first."""
  pretrain, finetune = experiment.pretrain, experiment.finetune
  weights = {f'pretrain.{name}_weight': getattr(pretrain, f'{name}_weight') or 1.0 for name in ('ntl', 'mtl', 'ftl')}
  all_losses, no_ftl = weights, weights | {'pretrain.ftl_weight': 0.0}
  ntl_alone = no_ftl | {'pretrain.mtl_weight': 0.0}
  weight = finetune.ntl_weight or 0.1
  plain = {'ranker.candidate_content': False}
  ntl = {'finetune.ntl_weight': weight, 'finetune.mtl_weight': 0.0} | plain
  none, both = ntl | {'finetune.ntl_weight': 0.0}, ntl | {'finetune.mtl_weight': weight}
  return (
    Arm(REFERENCE, ntl_alone | ntl, '0 / 0'),
    Arm('ntl+mtl / ntl', no_ftl | ntl, '+0.42 / -1.27 %'),
    Arm('ntl+mtl+ftl / ntl', all_losses | ntl, '+0.95 / +2.43 %'),
    Arm('ntl+mtl+ftl / none', all_losses | none, '+0.41 / +1.06 %'),
    Arm('ntl+mtl+ftl / ntl+mtl', all_losses | both, '+1.01 / +1.03 %'),
    *_module_arms(experiment, all_losses | ntl),
    *content_arms(
      {
        'ntl+mtl+ftl / ntl, content': (all_losses | ntl | {'ranker.candidate_content': True}, ''),
        'ntl+mtl+ftl / ntl, content, no alignment': (
          all_losses | ntl | {'ranker.candidate_content': True, 'finetune.align_weight': 0.0},
          '',
        ),
      },
      facts,
    ),
    WITHOUT_PINFM,
  )


def _module_arms(experiment: Experiment, overrides: dict[str, Any]) -> tuple[Arm, ...]:
  """Without each of the module's own losses that the launch file has, or with both where it has none."""
  own = {'module loss': 'finetune.module_weight', 'tie': 'finetune.tie_weight'}
  used = {name: key for name, key in own.items() if getattr(experiment.finetune, key.partition('.')[2])}
  if not used:
    both = {'finetune.module_weight': 0.5, 'finetune.tie_weight': 0.1}
    return (Arm('ntl+mtl+ftl / ntl, module loss and tie', overrides | both),)
  return tuple(Arm(f'ntl+mtl+ftl / ntl, no {name}', overrides | {key: 0.0}) for name, key in used.items())
