"""Progress lines: the rate and the ETA are those of the work, not of the compilation before it."""

import pytest

from pinfm_jax import progress
from pinfm_jax.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
  """A clock that is set by hand: a list of one time."""
  now = [0.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  return now


@pytest.fixture
def lines(clock, capsys):
  """The lines that are printed of updates (time, done)."""
  return lambda total, *updates, start_at=0: _lines(clock, capsys, total, updates, start_at)


def _lines(clock, capsys, total, updates, start_at):
  shown = Progress('work', total, 'steps')
  shown.start_at(start_at)
  for at, done in updates:
    clock[0] = at
    shown.update(done)
  return capsys.readouterr().err.splitlines()


def test_the_rate_is_of_the_last_lines_and_a_log_has_one_every_ten_seconds(lines):
  assert lines(100, (5, 10), (10, 20), (15, 30), (20, 60), (30, 80)) == [
    'work   20 %  2 steps/s  ETA 0:40',
    'work   60 %  3 steps/s  ETA 0:13',
    'work   80 %  2.5 steps/s  ETA 8.0 s',
  ]


@pytest.mark.parametrize('start_at', [0, 500])
def test_a_compilation_is_no_measure_of_the_rest(lines, start_at):
  first, second = lines(1000, (50, start_at + 1), (60, start_at + 101), start_at=start_at)
  assert 'ETA' not in first
  assert '10 steps/s' in second
  assert f'ETA {duration((899 - start_at) / 10)}' in second


def test_work_of_unknown_size_has_no_eta(lines):
  assert lines(None, (10, 20), (20, 60)) == ['work  2 steps/s', 'work  3 steps/s']


def test_the_closing_line_leaves_out_what_was_done_before(clock, capsys):
  shown = Progress('work', 100, 'steps')
  shown.start_at(40)
  clock[0] = 4
  shown.update(60)
  assert shown.close('done') == 4
  assert capsys.readouterr().err == 'work: 60 steps in 4.0 s (5 steps/s)  done\n'


@pytest.mark.parametrize(('seconds', 'text'), [(4.24, '4.2 s'), (59.6, '1:00'), (600, '10:00'), (3661, '1:01:01')])
def test_durations(seconds, text):
  assert duration(seconds) == text
