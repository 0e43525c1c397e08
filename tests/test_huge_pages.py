"""Huge pages: asked for once, in the same command, unless the user or the kernel says otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pinfm_jax.huge_pages import with_huge_pages

_CODE = """
import os, sys
from pathlib import Path
from pinfm_jax.huge_pages import with_huge_pages
with_huge_pages(Path(sys.argv[1]))
array = b'1' * (64 << 20)  # of malloc (NumPy asks for huge pages itself)
facts = dict(line.split()[:2] for line in Path('/proc/self/smaps_rollup').read_text().splitlines()[1:])
print(os.environ.get('GLIBC_TUNABLES', ''), int(facts['AnonHugePages:']) >= 32 << 10, *sys.argv[2:])
"""
_KERNEL = Path('/sys/kernel/mm/transparent_hugepage/enabled')


def _child(kernel, **tunables):
  environment = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'} | tunables
  command = [sys.executable, '-c', _CODE, str(kernel), 'one word', '--two']
  ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
  return ended.stdout.rstrip('\n')


def test_the_same_command_runs_with_huge_pages():
  if not _KERNEL.exists() or '[madvise]' not in _KERNEL.read_text():
    pytest.skip('this kernel gives huge pages to all or to none')
  assert _child(_KERNEL) == 'glibc.malloc.hugetlb=1 True one word --two'
  assert _child(_KERNEL, GLIBC_TUNABLES='glibc.malloc.hugetlb=0') == 'glibc.malloc.hugetlb=0 False one word --two'
  other = 'glibc.malloc.arena_max=2'
  assert _child(_KERNEL, GLIBC_TUNABLES=other) == f'{other}:glibc.malloc.hugetlb=1 True one word --two'


@pytest.mark.parametrize(('name', 'value'), [('executable', ''), ('orig_argv', ['python', '-', 'run'])])
def test_what_cannot_be_started_anew_is_left_alone(tmp_path, monkeypatch, name, value):
  kernel = tmp_path / 'enabled'
  kernel.write_text('always [madvise] never')
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  monkeypatch.setattr(os, 'execve', lambda *_: pytest.fail('started anew'))
  monkeypatch.setattr(sys, name, value)
  with_huge_pages(kernel)


@pytest.mark.parametrize('says', ['[always] madvise never', 'always madvise [never]', None])
def test_nothing_starts_anew_where_the_kernel_gives_none_or_all(tmp_path, monkeypatch, says):
  kernel = tmp_path / 'enabled'
  if says is not None:
    kernel.write_text(says)
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  monkeypatch.setattr(os, 'execve', lambda *_: pytest.fail('started anew'))
  with_huge_pages(kernel)
