"""Files that appear whole: what stands at the name beforehand is replaced as a user expects, or not at all."""

import fcntl
import os
import threading

import pytest

from pinfm_jax.errors import UserError
from pinfm_jax.files import complete_directory, complete_file


def write(out, source):
  with complete_file(out, source) as partial:
    partial.write_text('new')


def fail(out, source):
  with complete_file(out, source) as partial:
    partial.write_text('half')
    raise ZeroDivisionError


def test_the_file_appears_at_the_end_or_not_at_all(tmp_path):
  out, source = tmp_path / 'out', tmp_path / 'source'
  write(out, source)
  assert out.read_text() == 'new'
  out.write_text('old')
  with pytest.raises(ZeroDivisionError):
    fail(out, source)
  assert out.read_text() == 'old'
  assert os.listdir(tmp_path) == ['out']


def test_a_link_stays_a_link(tmp_path):
  target, link = tmp_path / 'target', tmp_path / 'link'
  target.write_text('old')
  link.symlink_to(target)
  write(link, tmp_path / 'source')
  assert link.is_symlink()
  assert target.read_text() == 'new'


def test_what_is_no_plain_file_is_written_to(tmp_path):
  pipe, read = tmp_path / 'pipe', []
  os.mkfifo(pipe)
  reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
  reader.start()
  write(pipe, tmp_path / 'source')
  reader.join(10)
  assert read == ['new']
  assert pipe.is_fifo()


def test_the_input_and_directories_are_no_outputs(tmp_path):
  source = tmp_path / 'source'
  source.write_text('kept')
  for out, message in (
    (source, 'holds the input'),
    (tmp_path, 'a directory that exists'),
    (tmp_path / 'a' / 'b', 'exists'),
  ):
    with pytest.raises(UserError, match=message):
      write(out, source)
  assert source.read_text() == 'kept'


def make(out, overwrite=True):
  with complete_directory(out, overwrite) as directory:
    (directory / 'manifest.json').write_text('new')


def test_a_link_to_a_bundle_leads_to_the_new_one(tmp_path):
  make(tmp_path / 'old')
  (tmp_path / 'link').symlink_to(tmp_path / 'old')
  (tmp_path / 'old' / 'extra').write_text('')
  make(tmp_path / 'link')
  assert (tmp_path / 'link').is_symlink()
  assert sorted(os.listdir(tmp_path)) == ['link', 'old']
  assert os.listdir(tmp_path / 'old') == ['manifest.json']


def test_what_a_killed_process_left_is_put_right(tmp_path):
  out = tmp_path / 'a bundle [1]'
  make(out)
  for name in ('0123abcd', '4567abcd'):  # the second one is still at work
    (tmp_path / f'{out.name}.partial-{name}').mkdir()
  lock = os.open(tmp_path / f'{out.name}.partial-4567abcd', os.O_RDONLY)
  fcntl.flock(lock, fcntl.LOCK_EX)
  out.rename(tmp_path / f'{out.name}.partial-89ababcd.old')  # killed between its two renames
  with pytest.raises(UserError, match='exists already'):
    make(out, overwrite=False)
  os.close(lock)
  assert sorted(os.listdir(tmp_path)) == [out.name, f'{out.name}.partial-4567abcd']
  make(out)
  assert os.listdir(tmp_path) == [out.name]


def beside(out, others):
  """Makes `out` while something else happens."""
  with complete_directory(out, overwrite=False) as directory:
    others(directory)


def test_what_comes_meanwhile_is_not_replaced(tmp_path):
  out, seen = tmp_path / 'bundle', []

  def other(directory):
    make(out)
    seen.append(directory.exists())  # the other one saw that it is at work

  with pytest.raises(UserError, match='exists already'):
    beside(out, other)
  assert seen == [True]
  assert os.listdir(tmp_path) == ['bundle']


def test_what_a_living_process_moved_away_stays_there(tmp_path):
  out, seen = tmp_path / 'bundle', []

  def other(directory):
    moved = directory.with_name(f'{directory.name}.old')
    moved.mkdir()
    beside(out, lambda _: seen.extend([moved.exists(), out.exists()]))
    moved.rmdir()
    out.rmdir()

  beside(out, other)
  assert seen == [True, False]


def test_what_was_moved_away_comes_back_over_an_empty_directory(tmp_path):
  out = tmp_path / 'bundle'
  make(out)
  out.rename(tmp_path / 'bundle.partial-89ababcd.old')
  out.mkdir()
  with pytest.raises(UserError, match='exists already'):
    make(out, overwrite=False)
  assert os.listdir(out) == ['manifest.json']


def test_names_that_just_look_alike_stay(tmp_path):
  for name in ('bundle.partial-2023', 'bundle.partial-2023.old', 'bundle.partial-0123abcd.copy'):
    (tmp_path / name).mkdir()
  make(tmp_path / 'bundle')
  assert len(os.listdir(tmp_path)) == 4


def test_what_cannot_be_replaced_stays(tmp_path, monkeypatch):
  out = tmp_path / 'bundle'
  make(out)
  (out / 'extra').write_text('')
  rename = os.rename

  def broken(source, target):
    if '.partial-' in str(source) and not str(source).endswith('.old'):
      raise OSError('no')
    rename(source, target)

  monkeypatch.setattr(os, 'rename', broken)
  with pytest.raises(OSError, match='no'):
    make(out)
  assert os.listdir(tmp_path) == ['bundle']
  assert sorted(os.listdir(out)) == ['extra', 'manifest.json']
