"""The fine-tuning task: PinFM inside the multi-task ranking model, over request-grouped batches (PinFM section 3.2)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pinfm_jax.config import FinetuneConfig, MeshConfig, PinFMConfig, PretrainConfig, RankerConfig, TableConfig
from pinfm_jax.data.featurize import FeatureSchema
from pinfm_jax.data.pipeline import Requests, training_batches
from pinfm_jax.errors import UserError
from pinfm_jax.model.cold_start import randomise_candidates
from pinfm_jax.model.hashing import fold_seed
from pinfm_jax.model.masking import HIDE_CANDIDATE_ID, HIDE_ID, batch_places, draw
from pinfm_jax.model.pinfm import EventBatch, no_events
from pinfm_jax.model.ranker import CandidateBatch, DenseStats, FeatureSpec, RankingBatch, RankingModel
from pinfm_jax.model.transact import RecentEvents, no_recent_events
from pinfm_jax.train.checkpoint import unseen_in_shapes
from pinfm_jax.train.loop import LoopConfig, train
from pinfm_jax.train.losses import sequence_losses
from pinfm_jax.train.optimizer import Update
from pinfm_jax.train.profiling import Window
from pinfm_jax.train.restore import Start
from pinfm_jax.train.sharding import process_rows
from pinfm_jax.train.step import Batch, TrainState

Array = jax.Array


@dataclass(frozen=True)
class FinetuneTask:
  """Implements `train.step.Task` for the losses of ranker and module, their tie, L_ntl, L_mtl and the alignment."""

  model: PinFMConfig
  ranker: RankerConfig
  config: FinetuneConfig
  schema: FeatureSchema
  steps: int
  action_bits: int = 0  # A_pos of the next-token loss
  seed: int = 0  # of all that is drawn: randomised and hidden ids, age-dependent dropout, negatives
  pretrained: PretrainConfig = PretrainConfig()  # of the sequence losses' temperature, which goes on here

  @property
  def tables(self) -> TableConfig | None:
    """Sizes of the item tables; None for a ranker without PinFM."""
    return self.model.tables if self.ranker.sequence == 'pinfm' else None

  @property
  def update(self) -> Update:
    """The update rule: the pretrained part and the tables learn at a fraction of the ranker's rate."""
    return Update(self.config.update, self.steps, pretrained=('pinfm', 'log_temperature'))

  @property
  def module(self) -> RankingModel:
    """The Flax module."""
    return RankingModel(self.model, self.ranker, feature_spec(self.schema), self.config.cold_start)

  def init(self, key: Array) -> Any:
    """Fresh parameters."""
    schema, candidates = self.schema, self.config.candidates
    widths = (len(schema.dense_names), len(schema.sparse_sizes), sum(schema.embedding_widths))
    batch = RankingBatch(
      no_events(1, 2, self.model),
      CandidateBatch(
        jnp.zeros((1, candidates, 2), jnp.uint32), jnp.ones((1, candidates), bool), jnp.zeros((1, candidates)),
        jnp.zeros((1, candidates, widths[0])), jnp.zeros((1, candidates, widths[1]), jnp.int32),
        jnp.zeros((1, candidates, widths[2])), jnp.zeros((1, candidates), jnp.int32),
        jnp.zeros((1, candidates, self.model.content_width), jnp.float16),
        recent_item_UC=jnp.ones((1, candidates), jnp.int32),
      ),
      jnp.zeros((1, candidates, len(schema.labels))),
      jnp.zeros(1, jnp.int32),
      no_recent_events(1, self.ranker.transact.length, self.model),
    )  # fmt: skip
    width = self.model.tables.item_width
    vectors = (jnp.zeros((1, 2, width)), jnp.zeros((1, candidates, width))) if self.tables else (None, None)
    zeros = jnp.zeros(widths[0])
    stats = DenseStats(zeros, zeros, zeros, zeros)

    params = dict(self.module.init(key, *vectors, batch, stats)['params'])
    if self.tables:
      params['log_temperature'] = jnp.log(jnp.float32(self.pretrained.temperature))
    return params

  def ids(self, batch: Batch, step: Array) -> tuple[Array, ...]:
    """Ids of the histories, and those of the candidates, some of which are randomised (CIR)."""
    candidate = batch['candidate_item']
    users, candidates = candidate.shape[:2]
    place_UC = jnp.arange(users * candidates, dtype=jnp.int32).reshape(users, candidates)
    candidate = randomise_candidates(candidate, place_UC, fold_seed(self.seed, step), self.config.cold_start.randomise)
    return batch['history_item'], candidate

  def observe(self, constants: DenseStats, batch: Batch, step: Array) -> DenseStats:
    """The statistics stay as they are."""
    return constants

  def loss(
    self, params: Any, vectors: tuple[Array, ...], batch: Batch, step: Array, key: Array, constants: DenseStats
  ) -> tuple[Array, dict[str, Array]]:
    """Ranking losses on the final prediction and on the module's own, their squared difference, the sequence losses,
    and the alignment of projected content (PinFM section 3.2)."""
    inputs = self._hide_ids(ranking_batch(batch), step)
    vectors = vectors or (None, None)
    weights = {'params': {name: value for name, value in params.items() if name != 'log_temperature'}}
    sequence = PretrainConfig(
      fixed_temperature=self.pretrained.fixed_temperature,
      ntl_weight=self.config.ntl_weight,
      mtl_weight=self.config.mtl_weight,
      ftl_weight=0,
      window=self.config.mtl_window,
      pairs=self.config.mtl_pairs,
      max_columns=self.config.ntl_columns,
    )
    # A bidirectional history's events see the very events that these losses ask for.
    asks_history = self.tables is not None and not self.ranker.bidirectional
    need_history = asks_history and (sequence.ntl_weight > 0 or sequence.mtl_weight > 0)
    seed = fold_seed(self.seed, step)
    output = self.module.apply(
      weights, *vectors, inputs, constants, seed, train=True, need_history_output=need_history, rngs={'dropout': key}
    )
    mask_UC, labels_UCT = inputs.candidates.mask_UC, inputs.labels_UCT
    weight_T = jnp.array([self.config.label_weights.get(name, 1.0) for name in self.schema.labels])
    figures = {'ranking': ranking_loss(output.logits_UCT, labels_UCT, mask_UC, weight_T)}
    total = figures['ranking']
    if output.module_logits_UCT is not None:
      figures['module'] = ranking_loss(output.module_logits_UCT, labels_UCT, mask_UC, weight_T)
      target_UCT = jax.lax.stop_gradient(jax.nn.sigmoid(output.logits_UCT))
      difference_UCT = jnp.square(jax.nn.sigmoid(output.module_logits_UCT) - target_UCT)
      figures['tie'] = jnp.sum(difference_UCT * mask_UC[..., None]) / jnp.maximum(jnp.sum(mask_UC), 1)
      total += self.config.module_weight * figures['module'] + self.config.tie_weight * figures['tie']
    if output.content_cosine_UC is not None:
      known_UC = self._known_candidates(batch, inputs, step)
      figures['align'] = jnp.sum((1 - output.content_cosine_UC) * known_UC) / jnp.maximum(jnp.sum(known_UC), 1)
      total += self.config.align_weight * figures['align']
    if need_history:
      z_ULO = self.module.apply(weights, vectors[0], inputs.events, method='targets')
      of_history, terms = sequence_losses(
        output.h_ULO, z_ULO, params['log_temperature'], inputs.events, sequence, self.action_bits, seed, inputs.index_U
      )
      figures |= {name: terms[name] for name in ('ntl', 'mtl') if name in terms}
      total += of_history
    return total, figures

  def _known_candidates(self, batch: Batch, inputs: RankingBatch, step: Array) -> Array:
    """Candidates that have content and their own id vector, neither randomised nor hidden: bool [U, C]."""
    candidates = inputs.candidates
    own_UC = jnp.all(self.ids(batch, step)[1] == candidates.item_UC2, axis=-1)
    if candidates.hidden_id_UC is not None:
      own_UC &= ~candidates.hidden_id_UC
    content_UCW = candidates.embedding_UCF[..., -self.schema.candidate_width :]
    return candidates.mask_UC & own_UC & jnp.any(content_UCW != 0, axis=-1)

  def _hide_ids(self, batch: RankingBatch, step: Array) -> RankingBatch:
    """Hides a share of the ids of histories and of candidates, as pretraining does."""
    share = self.model.id_mask
    if not share or not self.tables:
      return batch
    events, candidates = batch.events, batch.candidates
    places = (batch_places(events.mask_UL.shape), batch_places(candidates.mask_UC.shape))
    hidden_UL = draw(places[0], share, self.seed, step, HIDE_ID)
    hidden_UC = draw(places[1], share, self.seed, step, HIDE_CANDIDATE_ID)
    if events.hidden_id_UL is not None:
      hidden_UL, hidden_UC = hidden_UL | events.hidden_id_UL, hidden_UC | candidates.hidden_id_UC
    events = events._replace(hidden_id_UL=hidden_UL)
    return batch._replace(events=events, candidates=candidates._replace(hidden_id_UC=hidden_UC))


