"""Multi-task test-time repair of activity sequences, judged on a finished run by noise, attacks and adaptive attacks.

Command:   python experiments/sequence_repair.py --run runs/kuairand --workdir runs/sequence_repair
Options:   --arm 'with PinFM'    --model-seed 0    --requests N (0 = all)    --users N (0 = as the run's)
           --until static | adaptive    --subjects ranking,next    --seeds 0,1,2    --rows none,noise,all
           --set KEY=VALUE ..    (SequenceConfig)
Hardware:  2 CPU cores, 4 GB of memory
Time:      see experiments/README.md; every cell is kept, and a run that was stopped goes on with the next one
Expected:  see experiments/README.md

Reads the workdir of `pinfm run experiments/kuairand.py` (or of quickstart) and trains nothing. PinFM's own losses (next
token, multi token, future token) are the tasks: the repair moves each event's embedding, which the tower's decoder
reads, so that the history predicts itself better. It is judged on the fine-tuned ranker (HIT@3 and AUC of the main
label, over the requests of at least 4 candidates of the evaluation split) and on the pretrained tower's next item
(NDCG@10, whole catalogue).

Columns: clean; PGD on embeddings; injected events, drawn or chosen greedily; natural noise, where no adversary adapts
(replaced, dropped, misordered events); and attacks that know the repair (BPDA, task-aware). Rows: no defence, random
noise of the repair's size, each task alone, all tasks. Settings that are tuned (`--set repair.steps=20`) should be
tuned on the validation split; the evaluation split is the run's own (`evaluate.split`).
"""

import argparse
import sys
from pathlib import Path

import jax

from pinfm_jax.arguments import numbers, some
from pinfm_jax.errors import exit_code
from pinfm_jax.launch import saved_experiment
from pinfm_jax.overrides import apply_overrides, parse_assignments
from pinfm_jax.robustness.event_noise import event_pool
from pinfm_jax.robustness.from_run import next_item_subject, pinfm_arm, ranking_subject
from pinfm_jax.robustness.sequence_evaluation import SequenceEvaluation
from pinfm_jax.robustness.sequence_figures import Figures
from pinfm_jax.robustness.sequence_tables import draw, tables, verdict
from pinfm_jax.robustness.sequences import ROWS, SequenceConfig
from pinfm_jax.stages.context import Run
from pinfm_jax.workdir import write_text

PARTS = ('static', 'adaptive')
SUBJECTS = {'ranking': ranking_subject, 'next': next_item_subject}


def main(arguments: list[str] | None = None) -> int:
  options = _parser().parse_args(arguments)
  return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
  workdir = Path(options.workdir)
  # XLA takes most of a minute for some of these programs: a run that goes on does not compile them again.
  jax.config.update('jax_compilation_cache_dir', str((workdir / 'compiled').absolute()))
  finished = Run(saved_experiment(options.run), Path(options.run))
  config = apply_overrides(SequenceConfig(), parse_assignments(options.assignments))
  if options.seeds:
    config = apply_overrides(config, {'seeds': options.seeds})
  arm, found, lines = pinfm_arm(finished, options.arm), [], []
  pool = event_pool(finished.dataset, finished.split.pretrain_until, config.pool)
  with jax.set_mesh(finished.mesh):
    for name in options.subjects:
      examples = options.requests if name == 'ranking' else options.users
      subject, weights = SUBJECTS[name](finished, arm, options.model_seed, config.bank, examples)
      settings = {
        'model': finished.of_arm(arm).finetune_settings(options.model_seed),
        'split': finished.experiment.evaluate.split,
        'examples': len(subject.rows),
      }
      directory = workdir / 'cells' / subject.name
      evaluation = SequenceEvaluation(directory, config, subject, weights, pool, settings)
      evaluation.run(options.rows or None, adaptive=options.until == 'adaptive')
      figures = Figures(evaluation, dict(finished.experiment.evaluate.utility))
      found, lines = [*found, *tables(figures)], [*lines, *verdict(figures)]
      draw(figures, workdir)
  write_text(workdir / 'results.md', '\n'.join([*(table.markdown() for table in found), *lines]) + '\n')
  print('\n'.join([*(table.text() for table in found), *lines]))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--run', required=True, help='workdir of a finished `pinfm run`; nothing is written there')
  parser.add_argument('--workdir', required=True, help='of cells, tables and plots')
  parser.add_argument('--arm', default='', help='ranker with PinFM to judge (default: the last one)')
  parser.add_argument('--model-seed', type=int, default=0, help="of the run's training")
  parser.add_argument('--requests', type=int, default=0, help='ranking requests, drawn; 0 = all')
  parser.add_argument('--users', type=int, default=0, help="users of the next-item task, drawn; 0 = as the run's own")
  parser.add_argument('--until', choices=PARTS, default=PARTS[-1], help='the last part to run')
  parser.add_argument('--subjects', type=some(SUBJECTS), default=tuple(SUBJECTS), help='ranking, next or both')
  parser.add_argument('--seeds', type=numbers, default=(), help='of the defence, as 0,1,2')
  parser.add_argument('--rows', type=some(ROWS), default=(), help=f'defences to work on, some of {",".join(ROWS)}')
  parser.add_argument('--set', metavar='KEY=VALUE', nargs='+', action='extend', default=[], dest='assignments',
                      help='change settings (SequenceConfig), for example repair.steps=20')  # fmt: skip
  return parser


if __name__ == '__main__':
  sys.exit(main())
