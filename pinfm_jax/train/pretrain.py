"""The pretraining task: PinFM over segments of the users' histories."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pinfm_jax.config import MeshConfig, PinFMConfig, PretrainConfig, TableConfig
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.negatives import NegativeSource
from pinfm_jax.data.new_events import earlier_partitions, new_segments
from pinfm_jax.data.packing import PackedSegments
from pinfm_jax.data.pipeline import Segments, action_bits, training_batches
from pinfm_jax.data.tokens import TokenInputs
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import fold_seed
from pinfm_jax.model.masking import HIDE_ID, batch_places, draw, drop_elements
from pinfm_jax.model.pinfm import EventBatch, PinFM, no_events
from pinfm_jax.train.action_loss import action_loss, hidden_actions, init_action_head
from pinfm_jax.train.checkpoint import Keep, unseen_in_shapes
from pinfm_jax.train.growth import Continued, EarlierRun
from pinfm_jax.train.heldout import held_out_loss, split_segments
from pinfm_jax.train.loop import Evaluate, LoopConfig, train
from pinfm_jax.train.losses import Extra, sequence_losses
from pinfm_jax.train.negatives import positive_mask
from pinfm_jax.train.optimizer import Update
from pinfm_jax.train.popularity import ItemSketch, empty_sketch, sketch_frequency, update_sketch
from pinfm_jax.train.profiling import Window
from pinfm_jax.train.restore import Start
from pinfm_jax.train.sharding import everywhere, process_rows
from pinfm_jax.train.step import Batch, TrainState

Array = jax.Array


@dataclass(frozen=True)
class PretrainTask:
  """Implements `train.step.Task` for L_ntl + L_mtl + L_ftl, and the loss of hidden actions if they are used."""

  model: PinFMConfig
  config: PretrainConfig
  action_bits: int
  seed: int = 0  # of all that is drawn: negatives, sampled pairs, hidden ids and actions
  catalogue: int = 1  # items that negatives are drawn from
  power_sum: float = 1.0  # sum of their frequency^negative_power

  @property
  def tables(self) -> TableConfig:
    """Sizes of the item tables."""
    return self.model.tables

  @property
  def update(self) -> Update:
    """The update rule."""
    return Update(
      self.config.update, self.config.steps, ema_decay=self.config.ema_decay, ema_tables=self.config.ema_tables
    )

  def init(self, key: Array) -> Any:
    """Fresh parameters and the learnable temperature; maybe a head for hidden actions."""
    vectors = jnp.zeros((1, 2, self.model.tables.item_width))
    events = no_events(1, 2, self.model)
    params = PinFM(self.model).init(key, vectors, events)['params']
    params = {'pinfm': params, 'log_temperature': jnp.log(jnp.float32(self.config.temperature))}
    if self.config.action_mask:
      params['action_head'] = init_action_head(key, self.model.tower.output_width, self.model.num_actions)
    return params

  def ids(self, batch: Batch, step: Array) -> tuple[Array, ...]:
    """The events' ids (targets are events too), and those of the catalogue's items that the batch carries."""
    names = ('item', 'negative_item') if self._carries_items else ('item',)
    return tuple(batch[name] for name in names)

  def observe(self, constants: ItemSketch | None, batch: Batch, step: Array) -> ItemSketch | None:
    """Counts the batch's positive events, if the popularity correction counts while it trains."""
    if self.config.log_q != 'sketch':
      return constants
    events = segment_events(batch)
    item_T2, positive_T = events.item_UL2.reshape(-1, 2), positive_mask(events, self.action_bits).reshape(-1)
    sketch = update_sketch(constants, everywhere(item_T2), everywhere(positive_T), self.config.sketch_decay)
    return jax.tree.map(everywhere, sketch)

  def loss(
    self, params: Any, vectors: tuple[Array, ...], batch: Batch, step: Array, key: Array, constants: ItemSketch | None
  ) -> tuple[Array, dict[str, Array]]:
    """The three sequence losses of a batch of segments."""
    events, vectors = self._hide_ids(segment_events(batch), step), self._drop(vectors, batch, step)
    model, weights = PinFM(self.model), {'params': params['pinfm']}
    items_ULV = model.apply(weights, vectors[0], events.content_ULW, events.hidden_id_UL, method='items')
    hidden_UL = hidden_actions(events.mask_UL, self.config.action_mask, self.seed, step)
    h_ULO, _ = model.apply(
      weights, items_ULV, events, train=True, hidden_actions_UL=hidden_UL, rngs={'dropout': key}, method='encode'
    )
    z_ULO = model.apply(weights, items_ULV, method='targets')
    index_U = jnp.arange(events.mask_UL.shape[0], dtype=jnp.int32)
    extra = self._extra(batch, constants)
    if self._carries_items:
      drawn_UNV = model.apply(weights, vectors[1], batch.get('negative_content'), method='items')
      extra = extra._replace(z_UNO=model.apply(weights, drawn_UNV, method='targets'))
    seed = fold_seed(self.seed, step)
    total, figures = sequence_losses(
      h_ULO, z_ULO, params['log_temperature'], events, self.config, self.action_bits, seed, index_U, extra
    )
    if hidden_UL is not None:
      figures['action'] = action_loss(params['action_head'], h_ULO, events.actions_UL, hidden_UL)
      total += self.config.action_weight * figures['action']
    return total, figures

  def _drop(self, vectors: tuple[Array, ...], batch: Batch, step: Array) -> tuple[Array, ...]:
    """The vectors of `ids`, without the elements that are dropped in this step."""
    rate = self.config.item_dropout
    if not rate:
      return vectors
    ids = self.ids(batch, step)
    return tuple(drop_elements(x, item, rate, self.seed, step) for x, item in zip(vectors, ids, strict=True))

  @property
  def _carries_items(self) -> bool:
    """Whether batches have items of the catalogue besides their events."""
    return bool(self.config.uniform_negatives) or self.config.full_catalogue

  def _hide_ids(self, events: EventBatch, step: Array) -> EventBatch:
    """Hides a share of the ids, as tokens and as targets alike."""
    if not self.model.id_mask:
      return events
    places_UL = batch_places(events.mask_UL.shape)
    return events._replace(hidden_id_UL=draw(places_UL, self.model.id_mask, self.seed, step, HIDE_ID))

  def _extra(self, batch: Batch, sketch: ItemSketch | None) -> Extra:
    """The ids of the uniform negatives, and the frequencies that the correction needs: counted before, or so far."""
    item_UN2 = batch['negative_item'] if self._carries_items else None
    if self.config.log_q == 'none':
      return Extra(item_UN2=item_UN2, catalogue=self.catalogue)
    if self.config.log_q == 'counts':
      of_events, of_draws = batch['frequency'], batch.get('negative_frequency')
    else:
      of_events = sketch_frequency(sketch, batch['item'])
      of_draws = None if item_UN2 is None else sketch_frequency(sketch, item_UN2)
    return Extra(item_UN2, None, of_events, of_draws, self.catalogue, self.power_sum)


