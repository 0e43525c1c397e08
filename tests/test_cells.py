"""Cells of an evaluation appear whole, and only with finite values."""

import numpy as np
import pytest

from pinfm_jax.errors import UserError
from pinfm_jax.robustness.cells import save_cell


def test_a_cell_is_kept_whole(tmp_path):
  save_cell(tmp_path / 'a' / 'cell.npz', correct=np.array([True, False]), loss=np.array([1.0, 2.0]))
  np.testing.assert_array_equal(np.load(tmp_path / 'a' / 'cell.npz')['loss'], [1.0, 2.0])
  assert [path.name for path in (tmp_path / 'a').iterdir()] == ['cell.npz']


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_cell_that_is_not_finite_is_refused_and_leaves_nothing(tmp_path, value):
  with pytest.raises(UserError, match='loss is NaN or infinite'):
    save_cell(tmp_path / 'cell.npz', correct=np.array([True]), loss=np.array([value]))
  assert not list(tmp_path.iterdir())
