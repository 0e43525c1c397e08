"""Which actions count as positive targets of pretraining, A_pos (PinFM Table 4).

Command:   pinfm sweep experiments/kuairand.py --arms experiments/ablations/actions.py --split test
           pinfm sweep experiments/quickstart.py --arms experiments/ablations/actions.py --split test
           (not globo: its only action is the click)
Hardware:  2 CPU cores, 6 GB of memory
Time:      kuairand: 37 minutes a seed on one core (a tower for each row); quickstart: 11 minutes
Expected:  kuairand: no difference in long_view beyond seeds (experiments/README.md), nor in
           HIT@3 of save on quickstart

The main action is the launch file's evaluate.main_label, where the paper has Save; negative actions are those with a
negative weight in evaluate.utility, as Hide. The next-token loss of fine-tuning takes the same set.
"""

from typing import Any

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.errors import UserError
from pinfm_jax.sweep.ablations import WITHOUT_PINFM
from pinfm_jax.sweep.arms_file import DataFacts

REFERENCE = 'main action'
about = (
  "The positive actions of pretraining. 'main action' is the label that the evaluation is about. The paper's figures "
  'are lifts of HIT@3 on Home Feed over Save alone: Save / Hide (lower is better).'
)
baseline = REFERENCE


def arms(experiment: Experiment, facts: DataFacts) -> tuple[Arm, ...]:
  """The rows, the reference first."""
  main, utility = experiment.evaluate.main_label, experiment.evaluate.utility
  if main not in facts.actions or len(facts.actions) < 2:
    raise UserError(
      f'actions of the histories: {", ".join(facts.actions)}; this ablation needs {main} (evaluate.main_label) and one '
      'more to compare'
    )
  kind = [name for name in facts.actions if utility.get(name, 0.0) >= 0]
  sets = {REFERENCE: ((main,), '0 / 0')}
  for name in kind:
    if name != main and utility.get(name, 0.0) > 0:
      sets[f'main action + {name}'] = ((main, name), '+0.02 / -2.67 %' if name == 'click' else '')
  sets |= {
    'all but negative': (tuple(kind), '-0.2 / -1.76 %'),
    'all but negative and click': (tuple(name for name in kind if name != 'click'), '+0.19 / -4.1 %'),
    'all': (facts.actions, ''),
    'every event, with or without action': ((), ''),
  }
  distinct = {chosen: name for name, (chosen, _) in reversed(sets.items())}  # of equal sets the first name stays
  rows = [Arm(name, _positive(sets[name][0]), sets[name][1]) for name in sets if name in distinct.values()]
  return (*rows, WITHOUT_PINFM)


def _positive(actions: tuple[str, ...]) -> dict[str, Any]:
  """Where every event is positive, no shown one is left to be a negative."""
  none = {} if actions else {'pretrain.impression_negatives': 0}
  return {'pretrain.positive_actions': actions} | none
