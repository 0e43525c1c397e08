"""The popularity correction against simulation, and the streaming sketch against exact counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.train.negatives import Columns, choose_columns
from pinfm_jax.train.popularity import DEPTH, Draws, empty_sketch, log_inclusion, sketch_frequency, update_sketch


def _columns(positives, share):
  return Columns(*[None] * 4, jnp.float32(positives), jnp.float32(share))


def _words(item):
  item = np.asarray(item)
  return jnp.asarray(np.stack([item, item * 0 + 7], axis=-1), jnp.uint32)


@pytest.mark.parametrize(('uniforms', 'share'), [(0, 1.0), (0, 0.3), (50, 0.3)])
def test_the_inclusion_probability_in_float64(uniforms, share):
  frequency = np.array([0.0, 1e-9, 1e-6, 1e-3, 0.2, 1.0])
  absent = 1 - share * (1 - (1 - frequency) ** 5000)
  expected = 1 - absent * (1 - 1 / 2000) ** uniforms
  found = np.exp(log_inclusion(jnp.asarray(frequency, jnp.float32), _columns(5000, share), Draws(uniforms, 2000)))
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-29)


def test_the_correction_makes_the_denominator_unbiased():
  """Over many batches, the corrected sum over the columns averages to the sum over the whole catalogue."""
  items, tokens, uniforms, most, batches = 40, 60, 6, 12, 3000
  rng = np.random.default_rng(0)
  frequency = rng.dirichlet(np.full(items, 0.7))
  score = rng.normal(size=items)

  @jax.jit
  def estimate(item, drawn, seed):
    of = jnp.concatenate([item, drawn])
    columns = choose_columns(
      jnp.stack([item, item * 0], -1), jnp.zeros(tokens, jnp.uint32), jnp.ones(tokens, bool),
      jnp.stack([drawn, drawn * 0], -1), most, seed,
    )  # fmt: skip
    k = of[columns.token_K]
    log_q = log_inclusion(jnp.asarray(frequency, jnp.float32)[k], columns, Draws(uniforms, items))
    corrected = jnp.sum(jnp.where(columns.valid_K, jnp.exp(jnp.asarray(score, jnp.float32)[k] - log_q), 0))
    return corrected, jnp.sum(jnp.where(columns.valid_K, jnp.exp(jnp.asarray(score, jnp.float32)[k]), 0))

  item = rng.choice(items, (batches, tokens), p=frequency).astype(np.uint32)
  drawn = rng.integers(0, items, (batches, uniforms), dtype=np.uint32)
  corrected, plain = (np.asarray(x) for x in jax.vmap(estimate)(item, drawn, jnp.arange(batches, dtype=jnp.uint32)))
  whole = np.exp(score).sum()
  error = corrected.std() / np.sqrt(batches)
  assert abs(corrected.mean() - whole) < 4 * error + 0.02 * whole  # the share varies a little from batch to batch
  assert plain.mean() < 0.8 * whole


def test_the_sketch_never_counts_too_little_and_little_too_much():
  rng = np.random.default_rng(0)
  items, width, decay, steps = 2000, 1024, 0.9, 12
  sketch, exact = empty_sketch(width), np.zeros(items)
  for _ in range(steps):
    item, positive = rng.zipf(1.3, 1500) % items, rng.random(1500) < 0.6
    sketch = update_sketch(sketch, _words(item), jnp.asarray(positive), decay)
    exact = exact * decay + np.bincount(item[positive], minlength=items)
  found = np.asarray(sketch_frequency(sketch, _words(np.arange(items)))) * float(sketch.total)
  np.testing.assert_allclose(sketch.total, exact.sum(), rtol=1e-5)
  assert np.all(found >= exact * (1 - 1e-5) - 1e-4)
  assert np.mean(found - exact) < np.e / width * exact.sum()
  popular = exact > 0.005 * exact.sum()
  np.testing.assert_allclose(found[popular], exact[popular], rtol=0.05)


def test_a_wide_sketch_is_exact_and_follows_drift():
  sketch = empty_sketch(1 << 16)
  for _ in range(50):
    sketch = update_sketch(sketch, _words([1, 1, 1, 2]), jnp.ones(4, bool), 0.8)
  np.testing.assert_allclose(sketch_frequency(sketch, _words([1, 2, 3])), [0.75, 0.25, 0], rtol=1e-5)
  for _ in range(50):
    sketch = update_sketch(sketch, _words([3, 3, 3, 2]), jnp.ones(4, bool), 0.8)
  np.testing.assert_allclose(sketch_frequency(sketch, _words([1, 2, 3])), [0, 0.25, 0.75], atol=1e-4)


def test_the_order_of_events_and_what_is_not_positive_do_not_matter():
  rng = np.random.default_rng(1)
  item, positive = rng.integers(0, 50, 300), rng.random(300) < 0.5
  order = rng.permutation(300)
  start = update_sketch(empty_sketch(16), _words(item[::-1]), jnp.asarray(positive), 0.9)
  found = [
    update_sketch(start, _words(i), jnp.asarray(p), 0.9)
    for i, p in ((item, positive), (item[order], positive[order]), (np.where(positive, item, 999), positive))
  ]
  for other in found[1:]:
    np.testing.assert_array_equal(found[0].counts_C, other.counts_C)
  assert found[0].counts_C.shape == (DEPTH * 16,)


def test_an_empty_sketch_knows_nothing():
  assert float(sketch_frequency(empty_sketch(8), _words([4]))[0]) == 0
  same = update_sketch(empty_sketch(8), _words([4, 4]), jnp.zeros(2, bool), 0.5)
  assert not np.any(same.counts_C)
