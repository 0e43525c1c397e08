"""The pretraining step of a launch file as abstract arrays: shapes, types and shardings, and nothing allocated."""

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from pinfm_jax.config import Experiment, MeshConfig, PinFMConfig
from pinfm_jax.errors import UserError
from pinfm_jax.train.pretrain import PretrainTask
from pinfm_jax.train.sharding import AXES, batch_sharding, mesh_sizes
from pinfm_jax.train.step import Batch, TrainState, init_state, state_shardings

# A plan needs no data set. These sizes of the vocabularies concern some kilobytes; model.num_actions and
# model.num_surfaces of the launch file win.
NUM_ACTIONS = 16
NUM_SURFACES = 16
CONTENT_WIDTH = 64  # of a model with content; model.content_width of the launch file wins


@dataclass(frozen=True)
class Problem:
  """A pretraining run on N devices.

  Attributes:
    experiment: the launch file's.
    devices: N.
  """

  experiment: Experiment
  devices: int

  @property
  def model(self) -> PinFMConfig:
    """The model with the sizes that a data set would give."""
    model = self.experiment.model
    actions, surfaces = model.num_actions or NUM_ACTIONS, model.num_surfaces or NUM_SURFACES
    content_width = model.content_width or CONTENT_WIDTH if model.content else 0
    return replace(model, num_actions=actions, num_surfaces=surfaces, content_width=content_width)

  @property
  def task(self) -> PretrainTask:
    """What is trained; bit 0 stands for A_pos where the launch file names one."""
    pretrain = self.experiment.pretrain
    return PretrainTask(self.model, pretrain, 1 if pretrain.positive_actions else 0)

  @property
  def layout(self) -> MeshConfig:
    """The mesh with its sizes filled in.

    Raises:
      UserError: it does not cover the devices, or the batch does not divide over it.
    """
    mesh = self.experiment.mesh
    data, fsdp, model = mesh_sizes(mesh, self.devices)
    segments = self.experiment.pretrain.batch_segments
    if segments % (data * fsdp):
      raise UserError(
        f'pretrain.batch_segments {segments} does not divide over {data * fsdp} devices (mesh data x fsdp); '
        f'for example --set pretrain.batch_segments={-(-segments // (data * fsdp)) * data * fsdp}'
      )
    return replace(mesh, data=data, fsdp=fsdp, model=model)

  @property
  def shape(self) -> tuple[int, int, int]:
    """Sizes of the mesh axes."""
    layout = self.layout
    return layout.data, layout.fsdp, layout.model

  @property
  def abstract_mesh(self) -> AbstractMesh:
    """A mesh without devices, which is all that arithmetic needs."""
    return AbstractMesh(self.shape, AXES, axis_types=(AxisType.Auto,) * 3)

  @property
  def tokens(self) -> int:
    """Events of a global batch."""
    pretrain = self.experiment.pretrain
    return pretrain.batch_segments * pretrain.segment_length


def abstract_state(problem: Problem, mesh: Mesh | AbstractMesh) -> TrainState:
  """The training state as `jax.ShapeDtypeStruct`s with shardings."""
  create = init_state(problem.task, mesh, 0, layout=problem.layout)
  shardings = state_shardings(problem.task, mesh, layout=problem.layout)
  with jax.sharding.use_abstract_mesh(mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh):
    return jax.tree.map(_with_sharding, jax.eval_shape(create), shardings)


def abstract_batch(problem: Problem, mesh: Mesh | AbstractMesh) -> Batch:
  """A global batch as the pipeline makes it (`data.pipeline.Segments`, `data.negatives`), with the options' columns."""
  pretrain, model = problem.experiment.pretrain, problem.model
  length, negatives = pretrain.segment_length, pretrain.uniform_negatives // pretrain.batch_segments
  counts, width = pretrain.log_q == 'counts', model.content_width
  wanted: tuple[tuple[bool, str, tuple[int, ...], Any], ...] = (
    (True, 'item', (length, 2), jnp.uint32),
    (True, 'surface', (length,), jnp.int32),
    (True, 'actions', (length,), jnp.uint32),
    (True, 'mask', (length,), jnp.bool_),
    (True, 'user', (length,), jnp.uint32),
    (pretrain.pack, 'segment', (length,), jnp.int32),
    (model.tower.time_gap_buckets > 0, 'gap', (length,), jnp.int32),
    (model.content, 'content', (length, width), jnp.float16),
    (counts, 'frequency', (length,), jnp.float32),
    (negatives > 0, 'negative_item', (negatives, 2), jnp.uint32),
    (negatives > 0 and counts, 'negative_frequency', (negatives,), jnp.float32),
    (negatives > 0 and model.content, 'negative_content', (negatives, width), jnp.float16),
  )
  rows, sharding = pretrain.batch_segments, batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct((rows, *rest), dtype, sharding=sharding) for asked, name, rest, dtype in wanted if asked
  }


def offers(experiment: Experiment, key: str) -> bool:
  """Whether there is a setting of this dotted name."""
  value: Any = experiment
  for name in key.split('.'):
    if not dataclasses.is_dataclass(value) or not hasattr(value, name):
      return False
    value = getattr(value, name)
  return True


def _with_sharding(shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
