"""What rankers cost: parameters, training memory of the compiled step, step time and serving latency, side by side.

All programs are measured in one process, interleaved, so that a ratio is of the same minutes of the same machine. It is
a process of its own (`python -m pinfm_jax.study.costs`), which alone holds the accelerator.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pinfm_jax.bench.results import environment
from pinfm_jax.bench.timing import interleave
from pinfm_jax.config import Arm, Experiment
from pinfm_jax.data.pipeline import Batch, evaluation_batches
from pinfm_jax.errors import ERROR, UserError
from pinfm_jax.evaluate.predict import scoring_program
from pinfm_jax.overrides import from_dict, to_dict
from pinfm_jax.stages.context import Run
from pinfm_jax.sweep.jobs import this_package
from pinfm_jax.train.finetune import dense_stats, training_steps
from pinfm_jax.train.sharding import put_examples
from pinfm_jax.train.step import init_state, make_step
from pinfm_jax.workdir import read_json, write_json

CANDIDATES = 1000  # of one serving request
AGAIN = ' (again)'  # the baseline's programs a second time: how far equal programs differ
_STATS_SAMPLE = 500
_BLOCK = 'cross'  # the block's name among the ranker's parameters


@dataclass(frozen=True)
class CostOptions:
  """How costs are measured.

  Attributes:
    rounds: interleaved repetitions.
    warmup: rounds before them that do not count.
    memory_requests: requests of the batch whose memory is counted; 0 = the batch that trains.
    candidates: of one serving request.
  """

  rounds: int = 25
  warmup: int = 3
  memory_requests: int = 0
  candidates: int = CANDIDATES


@dataclass(frozen=True)
class Cost:
  """Of one ranker.

  Attributes:
    parameters: of the ranker.
    block_parameters: of its interaction block.
    memory_bytes: peak of the training step on one device: state, batch, temporaries.
    step_s: seconds of a training step in each round; of the batch that trains, which lies on the device.
    serve_s: seconds of scoring one request in each round.
  """

  parameters: int
  block_parameters: int
  memory_bytes: int
  step_s: tuple[float, ...]
  serve_s: tuple[float, ...]


@dataclass(frozen=True)
class Costs:
  """Of all rankers, measured together; the baseline stands there a second time under its name with `AGAIN`."""

  costs: Mapping[str, Cost]
  requests: int
  memory_requests: int
  environment: Mapping[str, Any]


def measured_costs(experiment: Experiment, workdir: Path, options: CostOptions, path: Path) -> Costs:
  """Costs of the experiment's arms, read from `path` if it holds them, or measured in a process of its own.

  Args:
    experiment: with the arms to measure.
    workdir: of their run.
    options: how.
    path: JSON file of the costs; the process prints to the .log file beside it.

  Raises:
    UserError: the process fails.
  """
  request = {'experiment': to_dict(experiment), 'workdir': str(workdir), 'options': asdict(options)}
  if not path.exists() or _key(read_json(path)['request']) != _key(request):
    print(f'measuring the costs of {len(experiment.arms)} blocks, one after another in every round', flush=True)
    log = path.with_suffix('.log')
    with log.open('w', encoding='utf-8') as output:
      command = [sys.executable, '-m', 'pinfm_jax.study.costs', str(path)]
      done = subprocess.run(
        command,
        input=json.dumps(request),
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **this_package()},
        text=True,
      )
    if done.returncode:
      lines = log.read_text(encoding='utf-8', errors='replace').strip().splitlines() or ['no message']
      raise UserError(f'the costs could not be measured: {lines[-1].removeprefix(ERROR)} (log: {log})')
  found = read_json(path)
  costs = {name: Cost(**{**c, 'step_s': tuple(c['step_s']), 'serve_s': tuple(c['serve_s'])})
           for name, c in found['costs'].items()}  # fmt: skip
  return Costs(costs, found['requests'], found['memory_requests'], found['environment'])


def _key(request: Mapping[str, Any]) -> dict[str, Any]:
  """What costs depend on: all that is asked for but the split, which is for the quality alone."""
  experiment = request['experiment']
  evaluate = {name: value for name, value in experiment['evaluate'].items() if name != 'split'}
  return {**request, 'experiment': {**experiment, 'evaluate': evaluate}}


def measure(run: Run, options: CostOptions) -> Costs:
  """Costs of the run's arms, in this process."""
  machine = environment()
  with jax.set_mesh(run.mesh):
    made = {arm.name: _Programs(run, arm, options) for arm in run.experiment.arms}
    baseline = next(arm for arm in run.experiment.arms if arm.name == run.experiment.baseline)
    made[baseline.name + AGAIN] = _Programs(run, baseline, options)
    times = {
      kind: interleave({name: getattr(one, kind) for name, one in made.items()}, options.rounds, options.warmup)
      for kind in ('step', 'serve')
    }
  costs = {
    name: Cost(one.parameters, one.block_parameters, one.memory_bytes, times['step'][name], times['serve'][name])
    for name, one in made.items()
  }
  batch = run.experiment.finetune.batch_requests
  return Costs(costs, batch, options.memory_requests or batch, machine)


