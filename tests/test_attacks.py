"""Attacks: against closed forms on linear models, and what every attack has to keep to."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.errors import UserError
from pinfm_jax.robustness import adaptive
from pinfm_jax.robustness.apgd import apgd, apgd_targeted, checkpoints
from pinfm_jax.robustness.attacks import (
  Attacked,
  ascend,
  better,
  classifier_objective,
  cw_margin,
  dlr,
  dlr_targeted,
  evaluated,
  fooled,
  pgd,
  runners_up,
)
from pinfm_jax.robustness.balls import Ball, distance
from pinfm_jax.robustness.repair import LossTerm, RepairConfig
from pinfm_jax.robustness.square import side_schedule, square

RNG = np.random.default_rng(1)
SIDE, B = 6, 8
X = jnp.asarray(0.3 + 0.4 * RNG.random((B, SIDE, SIDE, 3)), jnp.float32)
INDEX = jnp.arange(B)
WEIGHTS = jnp.asarray(RNG.normal(size=(SIDE * SIDE * 3, 4)), jnp.float32)
HIDDEN = jnp.asarray(RNG.normal(size=(SIDE * SIDE * 3, 16)) / 10, jnp.float32)
OUT = jnp.asarray(RNG.normal(size=(16, 5)), jnp.float32)


def _linear(x):
  """Two classes, so that the margin is linear and its largest value in a ball is known."""
  return x.reshape(x.shape[0], -1) @ WEIGHTS[:, :2]


def _curved(x):
  return jnp.tanh((x - 0.5).reshape(x.shape[0], -1) @ HIDDEN) @ OUT


LABEL = jnp.argmax(_linear(X), axis=-1)
CURVED_LABEL = jnp.argmax(_curved(X), axis=-1)
ATTACKS = {
  'pgd': lambda objective, ball, steps: pgd(objective, X, ball, INDEX, steps),
  'apgd': lambda objective, ball, steps: apgd(objective, X, ball, INDEX, steps),
  'square': lambda objective, ball, steps: square(objective, X, ball, INDEX, 10 * steps),
}


def _optimum(norm: str, radius: float) -> np.ndarray:
  """The margin's largest value in the ball, as long as no pixel meets the valid range (X is far from it)."""
  label = np.asarray(LABEL)
  slope = np.asarray(WEIGHTS)[:, 1 - label].T - np.asarray(WEIGHTS)[:, label].T
  gain = np.abs(slope).sum(1) if norm == 'linf' else np.sqrt(np.square(slope).sum(1))
  return np.asarray(cw_margin(_linear(X), LABEL)) + radius * gain


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize(('name', 'loss'), [('pgd', 'ce'), ('apgd', 'margin')])
def test_linear_model_is_attacked_to_the_optimum(name: str, norm: str, loss: str) -> None:
  ball = Ball(norm, 0.05 if norm == 'linf' else 0.4)
  found = jax.jit(partial(ATTACKS[name], classifier_objective(_linear, LABEL, loss), ball, 30))()
  margin = np.asarray(cw_margin(_linear(found.x), LABEL))
  best = _optimum(norm, ball.radius)
  gain = best - np.asarray(cw_margin(_linear(X), LABEL))
  np.testing.assert_array_less(margin, best + 1e-4)
  # PGD's last l_2 steps still cut corners.
  np.testing.assert_array_less((0.97 if name == 'pgd' else 0.995) * gain, gain - (best - margin))
  np.testing.assert_array_equal(found.fooled_B, margin >= 0)


def test_square_comes_near_without_gradients() -> None:
  for norm, share in (('linf', 0.7), ('l2', 0.25)):
    ball = Ball(norm, 0.02 if norm == 'linf' else 0.1)
    objective = classifier_objective(lambda x: jax.lax.stop_gradient(_linear(x)), LABEL, 'margin')
    found = jax.jit(lambda b=ball, o=objective: square(o, X, b, INDEX, 1500))()
    start = np.asarray(cw_margin(_linear(X), LABEL))
    gain = (np.asarray(cw_margin(_linear(found.x), LABEL)) - start) / (_optimum(norm, ball.radius) - start)
    assert gain.min() > share, (norm, gain)
    assert gain.max() <= 1 + 1e-4


