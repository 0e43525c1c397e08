"""What longer histories in the ranker (L_d) and longer segments in pretraining (L) are worth. Not in the paper.

Command:   pinfm sweep experiments/quickstart.py --arms experiments/ablations/sequence_length.py --split test
           pinfm sweep experiments/ml1m.py --arms experiments/ablations/sequence_length.py
           pinfm sweep experiments/kuairand.py --arms experiments/ablations/sequence_length.py --split test
           pinfm sweep experiments/globo.py --arms experiments/ablations/sequence_length.py --split test
           (ml1m has no impressions: the rows differ in retrieval alone; histories of kuairand and globo are short)
Hardware:  2 CPU cores, 6 GB of memory
Time:      on one core: quickstart 10 minutes a seed, ml1m an hour (a pretraining for each row); others not measured
Expected:  nothing from longer ones on both (experiments/README.md); others not measured

L_d is finetune.history_length and pretrain.downstream_length, the anchor of the future-token loss; L is
pretrain.segment_length, which grows where it must to leave events behind L_d. A step of pretraining sees as many
positions in every row: segments twice as long are half as many.
"""

from typing import Any

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.sweep.ablations import WITHOUT_PINFM

REFERENCE = "the launch file's lengths"
about = (
  "L_d: events that the ranker reads; L: events of a segment of pretraining. The reference has the launch file's. "
  'The paper does not vary them.'
)
baseline = REFERENCE


def arms(experiment: Experiment) -> tuple[Arm, ...]:
  """The rows, the reference first."""
  history, segment = experiment.finetune.history_length, experiment.pretrain.segment_length
  lengths = {
    'L_d': [(events, segment) for events in (history // 4, history // 2, history * 2)],
    'L_d and L': [(history // 2, segment // 2)],
    'L': [(history, segment * 2)],
  }
  rows = [_row(experiment, kind, *values) for kind, pairs in lengths.items() for values in pairs]
  return (Arm(REFERENCE, {}), *rows, *([WITHOUT_PINFM] if experiment.arms else []))


def _row(experiment: Experiment, kind: str, history: int, segment: int) -> Arm:
  pretrain, tower = experiment.pretrain, experiment.model.tower
  overrides: dict[str, Any] = {}
  if history != experiment.finetune.history_length:
    overrides |= {'finetune.history_length': history, 'pretrain.downstream_length': history}
    overrides['finetune.history_block'] = min(experiment.finetune.history_block, history)
  segment = max(segment, overrides.get('pretrain.downstream_length', pretrain.downstream_length) + pretrain.window)
  if segment != pretrain.segment_length:
    segments = max(1, round(pretrain.batch_segments * pretrain.segment_length / segment))
    overrides |= {'pretrain.segment_length': segment, 'pretrain.batch_segments': segments}
    if pretrain.uniform_negatives:  # as many for each segment
      overrides['pretrain.uniform_negatives'] = pretrain.uniform_negatives // pretrain.batch_segments * segments
  positions = max(segment, history + 2)  # the candidate, and maybe a token
  if positions > tower.max_positions:
    overrides['model.tower.max_positions'] = positions
  names = {'L_d': f'L_d {history}', 'L_d and L': f'L_d {history}, L {segment}', 'L': f'L {segment}'}
  return Arm(names[kind], overrides)
