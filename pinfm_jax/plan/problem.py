"""The pretraining step of a launch file as abstract arrays: shapes, types and shardings, and nothing allocated."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from pinfm_jax.config import Experiment, MeshConfig, PinFMConfig
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import EXACT_ROWS
from pinfm_jax.train.popularity import empty_sketch
from pinfm_jax.train.pretrain import PretrainTask
from pinfm_jax.train.sharding import AXES, batch_sharding, mesh_sizes
from pinfm_jax.train.step import Batch, TrainState, init_state, state_shardings

# A plan needs no data set. These sizes concern some kilobytes; model.num_actions, model.num_surfaces and
# model.content_width of the launch file win.
NUM_ACTIONS = 16
NUM_SURFACES = 16
CONTENT_WIDTH = 64


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
    content = (model.content_width or CONTENT_WIDTH) if model.content else model.content_width
    return replace(model, num_actions=actions, num_surfaces=surfaces, content_width=content)

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
  def columns(self) -> int:
    """K, columns of the losses."""
    pretrain = self.experiment.pretrain
    return min(pretrain.max_columns, self.tokens) + self.carried

  @property
  def carried(self) -> int:
    """Items of the catalogue that a global batch carries besides its events.

    Raises:
      UserError: the full softmax over a catalogue whose size only the data tell.
    """
    pretrain, tables = self.experiment.pretrain, self.model.tables
    if not pretrain.full_catalogue:
      return pretrain.uniform_negatives
    if tables.hash_seed != EXACT_ROWS:
      raise UserError(
        'pretrain.full_catalogue makes a column of every item, and how many there are only the data tell; plan with '
        'pretrain.full_catalogue=false and pretrain.uniform_negatives of about their number'
      )
    return -(-tables.rows // pretrain.batch_segments) * pretrain.batch_segments

  @property
  def tokens(self) -> int:
    """Events of a global batch."""
    pretrain = self.experiment.pretrain
    return pretrain.batch_segments * pretrain.segment_length


def abstract_state(problem: Problem, mesh: Mesh | AbstractMesh) -> TrainState:
  """The training state as `jax.ShapeDtypeStruct`s with shardings."""
  task, layout, config = problem.task, problem.layout, problem.experiment.pretrain
  sketch = jax.eval_shape(lambda: empty_sketch(config.sketch_width)) if config.log_q == 'sketch' else None
  shardings = state_shardings(task, mesh, sketch, layout)
  create = init_state(task, mesh, 0, layout=layout)
  with jax.sharding.use_abstract_mesh(mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh):
    state = jax.eval_shape(create).replace(constants=sketch)
  return jax.tree.map(_with_sharding, state, shardings)


def abstract_batch(problem: Problem, mesh: Mesh | AbstractMesh) -> Batch:
  """A global batch with the columns that the pipeline makes for this configuration.

  They are those of `data.featurize.event_inputs`, `data.packing` and `data.negatives`.
  """
  model, config = problem.model, problem.experiment.pretrain
  event, drawn = (config.segment_length,), (problem.carried // config.batch_segments,)
  columns: dict[str, tuple[tuple[int, ...], Any]] = {
    'item': ((*event, 2), jnp.uint32),
    'surface': (event, jnp.int32),
    'actions': (event, jnp.uint32),
    'mask': (event, jnp.bool_),
    'user': (event, jnp.uint32),
  }
  if config.pack:
    columns['segment'] = (event, jnp.int32)
  if model.tower.time_gap_buckets:
    columns['gap'] = (event, jnp.int32)
  if model.content:
    columns['content'] = ((*event, model.content_width), jnp.float16)
  if config.log_q == 'counts':
    columns['frequency'] = (event, jnp.float32)
  if problem.carried:
    columns['negative_item'] = ((*drawn, 2), jnp.uint32)
    if model.content:
      columns['negative_content'] = ((*drawn, model.content_width), jnp.float16)
    if config.log_q == 'counts':
      columns['negative_frequency'] = (drawn, jnp.float32)
  sharding = batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct((config.batch_segments, *rest), dtype, sharding=sharding)
    for name, (rest, dtype) in columns.items()
  }


def _with_sharding(shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
