"""`pinfm bench repair`: the time of a test-time repair against that of its forward-backward passes alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.bench import plot
from pinfm_jax.bench.results import Figure, Findings, environment, make_directory, write_findings
from pinfm_jax.bench.timing import interleave, ratios
from pinfm_jax.errors import UserError
from pinfm_jax.progress import Progress
from pinfm_jax.robustness.draws import example_seeds
from pinfm_jax.robustness.networks import CLASSIFIERS, ResNet, ResNetConfig
from pinfm_jax.robustness.repair import LossTerm, RepairConfig, passes, repair
from pinfm_jax.robustness.tasks import NAMES, Tasks, TasksConfig

ASKED = 1.2  # the repair's time over that of its passes


@dataclass(frozen=True)
class RepairSizes:
  """What is measured.

  Attributes:
    classifier: whose features the tasks share.
    tasks: the task networks.
    images: that are repaired, a batch a round.
    batch: images at a time.
    steps: of the repair.
    quick: nothing is asked of these sizes.
  """

  classifier: ResNetConfig = CLASSIFIERS['small']
  tasks: TasksConfig = TasksConfig()
  images: int = 1000
  batch: int = 100
  steps: int = 40
  quick: bool = False


FULL = RepairSizes()
QUICK = RepairSizes(
  CLASSIFIERS['test'],
  TasksConfig(bank=16, projection=(16, 8), rotation_width=16, inpainting_width=16, inpainting_blocks=1),
  images=16, batch=8, steps=2, quick=True,
)  # fmt: skip


def bench_repair(out: str | Path, sizes: RepairSizes = FULL) -> Findings:
  """Repairs images by all three tasks and, in turns, makes the same passes without a repair around them.

  The networks are untrained and the images noise: neither changes what a pass costs.

  Args:
    out: directory of results.json, results.md and a plot.
    sizes: what is measured.

  Raises:
    UserError: no directory, or batches that do not fill the images.
  """
  if sizes.images % sizes.batch:
    raise UserError(f'{sizes.images} images are not whole batches of {sizes.batch}')
  directory, machine, rounds = make_directory(out), environment(), sizes.images // sizes.batch
  print(f'== {sizes.images} images, {sizes.steps} steps, a batch of {sizes.batch} a round', flush=True)
  terms, config = _terms(sizes), RepairConfig(steps=sizes.steps)
  progress, repaired = Progress('repair and passes', rounds + 1, 'batches'), _repair(terms, config, sizes)

  def shown(number: int) -> Any:
    progress.update(number)  # the first batch is for compilation
    return repaired(number)

  seconds = interleave({'repair': shown, 'passes': _passes(terms, config, sizes)}, rounds, 1)
  progress.close()
  whole = {name: sum(times) for name, times in seconds.items()}
  ratio = ratios(seconds['repair'], seconds['passes'])
  figures = [
    Figure.of('over passes', 'repair over its passes alone', ratio, at_most=None if sizes.quick else ASKED),
    Figure('repair', f'repair of {sizes.images} images in all', whole['repair'], unit='s'),
    Figure('passes', 'its passes alone, in all', whole['passes'], unit='s'),
    Figure(
      'passes an image', 'forward-backward passes of the classifier that an image costs', passes(terms, config), unit=''
    ),
  ]
  speeds = {name: sizes.images / time for name, time in whole.items()}
  plot.bars(directory / 'repair.png', 'Repair by all tasks, and its passes alone', speeds, 'images/s')
  findings = Findings('Repair against its passes', _settings(sizes, config), figures, _NOTES, machine)
  write_findings(findings, directory)
  return findings


def _settings(sizes: RepairSizes, config: RepairConfig) -> dict[str, Any]:
  kept = {name: getattr(sizes, name) for name in ('images', 'batch', 'steps')}
  return kept | {'tasks': ', '.join(NAMES), 'ball': f'{config.ball.norm} {255 * config.ball.radius:.0f}/255'}


def _terms(sizes: RepairSizes) -> tuple[LossTerm, ...]:
  tasks, key = Tasks(sizes.tasks, sizes.classifier), jax.random.key(0)
  params = tasks.init(key, ResNet(sizes.classifier).init(key, jnp.zeros((1, 32, 32, 3)))['params'])
  bank = jax.random.normal(key, (sizes.tasks.bank, sizes.tasks.projection[1]))
  return tasks.terms({**params, 'bank': bank / jnp.linalg.norm(bank, axis=-1, keepdims=True)})


def _images(sizes: RepairSizes, number: int) -> tuple[jax.Array, jax.Array]:
  """A round's images and their indices."""
  index_B = jnp.arange(sizes.batch) + number * sizes.batch
  return jax.random.uniform(jax.random.key(number), (sizes.batch, 32, 32, 3)), index_B


def _repair(terms: tuple[LossTerm, ...], config: RepairConfig, sizes: RepairSizes) -> Callable[[int], Any]:
  program = jax.jit(lambda x, index_B: repair(terms, x, config, index_B, report=False).x)
  return lambda number: program(*_images(sizes, number))


def _passes(terms: tuple[LossTerm, ...], config: RepairConfig, sizes: RepairSizes) -> Callable[[int], Any]:
  """Each step's value and gradient of each term in a program of its own: nothing is updated, projected or kept."""

  def program(term: LossTerm) -> Callable[..., Any]:
    return jax.jit(jax.value_and_grad(lambda x, index_B, step: jnp.sum(term.loss(x, example_seeds(index_B, step)))))

  programs = [program(term) for term in terms]

  def run(number: int) -> Any:
    x, index_B = _images(sizes, number)
    return [program(x, index_B, np.uint32(step)) for step in range(config.steps) for program in programs]

  return run


_NOTES = (
  'Passes: the value and the gradient of each task for each step, each in a program of its own, nothing around them.',
)
