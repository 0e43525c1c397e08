"""Every epoch is a shuffle of its own, and the same one whoever asks, from wherever a run resumes."""

import itertools

import numpy as np
import pytest

from pinfm_jax.data.pipeline import training_batches


class _Numbers:
  def __init__(self, count):
    self._count = count

  def __len__(self):
    return self._count

  def __getitem__(self, index):
    return {'n': np.int64(index)}


def _order(examples, batch, steps, seed=3, first_step=0):
  batches = training_batches(_Numbers(examples), batch, seed, first_step)
  return np.concatenate([b['n'] for b in itertools.islice(batches, steps)])


@pytest.mark.parametrize('batch', [5, 6])  # 20 examples: whole batches an epoch, and batches across two epochs
def test_three_epochs_are_three_orders(batch):
  order = _order(20, batch, 60 // batch).reshape(3, 20)
  for epoch in order:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(20))
  assert not any(np.array_equal(a, b) for a, b in itertools.combinations(order, 2))
  np.testing.assert_array_equal(order.reshape(-1), _order(20, batch, 60 // batch))
  assert not np.array_equal(order[1], _order(20, batch, 60 // batch, seed=4).reshape(3, 20)[1])


def test_a_run_resumes_within_any_epoch():
  whole = _order(20, 6, 10).reshape(10, 6)
  for step in range(10):
    np.testing.assert_array_equal(_order(20, 6, 10 - step, first_step=step).reshape(-1, 6), whole[step:])
