"""Huge pages for the large arrays of training on a CPU."""

import os
import sys
from pathlib import Path

_TUNABLE = 'glibc.malloc.hugetlb'
_KERNEL = Path('/sys/kernel/mm/transparent_hugepage/enabled')


def with_huge_pages(kernel: Path = _KERNEL) -> None:
  """Starts this command anew with huge pages for large arrays, where Linux gives them to those who ask.

  On a CPU, XLA takes a step's temporary arrays from malloc and gives them back at its end, so the kernel hands out and
  clears the same memory in every step: with pages of 4 KiB that was a third of a step's time. malloc reads
  `GLIBC_TUNABLES` at the start of a process alone, hence the new start (same process id, same command line). A value
  that already names `glibc.malloc.hugetlb` is left as it is: 0 keeps the ordinary pages.

  Args:
    kernel: the file that says who gets huge pages; nothing is done where it cannot be read or does not say `[madvise]`.
  """
  tunables = os.environ.get('GLIBC_TUNABLES', '')
  try:
    given = kernel.read_text()
  except OSError:  # no Linux, or a sandbox that hides it
    return
  if _TUNABLE in tunables or '[madvise]' not in given:
    return
  if not sys.executable or '-' in sys.orig_argv[1:2]:  # nobody knows what runs this, or its code was read from a pipe
    return
  asked = ':'.join(filter(None, (tunables, f'{_TUNABLE}=1')))
  os.execve(sys.executable, sys.orig_argv, os.environ | {'GLIBC_TUNABLES': asked})
