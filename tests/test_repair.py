"""The repair: against a loop in NumPy, in its ball, independent of the batch."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.errors import UserError
from pinfm_jax.robustness.balls import Ball, distance
from pinfm_jax.robustness.draws import example_seeds, uniforms
from pinfm_jax.robustness.repair import LossTerm, RepairConfig, passes, repair

RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(2, 5)).astype(np.float32)  # two tasks pull to different points
CURVES = (1 + RNG.random((2, 5))).astype(np.float32)
X = RNG.random((6, 5)).astype(np.float32)
INDEX = np.arange(100, 106)
PLAIN = RepairConfig(Ball('linf', 0.3, None, None), steps=7, step_size=0.05, random_start=False)


def _quadratic(k: int):
  return lambda x, seed_B: jnp.sum(CURVES[k] * jnp.square(x - CENTRES[k]), axis=-1)


def _noisy(x, seed_B):
  return jnp.sum(jnp.square(x - uniforms(seed_B, (5,))), axis=-1)


TERMS = (LossTerm('a', _quadratic(0), 1.0, 2.0), LossTerm('b', _quadratic(1), 0.5, 0.25))
# Operation by operation it would compile each of them.
FOUND = jax.jit(repair, static_argnums=(0, 2), static_argnames='report')


def _loop(x: np.ndarray, config: RepairConfig) -> np.ndarray:
  """One example, in float64, as the docstrings say."""
  x, at, ball = x.astype(np.float64), x.astype(np.float64), config.ball
  weights = [term.weight for term in TERMS]

  def project(moved):
    change = moved - x
    if ball.norm == 'linf':
      change = np.clip(change, -ball.radius, ball.radius)
    elif np.linalg.norm(change) > ball.radius:
      change *= ball.radius / np.linalg.norm(change)
    low, high = (-np.inf if ball.low is None else ball.low), (np.inf if ball.high is None else ball.high)
    return np.clip(x + change, low, high)

  def direction(gradient):
    return np.sign(gradient) if ball.norm == 'linf' else gradient / np.linalg.norm(gradient)

  for _ in range(config.steps):
    gradient = lambda k: 2 * CURVES[k] * (at - CENTRES[k])  # noqa: B023
    if config.order == 'one_by_one':
      for k in range(2):
        at = project(at - weights[k] / sum(weights) * config.step_size * direction(weights[k] * gradient(k)))
      continue
    gradients = [gradient(k) for k in range(2)]
    if config.weighting == 'gradient':
      gradients = [g / np.linalg.norm(g) for g in gradients]
    at = project(at - config.step_size * direction(sum(w * g for w, g in zip(weights, gradients, strict=True))))
  return at


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize(
  ('weighting', 'order', 'low'),
  [('fixed', 'summed', None), ('gradient', 'summed', 0.0), ('fixed', 'one_by_one', 0.0)],
)
def test_repair_equals_a_loop(norm: str, weighting: str, order: str, low: float | None) -> None:
  ball = Ball(norm, 0.3, low, None if low is None else 1.0)
  config = replace(PLAIN, ball=ball, weighting=weighting, order=order)
  found = jax.jit(partial(repair, TERMS, config=config))(X, index_B=INDEX)
  np.testing.assert_allclose(found.x, [_loop(x, config) for x in X], atol=2e-5)
  assert (distance(found.x, jnp.asarray(X), norm) <= 0.3 + 1e-6).all()
  np.testing.assert_allclose(found.loss_before_BK[:, 1], _quadratic(1)(X, None), rtol=1e-5)
  assert (found.loss_after_BK @ np.array([1.0, 0.5]) < found.loss_before_BK @ np.array([1.0, 0.5])).all()
  assert passes(TERMS, config) == 7 * 2.25


@pytest.mark.parametrize('k', [0, 1])
def test_each_term_alone_falls(k: int) -> None:
  found = FOUND((TERMS[k],), X, PLAIN, INDEX)
  assert (found.loss_after_BK < found.loss_before_BK).all()


def test_embeddings_of_any_rank() -> None:
  x = jnp.asarray(RNG.normal(size=(3, 4, 5)), jnp.float32)
  term = LossTerm('norm', lambda x, seed_B: jnp.sum(jnp.square(x), axis=(1, 2)))
  config = RepairConfig(Ball('l2', 0.5, None, None), steps=60, step_size=0.1)
  found = FOUND((term,), x, config, jnp.arange(3))
  # The nearest point to 0 in the ball is known: straight towards it.
  length = jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True))
  np.testing.assert_allclose(found.x, x * (1 - 0.5 / length), atol=1e-2)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_an_example_owes_nothing_to_its_batch(norm: str) -> None:
  config = replace(PLAIN, ball=Ball(norm, 0.3), random_start=True, patience=2)
  terms = (LossTerm('noisy', _noisy), TERMS[0])
  step = jax.jit(lambda x, i: repair(terms, x, config, i, 3, report=False).x)
  whole = np.asarray(step(X, INDEX))
  order = RNG.permutation(6)
  np.testing.assert_array_equal(step(X[order], INDEX[order]), whole[order])
  for b in range(6):
    # Sums of another shape may round otherwise in the last place.
    np.testing.assert_allclose(step(X[b : b + 1], INDEX[b : b + 1])[0], whole[b], atol=1e-6)
  other = step(np.concatenate([X[:3], 1 - X[3:]]), np.concatenate([INDEX[:3], INDEX[3:] + 50]))
  np.testing.assert_array_equal(other[:3], whole[:3])
  assert not np.allclose(step(X, INDEX + 1), whole)  # the index does count
  start = np.asarray(FOUND(TERMS, X, replace(config, steps=0), INDEX, 3, report=False).x)
  assert not np.allclose(start, X)  # a random start
  assert (distance(jnp.asarray(start), jnp.asarray(X), norm) <= 0.3 + 1e-6).all()
  assert start.min() >= 0
  assert start.max() <= 1


def test_examples_stop_one_by_one() -> None:
  values = (_quadratic(0)(X, None) + 0.5 * _quadratic(1)(X, None)).tolist()
  limit = sorted(values)[2]
  found = FOUND(TERMS, X, replace(PLAIN, stop_below=limit), INDEX, report=False)
  for b in range(6):
    alone = FOUND(TERMS, X[b : b + 1], replace(PLAIN, stop_below=limit), INDEX[b : b + 1], report=False)
    assert int(alone.steps_B[0]) == int(found.steps_B[b])
    assert (int(found.steps_B[b]) == 0) == (values[b] <= limit)
  # At the lowest point nothing gets better: an example waits as long as it was told to.
  bowl = (LossTerm('bowl', lambda x, seed_B: jnp.sum(jnp.square(x - 0.5), axis=-1)),)
  config = RepairConfig(Ball('l2', 9.0, None, None), steps=30, step_size=0.4, random_start=False, patience=3)
  steps = FOUND(bowl, jnp.full((1, 2), 0.5), config, jnp.zeros(1, int), report=False).steps_B
  assert 0 < int(steps[0]) < 10


def test_gradients_go_through_the_steps() -> None:
  """l_2 steps are smooth, so the gradient through the repair is that of finite differences."""
  config = RepairConfig(Ball('l2', 0.2, None, None), steps=3, step_size=0.1, random_start=False)
  value = jax.jit(lambda x: jnp.sum(jnp.sin(3 * repair(TERMS, x, config, jnp.zeros(1, int), report=False).x)))
  x, direction = jnp.asarray(X[:1]), jnp.asarray(np.random.default_rng(7).normal(size=(1, 5)), jnp.float32)
  slope = float(jnp.sum(jax.jit(jax.grad(value))(x) * direction))
  step = 1e-2
  assert slope == pytest.approx(float(value(x + step * direction) - value(x - step * direction)) / (2 * step), rel=2e-2)
  # The sign has no derivative; its soft stand-in has, and changes no value.
  signs = replace(PLAIN, steps=3)
  soft = replace(signs, sharpness=1.0)
  moved = lambda config: lambda x: repair(TERMS, x, config, INDEX[:1], report=False).x
  np.testing.assert_array_equal(jax.jit(moved(signs))(x), jax.jit(moved(soft))(x))
  through = lambda config: jax.jit(jax.grad(lambda x: jnp.sum(moved(config)(x))))(x)
  np.testing.assert_array_equal(through(signs), jnp.ones_like(x))
  assert not np.allclose(through(soft), 1.0)


def test_draws_are_uniform_and_of_the_example() -> None:
  seed_B = jax.jit(example_seeds)(np.arange(64), 5)
  drawn = np.asarray(jax.jit(uniforms, static_argnums=1)(seed_B, (500,)))
  assert 0 < drawn.min() < drawn.max() < 1
  assert abs(drawn.mean() - 0.5) < 0.01
  assert abs(drawn.std() - 12**-0.5) < 0.01
  assert abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 0.2
  ball = Ball('l2', 2.0, None, None)
  lengths = np.asarray(distance(jax.jit(ball.random)(jnp.zeros((64, 3)), seed_B), jnp.zeros((64, 3)), 'l2'))
  assert abs((lengths < 2 * 0.5 ** (1 / 3)).mean() - 0.5) < 0.2  # half of the volume


def test_each_vector_in_a_ball_of_its_own() -> None:
  ball, rng = Ball('l2', 0.5, None, None, 'vector'), np.random.default_rng(8)
  x = jnp.asarray(rng.normal(size=(4, 30, 3)), jnp.float32)

  @jax.jit
  def measured(x, moved, seed_B):
    return ball.random(x, seed_B), ball.project(moved, x), ball.direction(moved)

  moved = x + jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  drawn, near, direction = map(np.asarray, measured(x, moved, example_seeds(np.arange(4), 0)))
  lengths = np.linalg.norm(drawn - x, axis=-1)
  assert lengths.max() <= 0.5 + 1e-6
  assert abs((lengths < 0.5 * 0.5 ** (1 / 3)).mean() - 0.5) < 0.15  # half of the volume, whatever the other vectors
  for change, whole in zip((near - x).reshape(-1, 3), np.asarray(moved - x).reshape(-1, 3), strict=True):
    np.testing.assert_allclose(change, whole * min(1, 0.5 / np.linalg.norm(whole)), atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(direction, axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Ball('l1'), "norm is 'l1'"),
    (lambda: Ball(radius=-1), 'radius is -1'),
    (lambda: Ball(per='batch'), "per is 'batch'"),
    (lambda: Ball(low=1.0, high=0.0), 'valid range'),
    (lambda: RepairConfig(order='random'), 'repair.order'),
    (lambda: RepairConfig(weighting='auto'), 'repair.weighting'),
    (lambda: RepairConfig(steps=-1), 'repair.steps'),
    (lambda: repair((), jnp.zeros((1, 2)), PLAIN, jnp.zeros(1, int)), 'are none'),
    (lambda: repair((TERMS[0], TERMS[0]), jnp.zeros((1, 2)), PLAIN, jnp.zeros(1, int)), 'are a, a'),
  ],
)
def test_wrong_settings(make, message: str) -> None:
  with pytest.raises(UserError, match=message):
    make()
