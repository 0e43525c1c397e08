"""Runs an experiment's stages in order; each keeps what is finished and resumes what is not."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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
from pinfm_jax.workdir import write_json

STAGES: Mapping[str, Callable[[Run], None]] = {
  'prepare': prepare_stage,
  'pretrain': pretrain_stage,
  'finetune': finetune_stage,
  'evaluate': evaluate_stage,
  'export': export_stage,
  'report': report_stage,
}


def run(experiment: Experiment, workdir: str | Path, stages: Sequence[str] = tuple(STAGES)) -> None:
  """Runs or resumes stages.

  Args:
    experiment: what to run.
    workdir: where everything is written; finished stages found there are kept.
    stages: which ones; they run in the order of STAGES.

  Raises:
    UserError: unknown stages, data that does not fit, a workdir of another configuration.
  """
  unknown = [stage for stage in stages if stage not in STAGES]
  if unknown:
    raise UserError(f"unknown stage '{unknown[0]}'; expected some of {','.join(STAGES)}")
  context = Run(experiment, Path(workdir))
  context.workdir.mkdir(parents=True, exist_ok=True)
  write_json(context.workdir / 'experiment.json', to_dict(experiment))
  for name, stage in STAGES.items():
    if name in stages:
      begin = time.monotonic()
      print(f'== {name}', flush=True)
      stage(context)
      print(f'== {name} took {duration(time.monotonic() - begin)}', flush=True)