def segment_events(batch: Batch) -> EventBatch:
  """The pipeline's columns as the model's input."""
  names = ('item', 'surface', 'actions', 'mask', 'user', 'segment', 'gap', 'content', 'new')
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
  profile: Window | None = None,
  start: Start | None = None,
  until_U: np.ndarray | None = None,
  held_out: int = 1,
  rank: Evaluate | None = None,
) -> TrainState:
  """Runs (or resumes) pretraining on the events before `until_ms` (None: all but each user's last `held_out`).

  With `until_U`, before a time of each user's own, `until_ms` at the latest (see `Split.until_by_user`).

  With `config.eval_every`, a share of the users does not train; the losses on their segments are logged as eval/....
  With `config.eval_ranking` all users train, and `rank` measures instead: `config.eval_metric` tells which is best.
  With `config.continue_from` it starts from what an earlier run has learned (see `train.growth`), else from `start`.

  Raises:
    UserError: the configuration does not fit the data, or see `train`.
  """
  _check_lengths(config)
  segments = Segments.before(
    dataset, until_ms, config.segment_length, TokenInputs.of(model, dataset), until_U, held_out
  )
  task = PretrainTask(model, config, action_bits(config, dataset.info.actions), seed)
  position = _position(dataset, until_ms, model, config, seed) | ({} if held_out == 1 else {'held_out': held_out})
  warm_start, evaluate = start, None
  if config.continue_from:
    earlier = EarlierRun.open(config.continue_from, seed)
    segments = _segments_of_continued(segments, earlier, config)
    position |= {'continues': earlier.data, 'continues_step': earlier.step}
    warm_start = Continued(earlier, model)
  if config.eval_ranking:
    evaluate = rank
  elif config.eval_every:
    segments, measured = split_segments(segments, config)
    evaluate = held_out_loss(for_measuring(task), measured, config, mesh, layout)
    position['eval_share'] = config.eval_share
  negatives = NegativeSource.of(dataset, segments, config, task.action_bits, until_ms, seed, held_out)
  task = replace(task, catalogue=negatives.catalogue, power_sum=negatives.power_sum)
  examples = PackedSegments.of(segments) if config.pack else segments
  loop = _loop(config, seed, position, layout, profile)
  rows = process_rows(mesh, config.batch_segments)

  def batches(first_step: int):
    stream = training_batches(examples, config.batch_segments, seed, first_step, rows)
    return negatives.add(stream, first_step, rows)

  sketch = empty_sketch(config.sketch_width) if config.log_q == 'sketch' else None
  return train(task, mesh, directory, loop, batches, sketch, warm_start, evaluate)