@pytest.mark.parametrize(
  ('name', 'norm'),
  [
    ('pgd', 'linf'),
    ('pgd', 'l2'),
    ('apgd', 'l2'),
    ('square', 'linf'),
    pytest.param('apgd', 'linf', marks=pytest.mark.slow),
    pytest.param('square', 'l2', marks=pytest.mark.slow),
  ],
)
def test_what_every_attack_keeps_to(name: str, norm: str) -> None:
  """The ball, the range, never worse than the clean image, more steps no worse, no batch mates."""
  ball = Ball(norm, 0.4 if norm == 'linf' else 1.0)  # reaches beyond [0, 1]
  attack = {'pgd': pgd, 'apgd': apgd, 'square': square}[name]

  @partial(jax.jit, static_argnums=3)
  def attacked(x, label, index, steps):
    return attack(
      classifier_objective(_curved, label, 'margin'), x, ball, index, 10 * steps if name == 'square' else steps
    )

  found = [attacked(X, CURVED_LABEL, INDEX, steps) for steps in ((2, 40) if norm == 'linf' else (4,))]
  clean = np.asarray(cw_margin(_curved(X), CURVED_LABEL))
  for each in found:
    assert (distance(each.x, X, norm) <= ball.radius + 1e-5).all()
    assert float(each.x.min()) >= 0
    assert float(each.x.max()) <= 1
    np.testing.assert_allclose(each.loss_B, cw_margin(_curved(each.x), CURVED_LABEL), atol=1e-5)
    assert (np.asarray(each.loss_B) >= clean - 1e-6).all()
  assert float(found[-1].loss_B.mean()) >= float(found[0].loss_B.mean())
  order = RNG.permutation(B)
  again = attacked(X[order], CURVED_LABEL[order], INDEX[order], 2 if norm == 'linf' else 4)
  np.testing.assert_allclose(again.x, found[0].x[order], atol=1e-5)


def test_targeted_reaches_what_untargeted_does() -> None:
  ball = Ball('linf', 0.1)
  plain = jax.jit(lambda: apgd(classifier_objective(_curved, CURVED_LABEL, 'dlr'), X, ball, INDEX, 20))()
  found = jax.jit(lambda: apgd_targeted(_curved, X, CURVED_LABEL, ball, INDEX, 20, 4))()
  assert int(found.fooled_B.sum()) >= int(plain.fooled_B.sum())
  np.testing.assert_array_equal(found.fooled_B, jnp.argmax(_curved(found.x), -1) != CURVED_LABEL)
  targets = np.asarray(runners_up(_curved(X), CURVED_LABEL, 4))
  for b in range(B):
    assert sorted([*targets[:, b], int(CURVED_LABEL[b])]) == list(range(5))


def test_losses_by_hand() -> None:
  logits = jnp.asarray([[3.0, 1.0, 0.0, -1.0], [0.0, 2.0, 1.0, -2.0]])
  label = jnp.asarray([0, 2])
  np.testing.assert_allclose(cw_margin(logits, label), [-2, 1])
  np.testing.assert_allclose(dlr(logits, label), [-2 / 3, 1 / 2])
  np.testing.assert_allclose(dlr_targeted(logits, label, jnp.asarray([1, 0])), [-2 / 3.5, -1 / 3], rtol=1e-6)
  np.testing.assert_array_equal(fooled(logits, label), [False, True])
  assert bool(fooled(jnp.asarray([[jnp.nan, 1.0, 0.0]]), jnp.asarray([1]))[0])
  np.testing.assert_array_equal(fooled(jnp.asarray([[1.0, 1.0]]), jnp.asarray([0])), [True])
  np.testing.assert_allclose(dlr(5 * logits, label), dlr(logits, label), rtol=1e-6)


def test_the_fooling_point_wins_then_the_higher_loss() -> None:
  x = jnp.zeros((4, 1))
  first = Attacked(x, jnp.asarray([5.0, 1.0, 1.0, jnp.nan]), jnp.asarray([False, True, True, False]))
  second = Attacked(x + 1, jnp.asarray([0.0, 9.0, 2.0, 0.0]), jnp.asarray([True, False, True, False]))
  np.testing.assert_array_equal(better(first, second).x[:, 0], [1, 0, 1, 1])


def test_schedules_are_the_papers() -> None:
  assert checkpoints(100).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
  sides = side_schedule(10_000, 0.8, 32, 1)
  # 0.8 of the image first, half of it from the 11th query on, a 512th at the end.
  assert (sides[0], sides[11], sides[-1]) == (29, 20, 1)
  assert (np.diff(sides) <= 0).all()
  assert (side_schedule(100, 0.3, 32, 3) % 2 == 1).all()


# A defence that can be worked out: the task's optimum is at 0.5, and the repair moves each pixel towards it.
TERM = LossTerm('middle', lambda x, seed_B: jnp.sum(jnp.square(x - 0.5), axis=(1, 2, 3)))
REPAIR = RepairConfig(Ball('linf', 0.05), steps=2, step_size=0.02, random_start=False)


def test_bpda_has_the_defended_value_and_the_plain_gradient() -> None:
  defence, seeds = adaptive.repair_defence((TERM,), REPAIR), INDEX.astype(jnp.uint32)
  objective = adaptive.bpda(_curved, defence, CURVED_LABEL)
  moved = jax.jit(defence)(X, seeds)
  np.testing.assert_allclose(moved, X + jnp.clip(0.02 * 2 * jnp.sign(0.5 - X), -0.05, 0.05), atol=0.04)
  np.testing.assert_allclose(jax.jit(objective)(X, seeds)[0], cw_margin(_curved(moved), CURVED_LABEL), rtol=1e-5)
  total = lambda f: jax.jit(jax.grad(lambda x: jnp.sum(f(x))))
  np.testing.assert_allclose(
    total(lambda x: objective(x, seeds)[0])(X), total(lambda x: cw_margin(_curved(x), CURVED_LABEL))(moved), atol=1e-5
  )


