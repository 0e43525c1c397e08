"""Image networks and tasks: no batch, no mode, inputs normalised inside; losses against NumPy."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.errors import UserError
from pinfm_jax.robustness import views
from pinfm_jax.robustness.balls import Ball
from pinfm_jax.robustness.draws import example_seeds, fold
from pinfm_jax.robustness.networks import (
  CLASSIFIERS,
  MEAN,
  STD,
  ResNet,
  ResNetConfig,
  convolve,
  fold_pixels,
  normalise,
  pooled,
  unfold_pixels,
)
from pinfm_jax.robustness.repair import RepairConfig, losses, repair
from pinfm_jax.robustness.tasks import NAMES, Tasks, TasksConfig

RNG = np.random.default_rng(2)
X = jnp.asarray(RNG.random((4, 32, 32, 3)), jnp.float32)
SEEDS = example_seeds(np.arange(4), 0)
CONFIG = TasksConfig(bank=8, projection=(8, 4), rotation_width=16, inpainting_width=16, inpainting_blocks=1)


@pytest.fixture(scope='module')
def tasks() -> Tasks:
  return Tasks(CONFIG, CLASSIFIERS['test'])


@pytest.fixture(scope='module')
def params(tasks: Tasks):
  classifier = jax.jit(tasks.classifier.init)(jax.random.key(0), X[:1])['params']
  shape = classifier['logits']['kernel'].shape
  classifier['logits']['kernel'] = jax.random.normal(jax.random.key(1), shape)  # they start at 0
  found = jax.jit(tasks.init)(jax.random.key(2), classifier)
  return {**found, 'bank': jax.jit(tasks.embed)(found, X[::-1])}


@pytest.fixture(scope='module')
def repaired(tasks: Tasks, params):
  """The repair by two tasks, compiled once for whole batches."""
  config = RepairConfig(Ball('linf', 8 / 255), steps=4, step_size=2 / 255)
  return jax.jit(lambda x, index: repair(tasks.terms(params, NAMES[1:]), x, config, index, report=False))


def test_networks_normalise_and_have_no_mode(tasks: Tasks, params) -> None:
  np.testing.assert_allclose(normalise(X), (np.asarray(X) - MEAN) / STD, rtol=1e-4, atol=1e-5)
  logits = jax.jit(tasks.logits)
  whole = logits(params, X)
  # What the stem sees: the same logits from the network's own arithmetic on normalised pixels, not on raw ones.
  stem = jax.jit(
    lambda x: tasks.classifier.apply(
      {'params': params['classifier']}, x, capture_intermediates=lambda module, _: module.name == 'stem', mutable=True
    )[1]['intermediates']['stem']['__call__'][0]
  )
  kernel, gain = params['classifier']['stem']['kernel'], params['classifier']['stem']['gain']
  centred = kernel - kernel.mean((0, 1, 2))
  size = jnp.sqrt(jnp.square(centred).mean((0, 1, 2)) * np.prod(kernel.shape[:3]) / 2 + 1e-6)
  expected = convolve(fold_pixels((X - jnp.asarray(MEAN)) / jnp.asarray(STD), 2), centred * gain / size)
  np.testing.assert_allclose(stem(X), expected, atol=1e-4)
  # No statistics are kept and none are taken over the batch.
  assert set(jax.eval_shape(tasks.classifier.init, jax.random.key(0), X[:1])) == {'params'}
  mates = logits(params, X.at[1:].set(1 - X[1:]))
  np.testing.assert_array_equal(mates[0], whole[0])
  np.testing.assert_allclose(logits(params, X[:1])[0], whole[0], atol=1e-5)


def test_every_term_is_an_examples_own(tasks: Tasks, params) -> None:
  order = np.array([2, 0, 3, 1])
  loss = jax.jit(partial(losses, tasks.terms(params)))
  whole = np.asarray(loss(X, SEEDS))
  assert whole.shape == (4, 3)
  assert np.isfinite(whole).all()
  np.testing.assert_allclose(loss(X[order], SEEDS[order]), whole[order], rtol=1e-5)
  other = loss(X.at[2:].set(0.5), SEEDS.at[2:].add(7))
  np.testing.assert_array_equal(other[:2], whole[:2])
  assert all(term.passes > 0 and not term.couples for term in tasks.terms(params))


@pytest.mark.slow
def test_repair_of_images(tasks: Tasks, repaired) -> None:
  index = jnp.asarray([5, 6, 7, 8])
  found = repaired(X, index)
  assert float(jnp.max(jnp.abs(found.x - X))) <= 8 / 255 + 1e-6
  assert float(found.x.min()) >= 0
  assert float(found.x.max()) <= 1
  order = np.array([3, 1, 0, 2])
  np.testing.assert_allclose(repaired(X[order], index[order]).x, found.x[order], atol=1e-6)
  mates = repaired(X.at[1:].set(1 - X[1:]), index.at[1:].add(9))
  np.testing.assert_allclose(mates.x[0], found.x[0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_repair_lowers_each_task(tasks: Tasks, params, name: str) -> None:
  config, terms = RepairConfig(Ball('linf', 16 / 255), steps=20, step_size=2 / 255), tasks.terms(params, (name,))
  found = jax.jit(lambda x: repair(terms, x, config, jnp.arange(4), report=False))(X)
  # Every step has views and masks of its own: what falls is the loss over all of them.
  measure = jax.jit(lambda x, seed: jnp.mean(losses(terms, x, example_seeds(jnp.arange(4), seed))))
  before, after = (np.mean([measure(x, seed) for seed in range(100, 132)]) for x in (X, found.x))
  assert after < before


@pytest.mark.slow
def test_contrastive_losses_against_loops(tasks: Tasks, params) -> None:
  embed = jax.jit(lambda seed_B: tasks.embed(params, views.view(X, seed_B)))
  z = [np.asarray(embed(fold(SEEDS, v)), np.float64) for v in range(2)]
  bank = np.asarray(params['bank'], np.float64)
  np.testing.assert_allclose(np.linalg.norm(z[0], axis=1), 1, rtol=1e-5)
  for b, (own, batch) in enumerate(
    zip(*(jax.jit(f)(params, X, SEEDS) for f in (tasks.contrastive, tasks.contrastive_in_batch)), strict=True)
  ):
    with_bank, with_mates = [], []
    for i, j in ((0, 1), (1, 0)):
      positive = np.exp(z[i][b] @ z[j][b] / 0.2)
      with_bank.append(-np.log(positive / (positive + np.exp(bank @ z[i][b] / 0.2).sum())))
      mates = sum(np.exp(z[v][c] @ z[i][b] / 0.2) for v in range(2) for c in range(4) if c != b)
      with_mates.append(-np.log(positive / (positive + mates)))
    assert float(own) == pytest.approx(np.mean(with_bank), rel=1e-4)
    assert float(batch) == pytest.approx(np.mean(with_mates), rel=1e-4)


def test_rotations_and_masks() -> None:
  turns = jnp.asarray([0, 1, 2, 3])
  np.testing.assert_array_equal(views.rotate(X, turns), np.stack([np.rot90(X[k], k) for k in range(4)]))
  shown = np.asarray(jax.jit(views.mask)(SEEDS))
  assert shown.shape == (4, 32, 32, 1)
  assert (shown.mean((1, 2, 3)) == 0.5).all()
  assert not (shown[0] == shown[1]).all()
  np.testing.assert_array_equal(shown[:, ::8, ::8].repeat(8, 1).repeat(8, 2), shown)  # whole squares
  middle = np.asarray(views.centre_mask(2))
  assert middle[0, 8:24, 8:24].max() == 0
  assert middle[0].sum() == 32 * 32 - 16 * 16


def test_views_crop_flip_and_shift() -> None:
  flat = jnp.broadcast_to(jnp.asarray([0.2, 0.5, 0.8]), X.shape)
  view = jax.jit(views.view, static_argnums=2)
  plain = views.ViewConfig(colour=0.0, grey=0.0)
  np.testing.assert_allclose(view(flat, SEEDS, plain), flat, atol=1e-5)  # a crop of one colour is that colour
  whole = view(X, SEEDS, views.ViewConfig(area=(1.0, 1.0), aspect=1.0, colour=0.0, grey=0.0))
  for b in range(4):  # the whole image, as it is or flipped
    assert min(float(jnp.abs(whole[b] - X[b]).max()), float(jnp.abs(whole[b] - X[b][:, ::-1]).max())) < 1e-5
  grey = view(X, SEEDS, views.ViewConfig(grey=1.0))
  np.testing.assert_allclose(grey[..., 0], grey[..., 2], atol=1e-5)
  moved = np.asarray(jax.jit(views.shifted)(X, SEEDS))
  padded = np.pad(np.asarray(X), ((0, 0), (4, 4), (4, 4), (0, 0)))
  for b in range(4):
    places = [padded[b, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    assert any(np.allclose(moved[b], image) or np.allclose(moved[b], image[:, ::-1]) for image in places)


def test_bfloat16_network_is_the_float32_one_rounded() -> None:
  networks = [ResNet(dataclasses.replace(CLASSIFIERS['test'], bfloat16=rounds)) for rounds in (False, True)]
  x = jax.random.uniform(jax.random.key(0), (8, 32, 32, 3))
  params = networks[0].init(jax.random.key(1), x)['params']
  exact, rounded = (jax.jit(network.apply)({'params': params}, x) for network in networks)
  for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
    assert a.dtype == b.dtype == jnp.float32
    np.testing.assert_allclose(b, a, atol=0.05 * max(float(jnp.max(jnp.abs(a))), 1e-6))
  assert not np.array_equal(exact[1], rounded[1])


def test_convolution_and_its_gradients_are_xlas() -> None:
  x, kernel = jnp.asarray(RNG.normal(size=(2, 8, 8, 3))), jnp.asarray(RNG.normal(size=(3, 3, 3, 5)))
  plain = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  value = lambda f: lambda x, k: jnp.sum(jnp.sin(f(x, k)))
  for ours, theirs in zip(
    jax.grad(value(convolve), (0, 1))(x, kernel), jax.grad(value(plain), (0, 1))(x, kernel), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
  image = RNG.random((2, 8, 8, 3)).astype(np.float32)
  np.testing.assert_array_equal(unfold_pixels(fold_pixels(image, 4), 4), image)
  np.testing.assert_allclose(pooled(image, 2)[0, 1, 2], image[0, 2:4, 4:6].mean((0, 1)), rtol=1e-5)


def test_paper_size_and_wrong_settings(tasks: Tasks, params) -> None:
  paper = ResNetConfig((160, 320, 640), (4, 4, 4), 1, 32)
  assert paper.multiply_adds() == pytest.approx(5.25e9, rel=0.05)
  for make, message in (
    (lambda: ResNetConfig((16, 24), (1, 1), 2, 16), 'multiples'),
    (lambda: ResNetConfig((16,), (1, 1)), 'as many'),
    (lambda: TasksConfig(views=1), 'at least 2'),
    (lambda: TasksConfig(mask='none'), 'tasks.mask'),
    (lambda: TasksConfig(weights={'rotation': 1.0}), 'tasks.weights'),
    (lambda: tasks.terms(params, ('colour',)), "no task 'colour'"),
    (lambda: tasks.terms({**params, 'bank': params['bank'][:0]}), 'bank of negatives is empty'),
  ):
    with pytest.raises(UserError, match=message):
      make()
  four = dataclasses.replace(CONFIG, rotations=4, rotation='network')
  assert Tasks(four, CLASSIFIERS['test']).config.rotations == 4