def feature_spec(schema: FeatureSchema) -> FeatureSpec:
  """Shapes of the schema's features."""
  return FeatureSpec(
    len(schema.dense_names), schema.sparse_sizes, schema.embedding_widths, len(schema.labels), schema.candidate_width
  )


def ranking_batch(batch: Batch) -> RankingBatch:
  """The pipeline's columns as the model's input."""
  columns = [batch[f'history_{name}'] for name in ('item', 'surface', 'actions', 'mask')]
  options = {
    'gap_UL': batch.get('history_gap'),
    'content_ULW': batch.get('history_content'),
    'hidden_id_UL': batch.get('history_new'),
  }
  events = EventBatch(*columns, jnp.broadcast_to(batch['user'][:, None], columns[-1].shape), **options)
  names = ('item', 'mask', 'age_hours', 'dense', 'sparse', 'embedding', 'gap', 'content', 'new', 'recent_item')
  candidates = CandidateBatch(*(batch.get(f'candidate_{name}') for name in names))
  index_U = jnp.arange(events.mask_UL.shape[0], dtype=jnp.int32)
  recent = None
  if 'recent_item' in batch:
    recent = RecentEvents(*(batch.get(f'recent_{name}') for name in ('item', 'actions', 'hours', 'content')))
  return RankingBatch(events, candidates, batch['candidate_labels'], index_U, recent)


