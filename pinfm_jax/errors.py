"""The one exception that ends in a clear line instead of a traceback."""

import sys
from collections.abc import Callable

ERROR = 'pinfm: error: '  # begins the line on a user's mistake: a sweep looks for it in what its runs print


class UserError(Exception):
  """A mistake that the person at the keyboard can mend.

  The message says what was got, what was expected and what to do. The command line prints it as one line and exits
  with code 2; a library caller catches it like any exception.
  """


def exit_code(work: Callable[[], None]) -> int:
  """Runs the work of a script of its own; returns the exit code (0 good, 2 the user's mistake, 130 interrupted)."""
  try:
    work()
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('\ninterrupted; the same command goes on', file=sys.stderr)
    return 130
  return 0
