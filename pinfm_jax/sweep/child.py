"""One run of a sweep, in a process of its own: `python -m pinfm_jax.sweep.child`, started by `sweep.jobs` alone.

The first line of standard input says what to do. Standard input then stays open for as long as the sweep lives: its end
is how a run learns that the sweep was killed, however that happened.
"""

import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path


def main() -> int:
  """Runs the stage that standard input names; returns the exit code (0 good, 2 the user's mistake)."""
  with open(0, 'rb', buffering=0, closefd=False) as stdin:  # a buffer's lock, held by the thread, would crash the exit
    request = json.loads(stdin.readline())
  threading.Thread(target=_end_with_the_sweep, daemon=True).start()
  if request['cores'] and hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, request['cores'])  # before JAX counts them and starts its threads
  from pinfm_jax.errors import ERROR, UserError

  try:
    _run(request)
  except UserError as error:
    print(f'{ERROR}{error}', file=sys.stderr)
    return 2
  return 0


def _end_with_the_sweep() -> None:
  while os.read(0, 4096):
    pass
  os._exit(143)  # what is on disk is as after any kill: the next call goes on from the last checkpoint


def _run(request) -> None:
  from pinfm_jax.config import Experiment
  from pinfm_jax.overrides import from_dict
  from pinfm_jax.run import STAGES, keep_compiled_programs
  from pinfm_jax.stages.context import Run

  workdir = Path(request['workdir'])
  keep_compiled_programs(workdir / 'compiled')
  run = Run(from_dict(Experiment, request['experiment']), workdir)
  if request['towers_alone']:  # an experiment without rankers: its arm is a tower
    run = Run(replace(run.experiment, arms=()), workdir).of_arm(run.experiment.arms[0])
  STAGES[request['stage']](run)


if __name__ == '__main__':
  sys.exit(main())
