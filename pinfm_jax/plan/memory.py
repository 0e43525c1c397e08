"""Bytes a device of everything that lives between steps, by arithmetic from shapes and shardings."""

import math
from dataclasses import dataclass
from typing import Any

import jax

from pinfm_jax.model.tables import storage_dtype
from pinfm_jax.plan.problem import Problem, abstract_batch, abstract_state


@dataclass(frozen=True)
class StateBytes:
  """Exact bytes of one device's shards."""

  tables: int
  accumulators: int  # and Adam's moments of the rows
  tower: int
  moments: int
  rest: int  # step, key data, counters, constants, averages of the weights

  @property
  def total(self) -> int:
    """What the step takes and gives back in place."""
    return self.tables + self.accumulators + self.tower + self.moments + self.rest


def device_bytes(tree: Any) -> int:
  """Bytes of one device's shards of abstract arrays with shardings."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def state_bytes(problem: Problem) -> StateBytes:
  """The state's bytes on one device; needs no device and allocates nothing."""
  state = abstract_state(problem, problem.abstract_mesh)
  moments = (state.opt_state.mu, state.opt_state.nu)
  parts = [device_bytes(part) for part in (state.tables.rows_GE, state.tables[1:], state.params, moments)]
  return StateBytes(*parts, device_bytes(state) - sum(parts))


def least_bytes(problem: Problem) -> int:
  """What the tables alone take of one device, rows not rounded up: cheap, for a search over many meshes."""
  tables, layout = problem.model.tables, problem.layout
  owners = math.prod(getattr(layout, axis) for axis in layout.table_axes)
  row = tables.width * storage_dtype(tables).itemsize
  row += {'adagrad': 4, 'sgd': 0, 'adam': 2 * 4 * tables.width}[problem.task.update.config.table_rule]
  return tables.sub_tables * tables.rows * row // owners


def batch_bytes(problem: Problem) -> int:
  """One batch's inputs on one device."""
  return device_bytes(abstract_batch(problem, problem.abstract_mesh))


def parameters(problem: Problem) -> tuple[int, int]:
  """Parameters of the whole model: in the tables (rows that round up included), in the tower."""
  state = abstract_state(problem, problem.abstract_mesh)
  return state.tables.rows_GE.size, sum(x.size for x in jax.tree.leaves(state.params))


def activation_bytes(problem: Problem) -> float:
  """A rough count of what a step needs besides its state on one device: to scale a compiled figure, not to state one.

  It counts, for one device's tokens: a block's activations kept for the backward pass (all of them, its matmul
  outputs, or its input alone, by `model.tower.remat`), with the [L, L] scores of plain attention, which the simulated
  devices run; one block's working set; the logits of one chunk; the rows with their gradients.
  """
  tower, pretrain, tables = problem.model.tower, problem.experiment.pretrain, problem.model.tables
  data, fsdp, model = problem.shape
  tokens = problem.tokens / (data * fsdp)
  size = 2 if tower.dtype == 'bfloat16' else 4
  width, heads = tower.width, tower.heads
  scores = heads * pretrain.segment_length * (4 + size)
  mlp = tower.mlp_ratio if tower.backbone != 'hstu' else 0
  everything = (8 + 2 * mlp) * width * size + scores
  kept = {'none': everything, 'dots': (5 + mlp) * width * size, 'full': width * size}
  blocks = (tower.layers * kept[tower.remat] + 2 * everything) / model
  rows = tables.sub_tables * tables.width * 4 * 5
  logits = problem.columns * 4 * min(tokens, 8 * pretrain.segment_length) * 3
  return tokens * (blocks + rows + 6 * tower.output_width * 4) + logits
