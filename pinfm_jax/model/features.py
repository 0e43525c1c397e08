"""What a ranking request's candidates carry, and the layer that makes one vector x0 of a candidate's features."""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from pinfm_jax.config import RankerConfig
from pinfm_jax.model.interaction.fields import Fields, make_fields
from pinfm_jax.model.layers import dense
from pinfm_jax.model.pinfm import l2_normalise

Array = jax.Array


@dataclass(frozen=True)
class FeatureSpec:
  """Shapes of a ranking request's features: what the ranker's layers are sized by.

  Attributes:
    num_dense: dense features.
    sparse_sizes: cardinality of each sparse feature.
    embedding_widths: of each embedding feature.
    num_labels: T.
    content_width: of the candidate's content: the last embedding input (`FeatureSchema.candidate_width`); 0 = none.
  """

  num_dense: int
  sparse_sizes: tuple[int, ...]
  embedding_widths: tuple[int, ...]
  num_labels: int
  content_width: int = 0


class CandidateBatch(NamedTuple):
  """C candidates of each of U users, padded.

  Attributes:
    item_UC2: uint32 id words.
    mask_UC: True on real candidates.
    age_hours_UC: item age at the request, NaN if unknown.
    dense_UCF: raw dense features, NaN = missing.
    sparse_UCF: int32 indices, 0 = missing.
    embedding_UCF: the embedding features, one after another.
    gap_UC: int32 bucket of the time from the user's last event to the request, for a model with time gaps.
    content_UCW: float16 unit-length content of the items, for a model with content.
    hidden_id_UC: True where the model does not see the id: items that training never saw and, while it trains, some at
      random. None = nowhere.
    recent_item_UC: rows of TransAct's item table, for a ranker with it.
  """

  item_UC2: Array
  mask_UC: Array
  age_hours_UC: Array
  dense_UCF: Array
  sparse_UCF: Array
  embedding_UCF: Array
  gap_UC: Array | None = None
  content_UCW: Array | None = None
  hidden_id_UC: Array | None = None
  recent_item_UC: Array | None = None


@flax.struct.dataclass
class DenseStats:
  """Clip, log and normalisation constants of the dense features, taken from training data ([F] each)."""

  low: Array
  high: Array
  mean: Array
  scale: Array

  def apply(self, dense_F: Array) -> Array:
    """Normalises [..., F]; a missing value (NaN) becomes 0, the mean; a constant feature becomes 0."""
    x = jnp.clip(dense_F, self.low, self.high) - self.low
    x = jnp.where(self.high - self.low > 2, jnp.log1p(x), x)
    # Not by the NaN that comes through `clip`: some runtimes (TensorFlow on a CPU) drop it there.
    return jnp.where(jnp.isnan(dense_F), 0.0, (x - self.mean) * self.scale)


class FeatureLayer(nn.Module):
  """Dense, sparse and embedding features to one vector x0 per candidate."""

  spec: FeatureSpec
  config: RankerConfig

  @nn.compact
  def __call__(self, candidates: CandidateBatch, stats: DenseStats) -> Array:
    """CandidateBatch -> [U, C, width of x0]."""
    parts = [stats.apply(candidates.dense_UCF)] if self.spec.num_dense else []
    for i, size in enumerate(self.spec.sparse_sizes):
      width = self.config.sparse_width or sparse_width(size, self.config.max_sparse_width)
      table = self.param(f'sparse_{i}', nn.initializers.normal(0.05), (size, width))
      vector = table[candidates.sparse_UCF[..., i]]
      parts.append(vector if self.config.raw_embeddings else l2_normalise(vector))
    start = 0
    for i, width in enumerate(self.spec.embedding_widths):
      x = l2_normalise(candidates.embedding_UCF[..., start : start + width])
      parts.append(l2_normalise(dense(self.config.embedding_width, (None, None), name=f'embedding_{i}')(x)))
      start += width
    return jnp.concatenate(parts, axis=-1)


def sparse_width(size: int, most: int) -> int:
  """Embedding width by cardinality: 2 * size^(1/4), rounded up to 4, at most `most`."""
  return min(most, 4 * max(1, round(2 * size**0.25 / 4)))


def ranker_fields(spec: FeatureSpec, config: RankerConfig, modules: bool) -> Fields:
  """Where each field of the ranker's x0 stands: the dense features are one, every other feature and output is its own.

  Args:
    spec: of the features.
    config: of the ranker.
    modules: whether outputs of the user-sequence modules stand behind the features.
  """
  parts = [('dense', spec.num_dense)] if spec.num_dense else []
  most = config.max_sparse_width
  parts += [('sparse', config.sparse_width or sparse_width(size, most)) for size in spec.sparse_sizes]
  parts += [('embedding', config.embedding_width) for _ in spec.embedding_widths]
  if modules and config.sequence == 'pinfm':  # in the order of `RankingModel._module`
    outputs = 2 + config.user_output
    widths = [config.module_width] * outputs + [1] * config.similarity + [config.similarity_width]
    parts += [('module', width) for width in widths if width]
  if modules and config.transact.length:  # the pooled output, those of the newest events
    parts += [('module', 3 * config.transact.width) for _ in range(1 + config.transact.outputs)]
  return make_fields(parts)
