"""What longer histories in the ranker (L_d) and longer segments in pretraining (L) are worth. Not in the paper.

Command:   pinfm sweep experiments/quickstart.py --arms experiments/ablations/sequence_length.py --split test
           pinfm sweep experiments/ml1m.py --arms experiments/ablations/sequence_length.py
           pinfm sweep experiments/kuairand.py --arms experiments/ablations/sequence_length.py --split test
           pinfm sweep experiments/globo.py --arms experiments/ablations/sequence_length.py --split test
           (ml1m has no impressions: the rows differ in retrieval alone; histories of kuairand and globo are short)
Hardware:  2 CPU cores, 6 GB of memory
Time:      see experiments/README.md (a pretraining for each row and seed)
Expected:  see experiments/README.md

L_d is finetune.history_length and pretrain.downstream_length, the anchor of the future-token loss; L is
pretrain.segment_length. One of them is changed at a time, except that L grows where it must to leave events behind L_d.
A step of pretraining sees as many positions in every row: segments twice as long are half as many.
"""

from typing import Any

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.sweep.ablations import without_pinfm

REFERENCE = "the launch file's lengths"
about = (
  "L_d: events that the ranker reads; L: events of a segment of pretraining. The reference has the launch file's. "
  'The paper does not vary them.'
)
baseline = REFERENCE


def arms(experiment: Experiment) -> tuple[Arm, ...]:
  """The rows, the reference first."""
  history, segment = experiment.finetune.history_length, experiment.pretrain.segment_length
  block = experiment.finetune.history_block
  rows = [Arm(REFERENCE, {})]
  for events in (history // 4, history // 2, history * 2):
    if events >= block:  # the window slides in whole blocks
      rows.append(Arm(f'L_d {events}', _lengths(experiment, events, max(segment, events + experiment.pretrain.window))))
  for events in (segment // 2, segment * 2):
    if events > experiment.pretrain.downstream_length:
      rows.append(Arm(f'L {events}', _lengths(experiment, None, events)))
  if experiment.arms:
    rows.append(without_pinfm())
  return tuple(rows)


def _lengths(experiment: Experiment, history: int | None, segment: int) -> dict[str, Any]:
  pretrain, tower = experiment.pretrain, experiment.model.tower
  overrides: dict[str, Any] = {}
  if history is not None:
    overrides |= {'finetune.history_length': history, 'pretrain.downstream_length': history}
  if segment != pretrain.segment_length:
    segments = max(1, round(pretrain.batch_segments * pretrain.segment_length / segment))
    overrides |= {'pretrain.segment_length': segment, 'pretrain.batch_segments': segments}
  needed = max(segment, (history or experiment.finetune.history_length) + 2)  # the candidate, and maybe a token
  if needed > tower.max_positions:
    overrides['model.tower.max_positions'] = needed
  return overrides
