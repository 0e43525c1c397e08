"""Examples kept on disk: they are those that the data set gives, and nothing else takes their place."""

from dataclasses import replace

import numpy as np
import pytest

from pinfm_jax.config import Arm
from pinfm_jax.data.kept_examples import KeptRequests, can_keep, keep_examples, kept_or_made
from pinfm_jax.data.pipeline import training_batches
from pinfm_jax.stages.context import KEPT, Run


@pytest.fixture
def alone(toy_run, tmp_path):
  """The run of a ranker without PinFM, in a workdir of its own."""
  data = replace(toy_run.experiment.data, source='prepared', path=str(toy_run.data_directory))
  run = Run(replace(toy_run.experiment, data=data), tmp_path)
  return run.of_arm(Arm('alone', {'ranker.sequence': 'none'}))


def test_kept_examples_are_those_that_are_made(alone, tmp_path):
  made = alone.requests('finetune')
  assert not isinstance(made, KeptRequests)
  (tmp_path / KEPT).mkdir()
  keep_examples(made, tmp_path / KEPT)
  kept = alone.requests('finetune')
  assert isinstance(kept, KeptRequests)
  assert len(kept) == len(made)
  for i in (0, 7, len(made) - 1):
    expected, found = made[i], kept[i]
    assert set(found) == set(expected)
    for name, value in expected.items():
      np.testing.assert_array_equal(found[name], value, err_msg=name)
      assert np.asarray(found[name]).dtype == np.asarray(value).dtype
  batches = [next(training_batches(source, 8, seed=3, first_step=2)) for source in (made, kept)]
  for name, value in batches[0].items():
    np.testing.assert_array_equal(batches[1][name], value, err_msg=name)


def test_examples_of_other_settings_or_another_part_are_made(alone, tmp_path):
  (tmp_path / KEPT).mkdir()
  keep_examples(alone.requests('finetune'), tmp_path / KEPT)
  assert not isinstance(alone.requests('validation'), KeptRequests)
  for overrides in ({'finetune.candidates': 4}, {'finetune.history_length': 6}, {'ranker.item_buckets': 32}):
    assert not isinstance(alone.of_arm(Arm('other', overrides)).requests('finetune'), KeptRequests)
  same = alone.of_arm(Arm('other', {'ranker.interaction': 'fm', 'finetune.update.learning_rate': 0.1}))
  assert isinstance(same.requests('finetune'), KeptRequests)


def test_what_was_not_kept_to_the_end_is_kept_again(alone, tmp_path):
  folder, requests = tmp_path / KEPT, alone.requests('validation')
  directory = keep_examples(requests, folder)
  (directory / 'results.json').unlink()  # as after a kill
  (directory / 'user.npy').write_bytes(b'half')
  assert kept_or_made(requests, folder) is requests
  assert keep_examples(requests, folder) == directory
  before = (directory / 'user.npy').stat().st_mtime_ns
  assert isinstance(kept_or_made(requests, folder), KeptRequests)
  keep_examples(requests, folder)
  assert (directory / 'user.npy').stat().st_mtime_ns == before


def test_rankers_with_a_sequence_module_make_their_own(alone):
  assert can_keep(alone.requests('finetune'))
  for overrides in ({'ranker.sequence': 'pinfm'}, {'ranker.transact.length': 4, 'ranker.transact.outputs': 2}):
    assert not can_keep(alone.of_arm(Arm('other', overrides)).requests('finetune'))
