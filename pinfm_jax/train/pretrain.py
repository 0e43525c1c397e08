"""The pretraining task: PinFM over segments of the users' histories."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pinfm_jax.config import MeshConfig, PinFMConfig, PretrainConfig, TableConfig
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.packing import PackedSegments
from pinfm_jax.data.pipeline import Segments, action_bits, training_batches
from pinfm_jax.errors import UserError
from pinfm_jax.model.pinfm import EventBatch, PinFM, no_events
from pinfm_jax.train.loop import LoopConfig, train
from pinfm_jax.train.losses import sequence_losses
from pinfm_jax.train.optimizer import Update
from pinfm_jax.train.step import Batch, TrainState

Array = jax.Array


@dataclass(frozen=True)
class PretrainTask:
  """Implements `train.step.Task` for L_ntl + L_mtl + L_ftl."""

  model: PinFMConfig
  config: PretrainConfig
  action_bits: int

  @property
  def tables(self) -> TableConfig:
    """Sizes of the item tables."""
    return self.model.tables

  @property
  def update(self) -> Update:
    """The update rule."""
    return Update(self.config.update, self.config.steps)

  def init(self, key: Array) -> Any:
    """Fresh parameters and the learnable temperature."""
    vectors = jnp.zeros((1, 2, self.model.tables.item_width))
    events = no_events(1, 2)
    params = PinFM(self.model).init(key, vectors, events)['params']
    return {'pinfm': params, 'log_temperature': jnp.log(jnp.float32(self.config.temperature))}

  def ids(self, batch: Batch, step: Array) -> tuple[Array, ...]:
    """The events' ids: targets are events too."""
    return (batch['item'],)

  def loss(
    self, params: Any, vectors: tuple[Array, ...], batch: Batch, step: Array, key: Array, constants: None
  ) -> tuple[Array, dict[str, Array]]:
    """The three sequence losses of a batch of segments."""
    events = segment_events(batch)
    (vectors_ULV,) = vectors
    model, weights = PinFM(self.model), {'params': params['pinfm']}
    h_ULO, _ = model.apply(weights, vectors_ULV, events, train=True, rngs={'dropout': key}, method='encode')
    z_ULO = model.apply(weights, vectors_ULV, method='targets')
    index_U = jnp.arange(events.mask_UL.shape[0], dtype=jnp.int32)
    return sequence_losses(
      h_ULO, z_ULO, params['log_temperature'], events, self.config, self.action_bits, step, index_U
    )


def segment_events(batch: Batch) -> EventBatch:
  """The pipeline's columns as the model's input."""
  names = ('item', 'surface', 'actions', 'mask', 'user', 'segment')
  return EventBatch(*(batch.get(name) for name in names))


def pretrain(
  dataset: PreparedDataset,
  until_ms: int | None,
  model: PinFMConfig,
  config: PretrainConfig,
  mesh: Mesh,
  directory: Path,
  seed: int,
  layout: MeshConfig = MeshConfig(),
) -> TrainState:
  """Runs (or resumes) pretraining on the events before `until_ms` (None: all but each user's last).

  Raises:
    UserError: the configuration does not fit the data, or see `train`.
  """
  if config.ftl_weight and config.downstream_length >= config.segment_length:
    raise UserError(
      f'pretrain.downstream_length {config.downstream_length} leaves no future events in segments of '
      f'{config.segment_length}; make segment_length larger, or set pretrain.ftl_weight=0'
    )
  segments = Segments.before(dataset, until_ms, config.segment_length)
  examples = PackedSegments.of(segments) if config.pack else segments
  task = PretrainTask(model, config, action_bits(config, dataset.info.actions))
  loop = LoopConfig(
    label=f'pretrain (seed {seed})',
    steps=config.steps,
    seed=seed,
    examples=config.batch_segments,
    checkpoint_every=config.checkpoint_every,
    log_every=config.log_every,
    position={
      'seed': seed,
      'data': dataset.info.checksum,
      'until_ms': until_ms,
      'batch': config.batch_segments,
      'pack': config.pack or None,  # None is what a checkpoint from before the option has
    },
  )

  def batches(first_step: int):
    return training_batches(examples, config.batch_segments, seed, first_step, jax.process_index(), jax.process_count())

  return train(task, mesh, directory, loop, batches, layout=layout)
