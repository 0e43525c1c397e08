"""Multi-task test-time repair (arXiv:2204.03714) on CIFAR-10, judged by transferred and by adaptive attacks.

Command:   PINFM_DATA=DIR python experiments/cifar10_repair.py --workdir runs/cifar10        (DIR holds cifar10/)
Options:   --size small (default) | gpu | paper | test    --until classifier | heads | transfer | adaptive | pictures
           --seeds 0,1,2    --rows none,noise,all    (defences; the rest of the table stays as it is)
           --transfer-images 10000 --adaptive-images 1000 --eot 20 --batch 1000    (where a GPU is at hand; but for
           --batch in a workdir without cells of other numbers)
Hardware:  small: 2 CPU cores, 8 GB of memory.  gpu: one GPU.  paper: one GPU of 80 GB.
Time:      see experiments/README.md; every part resumes where it was stopped
Expected:  a gain under transfer and about none in the worst case over adaptive attacks (Croce et al., ICML 2022)

Trains a robust classifier, the three task networks on it, and prints three tables: accuracy under attacks that know
the classifier alone, accuracy under attacks that know the repair too, and what the repair changes, with intervals. The
weights are chosen on 1,000 training images that do not train; the test images are read for the tables alone.

Small differs from the paper in this: a classifier of 28 M multiply-adds in place of WRN-28-10 with extra data, a
rotation head on its features in place of a network of its own, one drawn rotation a step in place of four, hidden
squares in place of a hidden middle, 10 repair steps of 4/255 in place of 40 of 2/255, and adaptive attacks of 10 steps
with EOT over 4 draws on 128 images in place of 20 over 20 on 1,000, so that its worst case is an upper bound. Gpu has
small's tasks and repair on a ResNet-18 in bfloat16, trained longer and by PGD of 3 steps, and its adaptive attacks have
10 steps with EOT over 20 draws on 1,000 images. Paper differs in that its classifier is trained here, by TRADES,
without extra data.
"""

import argparse
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax

from pinfm_jax.arguments import numbers, some
from pinfm_jax.data.public.cifar10 import Images, load, shuffled
from pinfm_jax.errors import UserError, exit_code
from pinfm_jax.robustness.balls import Ball
from pinfm_jax.robustness.defended import ROWS, EvaluationConfig
from pinfm_jax.robustness.evaluation import Evaluation
from pinfm_jax.robustness.networks import CLASSIFIERS, ResNetConfig
from pinfm_jax.robustness.pictures import draw
from pinfm_jax.robustness.repair import RepairConfig
from pinfm_jax.robustness.tables import tables, verdict
from pinfm_jax.robustness.tasks import Tasks, TasksConfig
from pinfm_jax.robustness.train_images import AdversarialConfig, train_classifier, train_heads, with_bank
from pinfm_jax.robustness.training import Schedule
from pinfm_jax.workdir import write_text

PARTS = ('classifier', 'heads', 'transfer', 'adaptive', 'pictures')
HELD_OUT = 1000


@dataclass(frozen=True)
class Size:
  """All settings of one run."""

  classifier: ResNetConfig
  adversarial: AdversarialConfig
  classifier_schedule: Schedule
  tasks: TasksConfig
  heads_schedule: Schedule
  evaluation: EvaluationConfig
  train_images: int = 49_000
  held_out: int = HELD_OUT


SIZES = {
  'small': Size(
    classifier=CLASSIFIERS['small'],
    adversarial=AdversarialConfig(),
    classifier_schedule=Schedule(epochs=16, batch=128, learning_rate=0.1, evaluations=10),
    tasks=TasksConfig(),
    heads_schedule=Schedule(epochs=10, batch=128, learning_rate=0.05, average=0.99, evaluations=5),
    evaluation=EvaluationConfig(repair=RepairConfig(Ball('linf', 16 / 255), steps=10, step_size=4 / 255)),
  ),
  'gpu': Size(
    classifier=replace(CLASSIFIERS['resnet18'], bfloat16=True),
    adversarial=AdversarialConfig(steps=3, step_size=4 / 255, noise=1.0, project=True),
    classifier_schedule=Schedule(epochs=36, batch=256, learning_rate=0.1, average=0.998, evaluations=6),
    tasks=TasksConfig(),
    heads_schedule=Schedule(epochs=6, batch=256, learning_rate=0.05, average=0.99, evaluations=2),
    evaluation=EvaluationConfig(
      repair=RepairConfig(Ball('linf', 16 / 255), steps=10, step_size=4 / 255), adaptive_images=1000, batch=1000, eot=20
    ),
  ),
  'paper': Size(
    classifier=CLASSIFIERS['wrn-28-10'],
    adversarial=AdversarialConfig('trades', steps=10, step_size=2 / 255, project=True),
    classifier_schedule=Schedule(epochs=76, batch=256, learning_rate=0.1, evaluations=19),
    tasks=TasksConfig(
      views=4,
      rotation='network',
      rotation_width=192,
      rotations=4,
      inpainting_width=256,
      inpainting_blocks=4,
      mask='centre',
      weights={'contrastive': 1.0, 'rotation': 50.0, 'inpainting': 10.0},
    ),
    heads_schedule=Schedule(epochs=100, batch=256, learning_rate=0.05),
    evaluation=EvaluationConfig(
      transfer_images=10_000, adaptive_images=1000, batch=250, steps=50, adaptive_steps=20, eot=20, queries=1000
    ),
  ),
  'test': Size(
    classifier=CLASSIFIERS['test'],
    adversarial=AdversarialConfig(),
    classifier_schedule=Schedule(epochs=1, batch=16, learning_rate=0.05, evaluations=2),
    tasks=TasksConfig(bank=16, projection=(16, 8), rotation_width=16, inpainting_width=16, inpainting_blocks=1),
    heads_schedule=Schedule(epochs=1, batch=16, learning_rate=0.05, evaluations=1),
    evaluation=EvaluationConfig(
      repair=RepairConfig(Ball('linf', 16 / 255), steps=2, step_size=8 / 255),
      transfer_images=16,
      adaptive_images=8,
      batch=8,
      seeds=(0,),
      steps=2,
      targets=2,
      adaptive_steps=2,
      eot=2,
      unrolled_steps=1,
      strengths=(0.0, 1.0),
      queries=2,
      transfer=('pgd', 'apgd-t'),
      rows=('none', 'noise', 'inpainting', 'all'),
    ),
    train_images=64,
    held_out=16,
  ),
}


