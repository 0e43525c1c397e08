"""Training of the image networks: a resumed run is the uninterrupted one, and the heads learn over a frozen network."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.data.public.cifar10 import Images
from pinfm_jax.errors import UserError
from pinfm_jax.robustness.balls import Ball
from pinfm_jax.robustness.draws import uniforms
from pinfm_jax.robustness.networks import ResNetConfig
from pinfm_jax.robustness.tasks import NAMES, Tasks, TasksConfig
from pinfm_jax.robustness.train_images import AdversarialConfig, inner_attack, train_classifier, train_heads
from pinfm_jax.robustness.training import Order, Schedule, fit

RNG = np.random.default_rng(4)
IMAGES = Images(RNG.integers(0, 256, (20, 4, 4, 3), np.uint8), RNG.integers(0, 10, 20).astype(np.int32))
SCHEDULE = Schedule(epochs=2.4, batch=8, learning_rate=0.1, evaluations=3, average=0.9)
NETWORK = ResNetConfig((16,), (1,), 2, 16)


class _StoppedError(Exception):
  """Somebody pulled the plug."""


def _init(key):
  return {'kernel': 0.1 * jax.random.normal(key, (48, 10)), 'bias': jnp.zeros(10)}


def _loss(params, x, label_B, seed_B):
  """Linear, on images with noise of their own: a resumed run must draw the same."""
  x = x + 0.2 * uniforms(seed_B, x.shape[1:])
  logits = x.reshape(len(x), -1) @ params['kernel'] + params['bias']
  loss = jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, label_B[:, None], 1)[:, 0])
  return loss, {'size': jnp.mean(jnp.square(params['kernel']))}


def _fit(directory: Path, schedule: Schedule = SCHEDULE, stop_after: int | None = None, settings=()):
  seen = []

  def held_out(params):
    seen.append(params)
    if stop_after is not None and len(seen) > stop_after:
      raise _StoppedError
    return {'score': float(jnp.sum(jnp.abs(params['bias'])))}

  return fit('toy', directory, _init, _loss, IMAGES, schedule, held_out, dict(settings)), len(seen)


def _same(a, b) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
  whole, looks = _fit(tmp_path / 'whole')
  assert looks == 3
  assert SCHEDULE.steps(20) == 6
  with pytest.raises(_StoppedError):
    _fit(tmp_path / 'stopped', stop_after=1)
  resumed, looks = _fit(tmp_path / 'stopped')
  assert looks == 2  # the first third was not made again
  _same(resumed, whole)
  histories = [json.loads((tmp_path / name / 'history.json').read_text()) for name in ('whole', 'stopped')]
  assert histories[0] == histories[1]
  assert [row['step'] for row in histories[0]] == [2, 4, 6]
  again, looks = _fit(tmp_path / 'whole')  # finished: read, not made
  assert looks == 0
  _same(again, whole)
  with pytest.raises(UserError, match='learning_rate'):
    _fit(tmp_path / 'whole', replace(SCHEDULE, learning_rate=0.2))
  with pytest.raises(UserError, match='method'):
    _fit(tmp_path / 'whole', settings={'method': 'plain'})


def test_a_diverged_run_says_what_to_do(tmp_path: Path) -> None:
  with pytest.raises(UserError, match='lower schedule.learning_rate'), np.errstate(all='ignore'):
    _fit(tmp_path, replace(SCHEDULE, learning_rate=1e30))
  with pytest.raises(UserError, match='schedule.batch is 0'):
    Schedule(batch=0)


def test_order_shows_every_image_once_an_epoch() -> None:
  order = Order(20, SCHEDULE)
  seen = np.concatenate([order.rows(step) for step in range(5)])
  for epoch in range(2):
    assert sorted(seen[20 * epoch : 20 * epoch + 20]) == list(range(20))
  assert not np.array_equal(seen[:20], seen[20:])
  np.testing.assert_array_equal(Order(20, SCHEDULE).rows(3), order.rows(3))  # a function of the step alone


def test_inner_attacks_keep_to_what_they_promise() -> None:
  x, label = jnp.asarray(IMAGES.pixels[:8] / 255, jnp.float32), jnp.asarray(IMAGES.labels[:8])
  params = _init(jax.random.key(0))
  logits = lambda x: x.reshape(len(x), -1) @ params['kernel']
  seeds = jnp.arange(8, dtype=jnp.uint32)
  for config, reach in (
    (AdversarialConfig(), 3 * 8 / 255),  # noise of two radii and a step of one, not projected
    (AdversarialConfig(steps=3, step_size=4 / 255, noise=1.0, project=True), 8 / 255),
    (AdversarialConfig('trades', steps=3, step_size=4 / 255), 8 / 255),
  ):
    moved = jax.jit(lambda x, config=config: inner_attack(logits, x, label, seeds, config))(x)
    assert float(jnp.max(jnp.abs(moved - x))) <= reach + 1e-6
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    assert float(jnp.max(jnp.abs(moved - x))) > 4 / 255
  with pytest.raises(UserError, match='adversarial.method'):
    AdversarialConfig('free')


@pytest.mark.slow
@pytest.mark.parametrize('method', ['plain', 'adversarial', 'trades'])
def test_every_method_learns_and_resumes(tmp_path: Path, method: str) -> None:
  """Bright and dark images are told apart at once, by every method."""
  rng = np.random.default_rng(6)
  label = rng.integers(0, 2, 32).astype(np.int32)
  pixels = np.clip(rng.normal(60 + 130 * label[:, None, None, None], 25, (32, 32, 32, 3)), 0, 255).astype(np.uint8)
  train, held_out = Images(pixels[:16], label[:16]), Images(pixels[16:], label[16:])
  config = AdversarialConfig(method, Ball('linf', 4 / 255), steps=1, step_size=4 / 255, beta=1.0)
  schedule = Schedule(epochs=50, batch=8, learning_rate=0.05, evaluations=2, average=0.8)
  found = train_classifier(tmp_path, NETWORK, config, schedule, train, held_out)
  history = json.loads((tmp_path / 'history.json').read_text())
  assert len(history) == 2
  assert history[-1]['clean'] >= 0.9
  assert history[-1]['pgd10'] <= history[-1]['clean']
  assert history[-1]['score'] == history[-1]['clean' if method == 'plain' else 'pgd10']
  if method != 'plain':
    assert history[-1]['pgd10'] >= 0.8
  _same(found, train_classifier(tmp_path, NETWORK, config, schedule, train, held_out))  # read, not made


@pytest.mark.slow
def test_heads_learn_over_a_frozen_classifier(tmp_path: Path) -> None:
  images = Images(RNG.integers(0, 256, (24, 32, 32, 3), np.uint8), np.zeros(24, np.int32))
  config = TasksConfig(bank=8, projection=(8, 4), rotation_width=16, inpainting_width=16, inpainting_blocks=1)
  tasks = Tasks(replace(config, rotation_stage=0), NETWORK)
  classifier = jax.jit(tasks.classifier.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
  before = jax.tree.map(np.array, classifier)
  schedule = Schedule(epochs=12, batch=8, learning_rate=0.05, evaluations=2, average=0.8)
  found = train_heads(tmp_path, tasks, classifier, schedule, images, images)
  assert set(found) == {*NAMES, 'classifier', 'bank'}
  assert found['bank'].shape == (8, 4)
  np.testing.assert_allclose(np.linalg.norm(found['bank'], axis=1), 1, rtol=1e-5)
  _same(found['classifier'], before)
  history = json.loads((tmp_path / 'history.json').read_text())
  assert history[-1]['inpainting'] < history[0]['inpainting']
  _same(train_heads(tmp_path, tasks, classifier, schedule, images, images), found)
  other = jax.tree.map(lambda x: x + 1, classifier)
  with pytest.raises(UserError, match='classifier'):
    train_heads(tmp_path, tasks, other, schedule, images, images)
