"""How PinFM enters the ranker, and what its training is worth (PinFM Tables 1 and 6), with the controls it lacks.

Command:   pinfm sweep experiments/kuairand.py --arms experiments/ablations/fusion.py --split test
           pinfm sweep experiments/globo.py --arms experiments/ablations/fusion.py --split test
           pinfm sweep experiments/quickstart.py --arms experiments/ablations/fusion.py --split test
           (without --split test on the validation split, as while tuning; --only 'lite-mean' 'lite-last' for some rows)
Hardware:  2 CPU cores, 6 GB of memory
Time:      see experiments/README.md
Expected:  see experiments/README.md

A row is the launch file's experiment with that one thing changed. TransAct (the ranker's own sequence module, trained
from scratch) is in all rows or in none, as the launch file says, but for the four rows that name it: the ranker with a
from-scratch sequence transformer is the paper's baseline. From scratch, the tower and the tables learn at the ranker's
full rate; one row keeps the ratio that protects pretrained weights. The epochs of the same compute are those of
`pinfm_jax.sweep.ablations.equal_compute_epochs`. The bidirectional row has no sequence loss, since its events see what
that loss asks for.
"""

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.sweep.ablations import (
  PLAIN_CANDIDATE,
  SCRATCH,
  WITH,
  WITH_PINFM,
  WITHOUT,
  WITHOUT_PINFM,
  content_arms,
  equal_compute_epochs,
)
from pinfm_jax.sweep.arms_file import DataFacts

about = (
  "Ways of PinFM into the ranker. 'with PinFM' is the launch file's own choice. The paper's figures are lifts of Save "
  'HIT@3 on Home Feed over its production ranker.'
)
baseline = WITHOUT
challenger = WITH


def arms(experiment: Experiment, facts: DataFacts) -> tuple[Arm, ...]:
  """The rows, the baseline first."""
  early = {'ranker.fusion': 'early', 'ranker.bidirectional': False}
  content, token = {'ranker.candidate_content': True}, {'ranker.learnable_token': True}
  same_compute = {'finetune.epochs': equal_compute_epochs(experiment, facts.requests)}
  transact = {'ranker.transact.length': experiment.ranker.transact.length or 16}
  none = {'ranker.sequence': 'none'}
  return (
    WITHOUT_PINFM,
    Arm('neither PinFM nor TransAct', none | {'ranker.transact.length': 0}),
    Arm('TransAct, no PinFM', none | transact),
    WITH_PINFM,
    Arm('PinFM and TransAct', transact),
    Arm('early', early | PLAIN_CANDIDATE, '+2.91 %'),
    Arm('early + token', early | PLAIN_CANDIDATE | token),
    *content_arms(
      {
        'early + content': (early | PLAIN_CANDIDATE | content, '+3.08 %'),
        'early + content + token': (early | content | token, '+3.76 %'),
      },
      facts,
    ),
    Arm('lite-mean', {'ranker.fusion': 'mean'} | PLAIN_CANDIDATE, '+1.87 %'),
    Arm('lite-last', {'ranker.fusion': 'last'} | PLAIN_CANDIDATE, '+1.93 %'),
    Arm('frozen', {'finetune.update.frozen': ('tower', 'tables')}, '+0.10 %'),
    Arm('tables frozen', {'finetune.update.frozen': ('tables',)}),
    Arm('bidirectional', early | PLAIN_CANDIDATE | {'ranker.bidirectional': True}, '-1.4 % against early'),
    Arm('similarity as a number alone', {'ranker.similarity_width': 0}),
    Arm('without similarity', {'ranker.similarity': False, 'ranker.similarity_width': 0}),
    Arm('PinFM, no TransAct', {'ranker.transact.length': 0}),
    Arm('scratch', SCRATCH),
    Arm('scratch at the ratio', {'finetune.init': 'scratch'}),
    Arm('scratch, same compute', SCRATCH | same_compute),
  )
