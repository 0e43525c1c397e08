"""The pretraining task: PinFM over segments of the users' histories."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pinfm_jax.config import PinFMConfig, PretrainConfig, TableConfig
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.negatives import NegativeSource
from pinfm_jax.data.pipeline import Segments, action_bits, training_batches
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import fold_seed
from pinfm_jax.model.pinfm import EventBatch, PinFM, no_events
from pinfm_jax.train.loop import LoopConfig, train
from pinfm_jax.train.losses import Extra, sequence_losses
from pinfm_jax.train.negatives import positive_mask
from pinfm_jax.train.optimizer import Update
from pinfm_jax.train.popularity import ItemSketch, empty_sketch, sketch_frequency, update_sketch
from pinfm_jax.train.sharding import everywhere
from pinfm_jax.train.step import Batch, TrainState

Array = jax.Array


@dataclass(frozen=True)
class PretrainTask:
  """Implements `train.step.Task` for L_ntl + L_mtl + L_ftl."""

  model: PinFMConfig
  config: PretrainConfig
  action_bits: int
  seed: int = 0  # of the negatives and of the sampled pairs
  catalogue: int = 1  # items that uniform negatives are drawn from

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

  def ids(self, batch: Batch, step: Array) -> Array:
    """The events' ids (targets are events too), then those of the uniform negatives."""
    names = ('item', 'negative_item') if self.config.uniform_negatives else ('item',)
    return jnp.concatenate([batch[name].reshape(-1, 2) for name in names])

  def observe(self, constants: ItemSketch | None, batch: Batch, step: Array) -> ItemSketch | None:
    """Counts the batch's positive events, if the popularity correction counts while it trains."""
    if self.config.log_q != 'sketch':
      return constants
    events = segment_events(batch)
    item_T2, positive_T = events.item_UL2.reshape(-1, 2), positive_mask(events, self.action_bits).reshape(-1)
    sketch = update_sketch(constants, everywhere(item_T2), everywhere(positive_T), self.config.sketch_decay)
    return jax.tree.map(everywhere, sketch)

  def loss(
    self, params: Any, vectors_MV: Array, batch: Batch, step: Array, key: Array, constants: ItemSketch | None
  ) -> tuple[Array, dict[str, Array]]:
    """The three sequence losses of a batch of segments."""
    events = segment_events(batch)
    users, length = events.mask_UL.shape
    vectors_ULV = vectors_MV[: users * length].reshape(users, length, -1)
    model, weights = PinFM(self.model), {'params': params['pinfm']}
    h_ULO, _ = model.apply(weights, vectors_ULV, events, train=True, rngs={'dropout': key}, method='encode')
    z_ULO = model.apply(weights, vectors_ULV, method='targets')
    index_U = jnp.arange(users, dtype=jnp.int32)
    extra = self._extra(batch, constants)
    if self.config.uniform_negatives:
      vectors_UNV = vectors_MV[users * length :].reshape(users, -1, vectors_MV.shape[-1])
      extra = extra._replace(z_UNO=model.apply(weights, vectors_UNV, method='targets'))
    seed = fold_seed(self.seed, step)
    return sequence_losses(
      h_ULO, z_ULO, params['log_temperature'], events, self.config, self.action_bits, seed, index_U, extra
    )

  def _extra(self, batch: Batch, sketch: ItemSketch | None) -> Extra:
    """The ids of the uniform negatives, and the frequencies that the correction needs: counted before, or so far."""
    item_UN2 = batch['negative_item'] if self.config.uniform_negatives else None
    if self.config.log_q == 'none':
      return Extra(item_UN2=item_UN2)
    if self.config.log_q == 'counts':
      of_events, of_draws = batch['frequency'], batch.get('negative_frequency')
    else:
      of_events = sketch_frequency(sketch, batch['item'])
      of_draws = None if item_UN2 is None else sketch_frequency(sketch, item_UN2)
    return Extra(item_UN2, None, of_events, of_draws, self.catalogue)


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
  bits = action_bits(config, dataset.info.actions)
  negatives = NegativeSource.of(dataset, segments, config, bits, until_ms, seed)
  task = PretrainTask(model, config, bits, seed, negatives.catalogue)
  loop = LoopConfig(
    label=f'pretrain (seed {seed})',
    steps=config.steps,
    seed=seed,
    examples=config.batch_segments,
    checkpoint_every=config.checkpoint_every,
    log_every=config.log_every,
    position={'seed': seed, 'data': dataset.info.checksum, 'until_ms': until_ms, 'batch': config.batch_segments},
  )

  def batches(first_step: int):
    place = (jax.process_index(), jax.process_count())
    stream = training_batches(segments, config.batch_segments, seed, first_step, *place)
    return negatives.add(stream, first_step, *place)

  sketch = empty_sketch(config.sketch_width) if config.log_q == 'sketch' else None
  return train(task, mesh, directory, loop, batches, sketch)