def main(arguments: list[str] | None = None) -> int:
  options = _parser().parse_args(arguments)
  return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
  size, workdir, last = SIZES[options.size], Path(options.workdir), PARTS.index(options.until)
  given = {name: getattr(options, name) for name in ('seeds', 'transfer_images', 'adaptive_images', 'eot', 'batch')}
  config = replace(size.evaluation, **{name: value for name, value in given.items() if value not in (None, ())})
  # XLA takes most of a minute for some of these programs: a run that goes on does not compile them again.
  jax.config.update('jax_compilation_cache_dir', str((workdir / 'compiled').absolute()))
  train, held_out = _train_images(options.data, size)
  classifier = train_classifier(
    workdir / 'classifier', size.classifier, size.adversarial, size.classifier_schedule, train, held_out
  )
  if last < PARTS.index('heads'):
    return
  tasks = Tasks(size.tasks, size.classifier)
  trained = train_heads(workdir / 'heads', tasks, classifier, size.heads_schedule, train, held_out)
  if last < PARTS.index('transfer'):
    return
  untrained = with_bank(tasks, tasks.init(jax.random.key(1), classifier), train)
  # The tables show all rows that are there; `--rows` says which are worked on.
  settings = {key: value for key, value in asdict(size).items() if key != 'evaluation'}
  test = shuffled(load(options.data, 'test'), seed=0)
  evaluation = Evaluation(workdir / 'cells', config, tasks, trained, untrained, test, settings)
  evaluation.run(options.rows or config.rows, adaptive=last >= PARTS.index('adaptive'))
  found, lines = tables(evaluation), verdict(evaluation)
  write_text(workdir / 'results.md', '\n'.join([*(table.markdown() for table in found), *lines]) + '\n')
  print('\n'.join([*(table.text() for table in found), *lines]))
  if last >= PARTS.index('pictures'):
    draw(evaluation, workdir, images=min(config.adaptive_images, 128))


def _train_images(data: str, size: Size) -> tuple[Images, Images]:
  """Images to train on, and those that choose the weights; disjoint."""
  images = shuffled(load(data, 'train'), seed=0)
  needed = size.train_images + size.held_out
  if len(images) < needed:
    raise UserError(f'{data}: the training split has {len(images)} images; this size needs {needed}')
  return images[: size.train_images], images[size.train_images : needed]


def _parser() -> argparse.ArgumentParser:
  data = os.path.join(os.environ['PINFM_DATA'], 'cifar10') if 'PINFM_DATA' in os.environ else None
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--workdir', required=True, help='of checkpoints, cells, tables and plots')
  parser.add_argument('--data', default=data, required=data is None, help='CIFAR-10: folders, an archive, or batches')
  parser.add_argument('--size', choices=tuple(SIZES), default='small')
  parser.add_argument('--until', choices=PARTS, default=PARTS[-1], help='the last part to run')
  parser.add_argument('--seeds', type=numbers, default=(), help='of the defence, as 0,1,2')
  parser.add_argument('--transfer-images', type=int, help='images in the columns clean and transfer')
  parser.add_argument('--adaptive-images', type=int, help='images in the adaptive columns')
  parser.add_argument('--eot', type=int, help='draws of the repair in a step of BPDA + EOT')
  parser.add_argument('--batch', type=int, help='images at a time')
  parser.add_argument('--rows', type=some(ROWS), default=(), help=f'defences to work on, some of {",".join(ROWS)}')
  return parser


if __name__ == '__main__':
  sys.exit(main())