class _Programs:
  """The compiled step and scorer of one arm, with what they work on."""

  def __init__(self, run: Run, arm: Arm, options: CostOptions):
    own = run.of_arm(arm)
    experiment, requests, layout = own.experiment, own.requests('finetune'), own.experiment.mesh
    task = own.task(training_steps(experiment.finetune, len(requests)))
    host = next(evaluation_batches(requests, experiment.finetune.batch_requests))[0]
    self._batch = put_examples(host)
    self._state = init_state(task, run.mesh, 0, dense_stats(requests, _STATS_SAMPLE), layout)()
    self.parameters = _count(self._state.params['ranker'])
    self.block_parameters = _count(self._state.params['ranker'].get(_BLOCK, {}))
    step = make_step(task, layout)
    self._step = step.lower(self._state, self._batch).compile()
    counted = self._step
    if options.memory_requests not in (0, experiment.finetune.batch_requests):
      counted = step.lower(self._state, _resized(self._batch, options.memory_requests)).compile()
    self.memory_bytes = _peak_bytes(counted)
    weights, rows_GE = jax.tree.map(np.asarray, self._state.params), None
    if self._state.tables:
      rows_GE = jax.numpy.array(self._state.tables.rows_GE)
    score, stats = scoring_program(task, layout), self._state.constants
    weights, stats = jax.device_put((weights, jax.tree.map(np.array, stats)))
    request = put_examples(one_request(host, options.candidates))
    self.serve: Callable[[int], Any] = lambda number: score(weights, rows_GE, stats, request)

  def step(self, number: int) -> Any:
    """One training step."""
    self._state, figures = self._step(self._state, self._batch)
    return figures


def one_request(batch: Batch, candidates: int) -> Batch:
  """A request with so many candidates: those of a batch's requests, repeated, behind the first one's history."""
  places = batch['candidate_mask'].size
  rows = np.flatnonzero(batch['candidate_mask'].reshape(-1))
  chosen = np.resize(rows, candidates)

  def of(name: str, value: np.ndarray) -> np.ndarray:
    if not name.startswith('candidate_'):
      return value[:1]
    return value.reshape(places, *value.shape[2:])[chosen][None]

  return {name: of(name, np.asarray(value)) for name, value in batch.items()}


def _resized(batch: Mapping[str, jax.Array], requests: int) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    name: jax.ShapeDtypeStruct((requests, *x.shape[1:]), x.dtype, sharding=x.sharding) for name, x in batch.items()
  }


def _peak_bytes(compiled: Any) -> int:
  """State and batch, temporaries, and outputs that take none of the arguments' memory: as `pinfm plan` counts."""
  memory = compiled.memory_analysis()
  not_in_place = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return int(memory.argument_size_in_bytes + memory.temp_size_in_bytes + not_in_place)


def _count(tree: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))


def main(arguments: Sequence[str]) -> int:
  """Measures what standard input asks for and writes it to the file; returns the exit code."""
  from pinfm_jax.run import keep_compiled_programs

  request = json.loads(sys.stdin.read())
  workdir = Path(request['workdir'])
  keep_compiled_programs(workdir / 'compiled')
  try:
    run = Run(from_dict(Experiment, request['experiment']), workdir)
    found = measure(run, CostOptions(**request['options']))
  except UserError as error:
    print(f'{ERROR}{error}')
    return 2
  write_json(Path(arguments[0]), {'request': request, **asdict(found)})
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
