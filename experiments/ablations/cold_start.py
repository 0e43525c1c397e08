"""What each part of the cold-start recipe is worth for new items (PinFM Table 2).

Command:   pinfm sweep experiments/globo.py --arms experiments/ablations/cold_start.py --split test
           pinfm sweep experiments/quickstart.py --arms experiments/ablations/cold_start.py --split test
           (experiments/kuairand.py too, but all its items are 14 to 29 days old, and have no content)
Hardware:  2 CPU cores, 6 GB of memory
Time:      globo: 4:10 a ranker, two at a time; quickstart: 8 minutes a seed on one core
Expected:  globo: without the recipe new articles lose, with it they do not (experiments/README.md);
           quickstart: dropout by age costs more than it gives

CIR randomises a share of the candidates' ids, IDD drops the module's outputs by the item's age, GSLT adds the content
and the learnable token to the candidate. Ages and shares are the launch file's (news: hours instead of days); where it
has a part switched off, the paper's: 10 % of the ids, 0.7 below the first edge of the age, 0.5 below the others.
"""

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.sweep.ablations import PLAIN_CANDIDATE, WITHOUT, WITHOUT_PINFM, content_arms
from pinfm_jax.sweep.arms_file import DataFacts

about = (
  "The cold-start recipe by parts. The paper's figures are lifts of Save HIT@3 over its production ranker: all items / "
  'items under 28 days / under 7 days.'
)
baseline = WITHOUT


def arms(experiment: Experiment, facts: DataFacts) -> tuple[Arm, ...]:
  """The rows, the baseline first."""
  cold, setting = experiment.finetune.cold_start, 'finetune.cold_start.'
  papers = tuple(0.7 if place == 0 else 0.5 for place in range(len(cold.age_edges_hours)))
  off = {f'{setting}randomise': 0.0, f'{setting}age_dropout': (0.0,) * len(papers)} | PLAIN_CANDIDATE
  cir = {f'{setting}randomise': cold.randomise or 0.1}
  dropout = cold.age_dropout if any(cold.age_dropout) else papers
  idd = {f'{setting}age_dropout': dropout, f'{setting}whole_vector': False}
  idd_whole = idd | {f'{setting}whole_vector': True}
  gslt = {'ranker.candidate_content': True, 'ranker.learnable_token': True}
  return (
    WITHOUT_PINFM,
    Arm('no recipe', off, '+3.36 / -4.40 / -23.98 %'),
    Arm('CIR', off | cir, '+3.43 / +1.25 / -4.38 %'),
    Arm('CIR + IDD', off | cir | idd, '+3.49 / +10.71 / +8.16 %'),
    *content_arms({'CIR + IDD + GSLT': (off | cir | idd | gslt, '+3.76 / +17.72 / +12.01 %')}, facts),
    Arm('IDD', off | idd),
    Arm('IDD of whole vectors', off | idd_whole),
    *content_arms({'GSLT': (off | gslt, '')}, facts),
    Arm('CIR + IDD of whole vectors', off | cir | idd_whole),
    *content_arms({'CIR + IDD of whole vectors + GSLT': (off | cir | idd_whole | gslt, '')}, facts),
  )