def _loop(
  config: PretrainConfig, seed: int, position: dict[str, Any], layout: MeshConfig, profile: Window | None
) -> LoopConfig:
  return LoopConfig(
    label=f'pretrain (seed {seed})',
    steps=config.steps,
    seed=seed,
    examples=config.batch_segments,
    checkpoint_every=config.checkpoint_every,
    log_every=config.log_every,
    position=position,
    eval_every=config.eval_every,
    keep=Keep(config.keep_last, config.keep_best),
    use_checkpoint=config.use_checkpoint,
    best_by=f'-{config.eval_metric}' if config.eval_ranking else 'loss',
    patience=config.patience,
    resume=config.resume,
    profile=profile,
    layout=layout,
  )


def _position(
  dataset: PreparedDataset, until_ms: int | None, model: PinFMConfig, config: PretrainConfig, seed: int
) -> dict[str, Any]:
  """What a checkpoint must agree with to be continued."""
  return {
    'seed': seed,
    'data': dataset.info.checksum,
    'until_ms': until_ms,
    'batch': config.batch_segments,
    'pack': config.pack,
    **unseen_in_shapes(model),
  }


def _segments_of_continued(segments: Segments, earlier: EarlierRun, config: PretrainConfig) -> Segments:
  """The segments that a run trains which goes on from an earlier one (`pretrain.continue_on`).

  Raises:
    UserError: the earlier run was of other data, or what is new to it is not known or nothing.
  """
  partitions = earlier_partitions(segments.dataset, earlier.data)
  if config.continue_on == 'all':
    return segments
  if earlier.spared:
    raise UserError(
      f'{earlier.directory} was trained with data.pretrain_overlap_users=others: which events are new to it differs '
      'by user; set pretrain.continue_on=all'
    )
  return new_segments(segments, partitions, earlier.until_ms)


def _check_lengths(config: PretrainConfig) -> None:
  if config.ftl_weight and config.downstream_length >= config.segment_length:
    raise UserError(
      f'pretrain.downstream_length {config.downstream_length} leaves no future events in segments of '
      f'{config.segment_length}; make segment_length larger, or set pretrain.ftl_weight=0'
    )


def for_measuring(task: PretrainTask) -> PretrainTask:
  """The same task for measuring: nothing is dropped, and in-batch negatives alone, so that runs compare."""
  tower = replace(task.model.tower, dropout=0.0, embedding_dropout=0.0, token_dropout=0.0, attention_dropout=0.0)
  config = replace(
    task.config, log_q='none', uniform_negatives=0, negative_power=0.0, full_catalogue=False, keep_positives=False,
    count_as=0, bce_negatives=0, max_columns=task.config.max_columns or PretrainConfig.max_columns,
    impression_negatives=0, action_mask=0.0, item_dropout=0.0,
  )  # fmt: skip
  return replace(task, model=replace(task.model, tower=tower, id_mask=0.0), config=config)
