"""What one step computes and moves, by arithmetic on the model."""

import math
from dataclasses import dataclass

import jax

from pinfm_jax.plan.chips import Chip
from pinfm_jax.plan.memory import StateBytes
from pinfm_jax.plan.problem import Problem, abstract_state


@dataclass(frozen=True)
class Flops:
  """FLOPs of one step over all devices, forward and backward (3 x forward); a multiply and an add are two.

  Attributes:
    dense: kernels of tower, phi_in, phi_out and psi.
    attention: scores and weighted values over the whole L x L square (the masked half is not taken off).
    logits: anchors against the K columns.
    recomputed: what the backward pass computes again (the logits' chunks always; blocks by `model.tower.remat`).
  """

  dense: float
  attention: float
  logits: float
  recomputed: float

  @property
  def model(self) -> float:
    """Without recomputation: what MFU counts."""
    return self.dense + self.attention + self.logits

  def one_device(self, devices: int) -> float:
    """A device's even share, recomputation included."""
    return (self.model + self.recomputed) / devices


@dataclass(frozen=True)
class Bytes:
  """Memory traffic of one device in one step.

  Attributes:
    tower: parameters and moments read and written, gradients written and read, kernels read in both passes.
    rows: table rows read for the lookup, read and written by the update, and their accumulators; with Adam and
      averages of the tables, all rows.
    activations: those kept for the backward pass, four times (written, read, and their gradients).
    logits: the loss's chunks, in float32.
  """

  tower: float
  rows: float
  activations: float
  logits: float

  @property
  def total(self) -> float:
    """All of it."""
    return self.tower + self.rows + self.activations + self.logits


def step_flops(problem: Problem) -> Flops:
  """Counts from the parameter tree: every kernel of the model meets every token once."""
  tower, pretrain = problem.model.tower, problem.experiment.pretrain
  state = abstract_state(problem, problem.abstract_mesh)
  leaves = jax.tree_util.tree_leaves_with_path(state.params['pinfm'])
  kernels = {jax.tree_util.keystr(path): x.size for path, x in leaves if getattr(path[-1], 'key', '') == 'kernel'}
  blocks = sum(size for name, size in kernels.items() if 'decoder' in name)
  tokens = problem.tokens
  dense = 6.0 * tokens * sum(kernels.values())
  attention = 12.0 * tokens * pretrain.segment_length * tower.width * tower.layers
  logits = 6.0 * tokens * problem.columns * tower.output_width
  again = {'none': 0.0, 'dots': attention / 3, 'full': 2.0 * tokens * blocks + attention / 3}
  return Flops(dense, attention, logits, logits / 3 + again[tower.remat])


def step_bytes(problem: Problem, state: StateBytes, chip: Chip) -> Bytes:
  """One device's memory traffic; rows as if no id came twice."""
  tower, pretrain, tables = problem.model.tower, problem.experiment.pretrain, problem.model.tables
  data, fsdp, _ = problem.shape
  owners = math.prod(problem.abstract_mesh.shape[axis] for axis in problem.layout.table_axes)
  held = problem.tokens * tables.sub_tables / owners
  row = tables.width * (2 if tables.dtype == 'bfloat16' else 4)
  tokens = problem.tokens / (data * fsdp)
  size = 2 if tower.dtype == 'bfloat16' else 4
  # A block keeps 16 or so arrays of its width, and the [L, L] weights of its heads; SwiGLU also its gate.
  mlp = tower.mlp_ratio * (1.5 if tower.swiglu else 1) if tower.backbone != 'hstu' else 0
  block = (8 + 2 * mlp) * tower.width + tower.heads * pretrain.segment_length
  kept = tokens * tower.layers * block * size
  # float32 chunks: written and read in the forward pass, in its repetition and in the backward pass.
  logits = 6.0 * tokens * problem.columns * 4
  if pretrain.update.table_rule == 'adam':  # the sums of the gradients too are an array of all rows
    rows = held * row * chip.row_traffic + 4.0 * state.tables + 2.0 * state.accumulators
  else:  # 32 bytes is the least that an accumulator's read or write moves
    rows = held * (3 * row * chip.row_traffic + (2 * 32 if state.accumulators else 0))
  return Bytes(
    tower=2.0 * state.moments + 6.0 * state.tower,
    rows=rows + (3.0 * state.tables if pretrain.ema_tables else 0),
    activations=4.0 * kept,
    logits=logits,
  )
