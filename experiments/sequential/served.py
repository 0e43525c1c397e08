"""NDCG@10 of a trained tower with its tables as they are served: packed to int4 and int8, beside float32.

Command:   python experiments/sequential/served.py runs/sequential_beauty   (after pinfm run; the first seed's tower)
Hardware:  2 CPU cores, 3 GB of memory
Time:      under a minute
Expected:  see experiments/README.md

The rows are packed and unpacked by what exports a bundle (`pinfm_jax.serve.quantize`, with `serve.clip`); ranked are
the events of `evaluate.split`, as in the run. Hashed tables are trained by, for example, `pinfm run` with --set
model.tables.hash_seed=0 model.tables.sub_tables=4 model.tables.width=32 model.tables.rows=8192 in another workdir.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from pinfm_jax.errors import exit_code
from pinfm_jax.launch import saved_experiment
from pinfm_jax.pretrained import load_pretrained
from pinfm_jax.serve.quantize import STORAGES, dequantise, quantise
from pinfm_jax.stages.context import Run
from pinfm_jax.stages.pretrain import retrieval_of


def served_figures(workdir: Path) -> dict[str, dict[str, float]]:
  """The retrieval figures of the first seed's tower by how its rows are stored."""
  run = Run(saved_experiment(workdir), workdir)
  tower, evaluate = load_pretrained(workdir, run.experiment.seeds[0]), run.experiment.evaluate
  measure, found = retrieval_of(run, evaluate.split, evaluate.ks), {}
  with jax.set_mesh(run.mesh):
    for storage in STORAGES:
      rows_GE = dequantise(quantise(tower.rows, storage, run.experiment.serve.clip), storage)
      found[storage] = measure(tower.params, jnp.asarray(rows_GE))
  return found


def main(workdir: Path) -> None:
  figures = served_figures(workdir)
  name = next(name for name in figures['float32'] if name.startswith('tower/ndcg@'))
  for stored, values in figures.items():
    share = values[name] / figures['float32'][name] if figures['float32'][name] else float('nan')
    print(f'{stored:8} {name[6:]} {values[name]:.4f}  {100 * share:.2f} % of float32')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('workdir', type=Path, help='of a finished `pinfm run` of a launch file of this folder')
  options = parser.parse_args()
  sys.exit(exit_code(lambda: main(options.workdir)))
