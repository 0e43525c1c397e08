"""Runs an experiment's stages in order; each keeps what is finished and resumes what is not."""

import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import jax

from pinfm_jax.config import Experiment
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import to_dict
from pinfm_jax.progress import duration
from pinfm_jax.stages.context import Run
from pinfm_jax.stages.evaluate import evaluate_stage
from pinfm_jax.stages.export import export_stage
from pinfm_jax.stages.finetune import finetune_stage
from pinfm_jax.stages.prepare import prepare_stage
from pinfm_jax.stages.pretrain import pretrain_stage
from pinfm_jax.stages.report import report_stage
from pinfm_jax.train.distributed import is_first, on_first
from pinfm_jax.train.profiling import Window
from pinfm_jax.workdir import only_one, write_json, write_text

STAGES: Mapping[str, Callable[[Run], None]] = {
  'prepare': prepare_stage,
  'pretrain': pretrain_stage,
  'finetune': finetune_stage,
  'evaluate': evaluate_stage,
  'export': export_stage,
  'report': report_stage,
}
TRAINING = ('pretrain', 'finetune')
BY_FIRST = ('evaluate', 'export', 'report')  # of several processes, the first does these alone


def run(
  experiment: Experiment,
  workdir: str | Path,
  stages: Sequence[str] = tuple(STAGES),
  profile: Window | None = None,
) -> None:
  """Runs or resumes stages.

  Of several processes (`train.distributed`), all call it with the same arguments, on a directory that all see.

  Args:
    experiment: what to run.
    workdir: where everything is written; finished stages found there are kept.
    stages: which ones; they run in the order of STAGES.
    profile: steps of each training run among the stages to trace, into its folder profile/.

  Raises:
    UserError: unknown stages, data that does not fit, a workdir of another configuration.
  """
  unknown = [stage for stage in stages if stage not in STAGES]
  if unknown:
    raise UserError(f"unknown stage '{unknown[0]}'; expected some of {','.join(STAGES)}")
  if profile:
    _check_profile(experiment, stages, profile)
  context = Run(experiment, Path(workdir), profile)
  with ExitStack() as lock:
    on_first('the workdir', lambda: hold_workdir(context.workdir, lock))
    _run_stages(context, stages)


def _check_profile(experiment: Experiment, stages: Sequence[str], profile: Window) -> None:
  if not any(stage in TRAINING for stage in stages):
    raise UserError(f'--profile traces training steps, but --stages {",".join(stages)} trains nothing; add pretrain')
  steps = experiment.pretrain.steps
  if 'pretrain' in stages and profile.last > steps:
    raise UserError(
      f'--profile {profile.first}:{profile.last} goes beyond pretrain.steps {steps}; give a window within, '
      'or name the stage to trace (--stages finetune)'
    )


def hold_workdir(workdir: Path, lock: ExitStack) -> None:
  """Makes the workdir and holds its lock as long as `lock` is open.

  Raises:
    UserError: it cannot be made, or another run holds it.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'{workdir} cannot be made ({error.strerror}); give another --workdir') from error
  lock.enter_context(only_run(workdir))


def _run_stages(context: Run, stages: Sequence[str]) -> None:
  description = context.workdir / 'experiment.json'
  earlier = None
  if is_first():
    earlier = description.read_text(encoding='utf-8') if description.exists() else None
    write_json(description, to_dict(context.experiment))
  keep_compiled_programs(context.workdir / 'compiled')
  try:
    for name, stage in STAGES.items():
      if name in stages:
        begin = time.monotonic()
        print(f'== {name}', flush=True)
        if name in BY_FIRST:
          on_first(name, partial(stage, context))
        else:
          stage(context)
        print(f'== {name} took {duration(time.monotonic() - begin)}', flush=True)
  except UserError:
    if earlier is not None:
      write_text(description, earlier)  # the directory stays the earlier experiment's
    raise


def only_run(workdir: Path) -> AbstractContextManager[None]:
  """Holds the workdir's lock; a UserError where another run holds it."""
  return only_one(workdir, f'another run is working in {workdir}; wait for it, or give another --workdir')


def keep_compiled_programs(directory: Path) -> None:
  """Keeps compiled programs, so that seeds, resumed runs and the next command do not compile them again.

  Programs for a CPU use the instructions of that very CPU, so each kind of machine has a folder of its own. A cache
  that the user has configured (JAX_COMPILATION_CACHE_DIR) stays in charge.
  """
  if jax.config.jax_compilation_cache_dir:
    return
  flags = [line for line in _lines(Path('/proc/cpuinfo')) if line.startswith(('flags', 'Features', 'model name'))][:2]
  machine = hashlib.sha256('\n'.join([platform.machine(), platform.processor(), *flags]).encode()).hexdigest()[:12]
  jax.config.update('jax_compilation_cache_dir', str(directory.absolute() / machine))


def _lines(path: Path) -> list[str]:
  return path.read_text().splitlines() if path.exists() else []