def test_unrolled_gradient_sees_the_repair() -> None:
  """With an l_2 repair, whose steps are smooth, the gradient is that of finite differences; BPDA's is not."""
  config = RepairConfig(Ball('l2', 1.0), steps=2, step_size=0.3, random_start=False)
  seeds = INDEX.astype(jnp.uint32)
  direction = jnp.asarray(np.random.default_rng(7).normal(size=X.shape), jnp.float32)
  # Cross entropy: the margin's largest logit may change on the way.
  value = jax.jit(lambda x: jnp.sum(adaptive.unrolled(_curved, (TERM,), config, CURVED_LABEL, 'ce')(x, seeds)[0]))
  true = float(value(X + 3e-3 * direction) - value(X - 3e-3 * direction)) / 6e-3
  slope = float(jnp.sum(jax.jit(jax.grad(value))(X) * direction))
  assert slope == pytest.approx(true, rel=0.02)
  through = adaptive.bpda(_curved, adaptive.repair_defence((TERM,), config), CURVED_LABEL, 'ce')
  substitute = float(jnp.sum(jax.jit(jax.grad(lambda x: jnp.sum(through(x, seeds)[0])))(X) * direction))
  assert abs(substitute - true) > 0.05 * abs(true)


def test_expectation_is_the_mean_of_independent_draws() -> None:
  noise = adaptive.noise_defence(RepairConfig(Ball('linf', 0.2)))
  objective = jax.jit(adaptive.defended_objective(_curved, noise, CURVED_LABEL))
  seeds = INDEX.astype(jnp.uint32)
  one, many = objective(X, seeds)[0], jax.jit(lambda: adaptive.averaged(objective, 400)(X, seeds)[0])()
  spread = jnp.std(jnp.stack([objective(X, seeds + 1000 * i)[0] for i in range(1, 20)]), axis=0)
  plain = jax.jit(adaptive.averaged(classifier_objective(_curved, CURVED_LABEL, 'margin'), 3))(X, seeds)[0]
  np.testing.assert_allclose(plain, cw_margin(_curved(X), CURVED_LABEL), rtol=1e-5)
  assert float(jnp.mean(jnp.abs(many - plain))) < float(jnp.mean(spread))
  assert not np.allclose(one, many, atol=1e-4)


def test_a_draw_is_defended_once_for_values_and_gradient() -> None:
  calls = []

  def defence(x, seed_B):
    count = lambda x, _: calls.append(None) or np.asarray(x)  # noqa: E731
    return jax.pure_callback(count, jax.ShapeDtypeStruct(x.shape, x.dtype), x, seed_B)

  objective = adaptive.averaged(adaptive.bpda(_curved, defence, CURVED_LABEL), 3)
  plain = adaptive.averaged(classifier_objective(_curved, CURVED_LABEL, 'margin'), 3)
  found, expected = (jax.jit(lambda o=o: evaluated(o, X, INDEX.astype(jnp.uint32)))() for o in (objective, plain))
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)
  assert len(calls) == 3


def test_an_ascent_begins_where_it_is_told_and_gives_its_end() -> None:
  ball, start = Ball('linf', 0.1), X + 0.05
  objective = classifier_objective(_curved, CURVED_LABEL, 'margin')
  run = jax.jit(lambda steps, start: ascend(objective, X, ball, INDEX, steps, start=start), static_argnums=0)
  found = run(0, start)
  np.testing.assert_array_equal(found.end, start)
  assert bool(
    jnp.all(objective(found.best.x, INDEX)[0] >= jnp.maximum(objective(X, INDEX)[0], objective(start, INDEX)[0]) - 1e-6)
  )
  longer = run(20, start)
  assert float(jnp.max(jnp.abs(longer.end - X))) <= 0.1 + 1e-6
  assert float(jnp.mean(objective(longer.end, INDEX)[0])) > float(jnp.mean(objective(start, INDEX)[0]))


def test_task_aware_attack_pays_for_the_tasks() -> None:
  ball = Ball('linf', 0.1)

  @jax.jit
  def content(strength):
    objective = adaptive.task_aware(_curved, (TERM,), CURVED_LABEL, strength)
    unfooled = lambda x, s: (objective(x, s)[0], jnp.zeros(B, bool))  # by the loss alone
    return jnp.mean(TERM.loss(pgd(unfooled, X, ball, INDEX, 20).x, None))

  losses = [float(content(strength)) for strength in (0.0, 30.0)]
  assert losses[1] < losses[0]


def test_wrong_losses() -> None:
  with pytest.raises(UserError, match="attack loss 'hinge'"):
    classifier_objective(_linear, LABEL, 'hinge')
  with pytest.raises(UserError, match='without targets'):
    classifier_objective(_linear, LABEL, 'dlr-targeted')
