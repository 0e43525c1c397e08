"""The tile planner: every candidate in exactly one place, padding and sizes bounded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinfm_jax.model.tiles import WIDTHS, plan_tiles

COUNTS = st.one_of(
  st.lists(st.integers(0, 40), max_size=60),
  st.lists(st.integers(0, 20_000), max_size=8),
  st.lists(st.sampled_from([0, 1, 2, 3, 15, 16, 17, 64, 255, 1000]), max_size=40),
)


@settings(deadline=None, max_examples=300)
@given(COUNTS, st.sampled_from([WIDTHS, (1, 4, 16, 64), (1,), (1, 128)]), st.sampled_from([1024, 4096]))
def test_every_candidate_stands_once_and_padding_is_bounded(counts, widths, rows):
  groups = plan_tiles(counts, widths, rows)
  seen = [np.zeros(count, int) for count in counts]
  for group in groups:
    tiles = len(group.user_M)
    assert group.width in widths
    assert tiles & (tiles - 1) == 0
    assert group.width * tiles <= rows
    assert group.places.shape == group.mask.shape == (tiles, group.width)
    assert np.any(group.count_M > 0)
    for user, place_T, mask_T in zip(group.user_M, group.places, group.mask, strict=True):
      seen[user][place_T[mask_T]] += 1
      assert mask_T.any() or (user == 0 and not place_T.any())
  assert all(np.all(times == 1) for times in seen)
  assert 10 * sum(g.width * len(g.user_M) for g in groups) <= 13 * sum(counts)


@settings(deadline=None, max_examples=100)
@given(COUNTS)
def test_groups_are_few(counts):
  groups = plan_tiles(counts)
  # Full groups are as many as the candidates need; of the others at most four a width.
  assert len(groups) <= sum(counts) // 4096 + 4 * len(WIDTHS)


@pytest.mark.parametrize(
  ('counts', 'sizes'),
  [
    ([], []),
    ([0, 0], []),
    ([1000], [(1024, 1)]),
    ([13], [(16, 1)]),
    ([32] * 64, [(16, 128)]),
    ([3], [(1, 2), (1, 1)]),
    ([300], [(256, 1), (16, 4)]),
  ],
)
def test_plans_of_usual_counts(counts, sizes):
  assert [(g.width, len(g.user_M)) for g in plan_tiles(counts)] == sizes


@pytest.mark.parametrize(
  ('counts', 'widths', 'rows', 'message'),
  [
    ([3, -1], WIDTHS, 4096, 'counts hold -1'),
    ([3], (4, 16), 4096, 'begin with 1'),
    ([3], (1, 6), 4096, 'powers of two'),
    ([3], (1, 16, 4), 4096, 'ascending'),
    ([3], (), 4096, 'begin with 1'),
    ([3], WIDTHS, 512, 'at least the greatest width, 1024'),
    ([3], WIDTHS, 5000, 'powers of two'),
  ],
)
def test_wrong_arguments_are_refused(counts, widths, rows, message):
  with pytest.raises(ValueError, match=message):
    plan_tiles(counts, widths, rows)
