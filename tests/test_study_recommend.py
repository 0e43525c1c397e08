"""The recommendation: limits, the best mean, seed noise, the Pareto front, and what the command line gives."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pinfm_jax.errors import UserError
from pinfm_jax.study.recommend import (
  Limits,
  Measured,
  difference,
  pareto_front,
  parse_bytes,
  parse_numbers,
  parse_percent,
  recommend,
)

BASE = Measured('base', (0.700, 0.702, 0.701), 1.0, 1.0, 0.1)


def block(name, mean, memory=1.0, latency=1.0, share=0.1, spread=0.001):
  return Measured(name, (mean - spread, mean, mean + spread), memory, latency, share)


def test_the_best_mean_within_the_limits_is_recommended():
  blocks = [
    BASE, block('best', 0.75, latency=1.2), block('fits', 0.72, memory=1.05), block('large', 0.73, memory=1.06),
    block('beyond the device', 0.74, share=0.61), block('worse', 0.69),
  ]  # fmt: skip
  found = recommend(blocks, 'base', Limits(0.05, 0.0, 0.6))
  assert found.name == 'fits'
  assert set(found.excluded) == {'best', 'large', 'beyond the device'}
  assert found.excluded['best'] == ('latency +20.0 % of at most +0 %',)
  assert found.excluded['large'] == ('memory +6.0 % of at most +5 %',)
  assert found.excluded['beyond the device'] == ('61.0 % of the device of at most 60 %',)
  assert found.difference.value == pytest.approx(0.019)
  assert not found.difference.is_noise
  assert 'beyond seed noise' in found.text('save/auc', 'base')
  assert recommend(blocks, 'base', Limits(0.05, 0.2, 0.6)).name == 'best'


def test_a_block_exactly_at_the_limit_keeps_it():
  assert recommend([BASE, block('edge', 0.8, 1.05, 1.0, 0.6)], 'base', Limits()).name == 'edge'


def test_a_lower_logloss_is_better():
  blocks = [BASE, block('low', 0.6), block('high', 0.8)]
  assert recommend(blocks, 'base', Limits(), 'logloss').name == 'low'
  assert recommend(blocks, 'base', Limits(), 'auc').name == 'high'


def test_a_difference_within_seed_noise_is_said():
  found = recommend([BASE, block('luck', 0.7015, spread=0.01)], 'base', Limits())
  assert found.name == 'luck'
  assert found.difference.is_noise
  text = found.text('save/auc', 'base')
  assert 'within seed noise' in text
  assert 'These seeds do not show that it is better than base.' in text
  assert found.equals == ('base',)


def test_blocks_that_seeds_do_not_tell_apart_are_named_the_fastest_first():
  blocks = [BASE, block('a', 0.75), block('b', 0.7499, latency=0.9), block('c', 0.7498, latency=0.8), block('d', 0.72)]
  assert recommend(blocks, 'base', Limits()).equals == ('c', 'b')


def test_the_baseline_wins_ties_and_is_told_as_such():
  found = recommend([block('twin', 0.701), BASE], 'base', Limits())
  assert (found.name, found.difference) == ('base', None)
  assert 'It is the baseline' in found.text('save/auc', 'base')


def test_no_block_within_the_limits_is_no_recommendation():
  found = recommend([BASE, block('slow', 0.8, latency=2.0)], 'base', Limits(latency=-0.1))
  assert found.name == ''
  text = found.text('save/auc', 'base')
  assert 'Recommended: none' in text
  assert 'base: latency +0.0 % of at most -10 %' in text


def test_one_seed_says_nothing_of_noise():
  found = recommend([Measured('base', (0.7,), 1, 1, 0), Measured('one', (0.8,), 1, 1, 0)], 'base', Limits())
  assert found.name == 'one'
  assert math.isnan(found.difference.noise)
  assert found.difference.is_noise
  assert 'from one seed' in found.text('save/auc', 'base')


def test_an_undefined_metric_or_cost_is_left_out():
  blocks = [BASE, Measured('nan', (math.nan, 0.9), 1, 1, 0), Measured('unknown', (0.9, 0.9), math.nan, 1, 0)]
  found = recommend(blocks, 'base', Limits(), 'hit@3')
  assert found.name == 'base'
  assert found.excluded['nan'] == ('hit@3 is undefined',)
  assert 'unknown' in found.excluded
  with pytest.raises(ValueError, match="the baseline 'other' is not among the blocks"):
    recommend(blocks, 'other', Limits())


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 1000))
def test_the_noise_is_the_half_width_of_welchs_interval(n, m, seed):
  rng = np.random.default_rng(seed)
  a, b = rng.normal(0.7, 0.01, n), rng.normal(0.71, 0.002, m)
  found = difference(Measured('a', tuple(a), 1, 1, 0), Measured('b', tuple(b), 1, 1, 0))
  interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
  assert found.value == pytest.approx(a.mean() - b.mean(), abs=1e-12)
  assert found.noise == pytest.approx((interval.high - interval.low) / 2, rel=1e-9)


def test_equal_seeds_have_no_noise():
  found = difference(Measured('a', (0.7, 0.7), 1, 1, 0), Measured('b', (0.6, 0.6), 1, 1, 0))
  assert found.noise == 0
  assert not found.is_noise
  assert difference(BASE, BASE).is_noise  # a difference of 0 is none


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
def test_the_front_is_what_no_other_point_beats(points):
  named = {str(i): point for i, point in enumerate(points)}
  front = pareto_front(named)
  for name, (cost, quality) in named.items():
    beaten = any(c <= cost and q >= quality and (c < cost or q > quality) for c, q in points)
    assert (name in front) == (not beaten)
  for a, b in itertools.pairwise(front):
    assert named[a] <= named[b]


@pytest.mark.parametrize(
  ('text', 'signed', 'value'), [('+5%', True, 0.05), ('-10 %', True, -0.1), ('0%', True, 0.0), ('60%', False, 0.6)]
)
def test_percentages(text, signed, value):
  assert parse_percent(text, '--max-memory', signed) == pytest.approx(value)


@pytest.mark.parametrize(
  ('text', 'signed'), [('5', True), ('five%', True), ('+-5%', True), ('0%', False), ('+60%', False), ('101%', False)]
)
def test_wrong_percentages_are_refused(text, signed):
  with pytest.raises(UserError, match=r'--max-latency got .*; expected a (change such as \+5%|share such as 60%)'):
    parse_percent(text, '--max-latency', signed)


def test_sizes_and_numbers():
  assert parse_bytes('80GB', '--device-memory') == 80e9
  assert parse_bytes('1.5 GiB', '--device-memory') == 1.5 * 2**30
  assert parse_numbers('5,50', '--segments') == (5.0, 50.0)
  for text in ('80', '0GB', 'GB', '-1GB'):
    with pytest.raises(UserError, match='expected a size such as 80GB'):
      parse_bytes(text, '--device-memory')
  with pytest.raises(UserError, match='expected numbers with commas'):
    parse_numbers('5,x', '--segments')
