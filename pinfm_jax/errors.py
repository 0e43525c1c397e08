"""The one exception that ends in a clear line instead of a traceback."""


class UserError(Exception):
  """A mistake that the person at the keyboard can mend.

  The message says what was got, what was expected and what to do. The command line prints it as one line and exits
  with code 2; a library caller catches it like any exception.
  """