def ranking_loss(logits_UCT: Array, labels_UCT: Array, mask_UC: Array, weight_T: Array) -> Array:
  """Weighted binary cross-entropy, summed over labels, averaged over real candidates."""
  loss_UCT = jnp.logaddexp(0.0, logits_UCT) - labels_UCT * logits_UCT
  return jnp.sum(loss_UCT * weight_T * mask_UC[..., None]) / jnp.maximum(jnp.sum(mask_UC), 1)


def dense_stats(requests: Requests, sample: int = 20_000) -> DenseStats:
  """Clipping range (0.1 % and 99.9 %), mean and scale of the dense features over training requests.

  A feature that does not vary gets scale 0 and so drops out.
  """
  count = len(requests)
  rows = np.linspace(0, count - 1, min(count, sample)).astype(np.int64)
  examples = [requests[row] for row in rows]
  return dense_stats_of(np.concatenate([e['candidate_dense'][e['candidate_mask']] for e in examples]))


def dense_stats_of(dense_MF: np.ndarray) -> DenseStats:
  """`dense_stats` of rows of dense features [M, F], NaN = missing; F may be 0."""
  if not dense_MF.shape[1]:
    return DenseStats(*(jnp.zeros(0, jnp.float32) for _ in range(4)))
  dense_MF = dense_MF.astype(np.float64)
  dense_MF[~np.isfinite(dense_MF)] = np.nan
  missing = np.all(np.isnan(dense_MF), axis=0)
  dense_MF[:, missing] = 0
  low, high = np.nanquantile(dense_MF, [0.001, 0.999], axis=0)
  x = np.clip(dense_MF, low, high) - low
  x = np.where(high - low > 2, np.log1p(x), x)
  mean, std = np.nanmean(x, axis=0), np.nanstd(x, axis=0)
  scale = np.where(std > 1e-6, 1 / np.maximum(std, 1e-6), 0)
  return DenseStats(*(jnp.asarray(v, jnp.float32) for v in (low, high, mean, scale)))


def finetune(
  task: FinetuneTask,
  requests: Requests,
  mesh: Mesh,
  directory: Path,
  seed: int,
  pretrained: Start | None,
  layout: MeshConfig = MeshConfig(),
  profile: Window | None = None,
) -> TrainState:
  """Runs (or resumes) fine-tuning.

  Args:
    task: the task; its `steps` bound the run.
    requests: training requests.
    mesh: the devices.
    directory: of the arm.
    seed: of initialisation, order, and all that the task draws.
    pretrained: what a ranker with PinFM starts from (a pretraining run, a bundle), or None.
    layout: how the tables lie over the mesh.
    profile: steps to trace.
  """
  task = replace(task, seed=seed)
  config, positions = task.config, task.model.tower.max_positions
  needed = config.history_length + 1 + int(task.ranker.learnable_token)
  if task.tables and needed > positions:
    raise UserError(
      f'finetune.history_length {config.history_length} leaves no position for the candidate behind the history: '
      f'model.tower.max_positions is {positions}; make it at least {needed}'
    )
  info = requests.dataset.info
  loop = LoopConfig(
    label=f'{directory.name} (seed {seed})',
    steps=task.steps,
    seed=seed,
    examples=config.batch_requests,
    checkpoint_every=config.checkpoint_every,
    log_every=config.log_every,
    position={
      'seed': seed,
      'data': info.checksum,
      'batch': config.batch_requests,
      'examples': len(requests),
      **unseen_in_shapes(task.model),
    },
    resume=config.resume,
    profile=profile,
    layout=layout,
  )
  rows = process_rows(mesh, config.batch_requests)

  def batches(first_step: int):
    return training_batches(requests, config.batch_requests, seed, first_step, rows)

  warm_start = pretrained if task.tables else None
  return train(task, mesh, directory, loop, batches, dense_stats(requests), warm_start)


def training_steps(config: FinetuneConfig, examples: int) -> int:
  """Steps of the configured number of epochs."""
  return max(1, round(config.epochs * examples / config.batch_requests))


def without_randomness(config: FinetuneConfig) -> FinetuneConfig:
  """The configuration with every cold-start technique off."""
  off = replace(config.cold_start, randomise=0.0, age_dropout=tuple(0.0 for _ in config.cold_start.age_dropout))
  return replace(config, cold_start=off)
