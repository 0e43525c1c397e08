"""What `ranker.candidate_content` reads: the items' content, or without any the last embedding feature."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from pinfm_jax.data.featurize import FeatureSchema, candidate_inputs
from pinfm_jax.data.info import EmbeddingFeature, Features
from pinfm_jax.data.records import Request
from pinfm_jax.errors import UserError
from pinfm_jax.model.ranker import DenseStats
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.stages.context import Run
from pinfm_jax.train.finetune import FinetuneTask, feature_spec, ranking_batch

VECTORS = Features(embedding=(EmbeddingFeature('other', 3), EmbeddingFeature('readers', 4)))
SCHEMA = FeatureSchema(VECTORS, 0, 2, 16, 8, ('click',))


@pytest.mark.parametrize(('features', 'content', 'width'), [(VECTORS, 5, 5), (VECTORS, 0, 4), (Features(), 0, 0)])
def test_the_width_is_that_of_the_last_embedding_input(features, content, width):
  schema = replace(SCHEMA, features=features, content_width=content)
  assert schema.candidate_width == feature_spec(schema).content_width == width
  assert sum(schema.embedding_widths) == features.embedding_width + content


def test_the_candidates_token_reads_the_last_embedding_feature_and_nothing_else_of_them():
  """The module's own prediction moves with `readers`, through the token alone, and not with `other`."""
  ranker = replace(toy.EXPERIMENT.ranker, candidate_content=True)
  model = replace(toy.EXPERIMENT.model, num_actions=1, num_surfaces=2)
  task = FinetuneTask(model, ranker, replace(toy.EXPERIMENT.finetune, candidates=2), SCHEMA, 1)
  params = jax.jit(task.init)(jax.random.key(0))
  assert params['candidate_content'].shape == (4, task.model.tables.item_width)
  rng = np.random.default_rng(0)
  request = Request(
    0, 0, np.full(2, 9), np.array([3, 4], np.uint64), np.full(2, -1), np.zeros(2, np.uint16),
    np.zeros((2, 1), np.uint8), np.zeros((2, 0), np.float32), np.zeros((2, 0), np.int32),
    rng.normal(size=(2, 7)).astype(np.float32), None,
  )  # fmt: skip
  columns = {f'candidate_{k}': v[None] for k, v in candidate_inputs(request, slice(0, 2), 2, SCHEMA, None).items()}
  history = {'item': (1, 8, 2), 'surface': (1, 8), 'actions': (1, 8), 'mask': (1, 8)}
  columns |= {f'history_{k}': jnp.zeros(shape, bool if k == 'mask' else jnp.int32) for k, shape in history.items()}
  batch = ranking_batch(columns | {'user': jnp.zeros(1, jnp.uint32)})
  width = task.model.tables.item_width
  vectors = (jnp.zeros((1, 8, width)), jnp.asarray(rng.normal(size=(1, 2, width)), jnp.float32))
  weights = {'params': {k: v for k, v in params.items() if k != 'log_temperature'}}
  stats = DenseStats(*(jnp.zeros(len(SCHEMA.dense_names)) for _ in range(4)))
  predict = jax.jit(lambda b: task.module.apply(weights, *vectors, b, stats).module_logits_UCT)

  def moved(columns_changed: slice) -> float:
    embedding = batch.candidates.embedding_UCF
    changed = jnp.asarray(embedding).at[:, 0, columns_changed].multiply(-1.0)
    other = batch._replace(candidates=batch.candidates._replace(embedding_UCF=changed))
    difference = np.abs(np.asarray(predict(other) - predict(batch)))
    assert not difference[0, 1].any()  # the other candidate's token
    return difference[0, 0].max()

  assert moved(slice(0, 3)) == 0
  assert moved(slice(3, 7)) > 1e-4


def test_a_set_with_neither_refuses_candidate_content(toy_run):
  run = Run(apply_overrides(toy_run.experiment, {'ranker.candidate_content': True}), toy_run.workdir)
  assert run.schema.candidate_width == 8  # the simulated items have content
  bare = Run(run.experiment, run.workdir)
  bare.__dict__['dataset'] = type('Bare', (), {'info': replace(toy_run.dataset.info, content_width=0)})()
  with pytest.raises(UserError, match='no content vectors of items and no embedding feature'):
    _ = bare.schema
