"""Stage `report`: one HTML page of the run."""

from pinfm_jax.report import write_report
from pinfm_jax.stages.context import Run


def report_stage(run: Run) -> None:
  """Writes report.html."""
  print(f'report: {write_report(run.workdir)}')
