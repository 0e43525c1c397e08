"""Candidate-id randomisation and item-age-dependent dropout: rates, independence, and the same bits on any mesh."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.config import ColdStartConfig
from pinfm_jax.model.cold_start import age_dropout, randomise_candidates
from pinfm_jax.model.hashing import fold_seed

USERS, CANDIDATES = 500, 40
PLACE = jnp.arange(USERS * CANDIDATES, dtype=jnp.int32).reshape(USERS, CANDIDATES)
ITEMS = jnp.stack([PLACE.astype(jnp.uint32) % 97, jnp.zeros_like(PLACE, jnp.uint32)], axis=-1)
CONFIG = ColdStartConfig(age_edges_hours=(168.0, 672.0), age_dropout=(0.7, 0.5))


def _replaced(step, share=0.1):
  return np.any(np.asarray(randomise_candidates(ITEMS, PLACE, fold_seed(0, step), share)) != np.asarray(ITEMS), axis=-1)


def _correlation(a, b):
  return np.corrcoef(np.ravel(a).astype(float), np.ravel(b).astype(float))[0, 1]


@pytest.mark.parametrize('share', [0.02, 0.1, 0.5])
def test_the_share_of_randomised_ids(share):
  count = np.mean([_replaced(step, share).mean() for step in range(5)])
  deviation = np.sqrt(share * (1 - share) / (5 * PLACE.size))
  assert abs(count - share) < 4 * deviation


def test_no_share_and_all():
  assert randomise_candidates(ITEMS, PLACE, fold_seed(0, 0), 0.0) is ITEMS
  assert _replaced(0, 1.0).all()


def test_a_candidate_is_replaced_independently_of_steps_and_neighbours():
  first = _replaced(0)
  bound = 4 / np.sqrt(PLACE.size)
  for step in (1, 2, 3, 4, 100):
    assert abs(_correlation(first, _replaced(step))) < bound
  assert abs(_correlation(first[:, 1:], first[:, :-1])) < bound
  assert abs(_correlation(first[1:], first[:-1])) < bound
  assert abs(_correlation(first, np.asarray(ITEMS)[..., 0])) < bound  # nor of the item


def test_runs_of_other_seeds_draw_independently():
  bound = 4 / np.sqrt(PLACE.size)
  for step in (0, 1, 5):
    other = randomise_candidates(ITEMS, PLACE, fold_seed(1, step), 0.1)
    assert abs(_correlation(_replaced(5), np.any(np.asarray(other != ITEMS), axis=-1))) < bound


def test_random_ids_are_64_fresh_random_bits():
  found = np.asarray(randomise_candidates(ITEMS, PLACE, fold_seed(0, 3), 1.0)).reshape(-1, 2)
  assert len(np.unique(found, axis=0)) == len(found)
  bits = (found[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
  assert np.all(np.abs(bits.mean(axis=0) - 0.5) < 5 * 0.5 / np.sqrt(len(found)))
  assert abs(_correlation(found[:, 0], found[:, 1])) < 4 / np.sqrt(len(found))
  again = np.asarray(randomise_candidates(ITEMS, PLACE, fold_seed(0, 4), 1.0)).reshape(-1, 2)
  assert not np.any(np.all(found == again, axis=1))


def test_untouched_ids_stay_as_they_are():
  found = np.asarray(randomise_candidates(ITEMS, PLACE, fold_seed(0, 3), 0.3))
  keep = ~_replaced(3, 0.3)
  np.testing.assert_array_equal(found[keep], np.asarray(ITEMS)[keep])


@pytest.mark.parametrize('parts', [2, 5])
def test_any_split_of_the_batch_draws_the_same(parts):
  step, outputs, age = fold_seed(0, 7), jnp.ones((USERS, CANDIDATES, 3)), jnp.full((USERS, CANDIDATES), 5.0)
  rows = np.split(np.arange(USERS), parts)
  whole = randomise_candidates(ITEMS, PLACE, step, 0.2)
  split = [randomise_candidates(ITEMS[r], PLACE[r], step, 0.2) for r in rows]
  np.testing.assert_array_equal(whole, np.concatenate(split))
  whole = age_dropout(outputs, age, PLACE, step, CONFIG)
  split = [age_dropout(outputs[r], age[r], PLACE[r], step, CONFIG) for r in rows]
  np.testing.assert_array_equal(whole, np.concatenate(split))


@pytest.mark.parametrize(
  ('age', 'rate'),
  [(0.0, 0.7), (167.9, 0.7), (168.0, 0.5), (671.0, 0.5), (672.0, 0.0), (1e6, 0.0), (np.nan, 0.0)],
)
def test_the_dropout_of_an_age(age, rate):
  width, outputs = 8, jnp.full((USERS, CANDIDATES, 8), 3.0)
  found = np.asarray(age_dropout(outputs, jnp.full((USERS, CANDIDATES), age), PLACE, fold_seed(0, 2), CONFIG))
  count = PLACE.size * width
  dropped = found == 0
  assert abs(dropped.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / count)
  np.testing.assert_allclose(found[~dropped], 3.0 / (1 - rate), rtol=1e-6)  # inverted: the mean stays
  assert abs(found.mean() - 3.0) <= 4 * 3.0 * np.sqrt(rate / (1 - rate) / count) + 1e-5


def test_ages_are_told_apart_within_a_request_and_the_order_of_the_edges_does_not_matter():
  age = jnp.tile(jnp.array([10.0, 300.0, 900.0, jnp.nan]), (USERS, CANDIDATES // 4))
  outputs = jnp.ones((USERS, CANDIDATES, 4))
  found = np.asarray(age_dropout(outputs, age, PLACE, fold_seed(0, 2), CONFIG))
  rates = [(found[:, place::4] == 0).mean() for place in range(4)]
  np.testing.assert_allclose(rates, [0.7, 0.5, 0.0, 0.0], atol=0.02)
  turned = ColdStartConfig(age_edges_hours=(672.0, 168.0), age_dropout=(0.5, 0.7))
  np.testing.assert_array_equal(found, age_dropout(outputs, age, PLACE, fold_seed(0, 2), turned))


def test_elements_are_dropped_independently():
  outputs, age = jnp.ones((USERS, CANDIDATES, 6)), jnp.zeros((USERS, CANDIDATES))
  found = np.asarray(age_dropout(outputs, age, PLACE, fold_seed(0, 2), CONFIG)) == 0
  bound = 4 / np.sqrt(PLACE.size)
  assert abs(_correlation(found[..., 0], found[..., 1])) < bound
  assert abs(_correlation(found[:, 1:, 0], found[:, :-1, -1])) < bound
  again = np.asarray(age_dropout(outputs, age, PLACE, fold_seed(0, 3), CONFIG)) == 0
  assert abs(_correlation(found, again)) < 4 / np.sqrt(found.size)
  assert abs(_correlation(found[..., 0], _replaced(2))) < bound  # nor is it the ids' randomisation again


def test_whole_vectors_are_dropped_together():
  outputs, ages = jnp.ones((40, 50, 6)), jnp.full((40, 50), 10.0)
  places, config = jnp.arange(2000).reshape(40, 50), replace(CONFIG, whole_vector=True)
  found = np.asarray(age_dropout(outputs, ages, places, fold_seed(7, 1), config))
  assert np.all(found == found[..., :1])
  np.testing.assert_allclose(found[found > 0], 1 / 0.3, rtol=1e-6)
  assert abs(np.mean(found[..., 0] == 0) - 0.7) < 4 * np.sqrt(0.7 * 0.3 / 2000)


def test_as_many_rates_as_edges():
  with pytest.raises(ValueError, match='zip'):
    age_dropout(
      jnp.ones((1, 1, 1)), jnp.ones((1, 1)), PLACE[:1, :1], fold_seed(0, 0), ColdStartConfig(age_dropout=(0.1,))
    )
