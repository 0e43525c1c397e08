"""What command lines read alike."""

from argparse import ArgumentTypeError

import pytest

from pinfm_jax.arguments import first_seeds, folder_name, numbers, some
from pinfm_jax.errors import UserError


def test_lists_are_read_and_what_is_unknown_is_named():
  assert numbers('2,0,2') == (2, 0)  # the same seed twice would be the same work twice
  assert some({'a': 1, 'b': 2})('b,a') == ('b', 'a')
  with pytest.raises(ArgumentTypeError, match="got '1,x'; expected numbers"):
    numbers('1,x')
  with pytest.raises(ArgumentTypeError, match="got 'c'; expected some of a, b"):
    some(['a', 'b'])('a,c')


def test_counts_of_seeds_and_names_of_folders():
  assert first_seeds(3) == (0, 1, 2)
  with pytest.raises(UserError, match='--seeds is 0'):
    first_seeds(0)
  assert folder_name('ml1m') == 'ml1m'
  for name in ('', '.hidden', 'a/b'):
    with pytest.raises(UserError, match='expected the name of a folder'):
      folder_name(name)
