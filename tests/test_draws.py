"""Random numbers of single examples: strictly between 0 and 1, evenly spread, of the example alone."""

import jax.numpy as jnp
import numpy as np

from pinfm_jax.robustness.draws import example_seeds, normals, open_interval, uniforms


def test_no_bits_give_0_or_1_or_an_infinite_normal():
  bits = np.array([0, 1, 2**9, 2**31, 2**32 - 2**8, 2**32 - 1], np.uint32)  # the last two gave 1 with 24 bits
  values = np.asarray(open_interval(jnp.asarray(bits)), np.float64)
  np.testing.assert_allclose(values, (bits // 512 + 0.5) / 2**23, rtol=0, atol=0)
  assert values.min() > 0
  assert values.max() < 1
  assert np.isfinite(normals(example_seeds(jnp.arange(64), 0), (512,))).all()


def test_a_draw_of_the_highest_bits_is_finite():
  """Of this seed's numbers one has its 24 highest bits set: as a normal it was infinite, as a point of a ball NaN."""
  seed_B, shape = jnp.array([6320], jnp.uint32), (48, 64)
  assert uniforms(seed_B, shape).max() > 1 - 2**-22
  assert np.isfinite(normals(seed_B, shape)).all()


def test_uniforms_are_even_and_normals_are_normal():
  seed_B = example_seeds(jnp.arange(200), 3)
  drawn = np.asarray(uniforms(seed_B, (500,)))
  share, _ = np.histogram(drawn, bins=20, range=(0, 1), density=True)
  np.testing.assert_allclose(share, 1, atol=0.06)  # 5,000 a bin: a standard deviation of 0.014
  found = np.asarray(normals(seed_B, (500,)))
  assert abs(found.mean()) < 0.015
  assert abs(found.std() - 1) < 0.015


def test_an_example_draws_the_same_beside_others():
  together = uniforms(example_seeds(jnp.arange(8), 1), (3, 2))
  alone = uniforms(example_seeds(jnp.array([5]), 1), (3, 2))
  np.testing.assert_array_equal(alone[0], together[5])
