"""Prints a command of README.md: the fenced block that follows `<!-- command: NAME -->`."""

import re
import sys
from pathlib import Path


def command(readme: str, name: str) -> str:
  """The text of the fenced block right after the marker of that name.

  Raises:
    ValueError: the marker is not there exactly once, or no fenced block follows it.
  """
  markers = re.findall(rf'<!-- command: {re.escape(name)} -->\s*\n```\w*\n(.*?)\n```', readme, re.DOTALL)
  if len(markers) != 1:
    raise ValueError(f'README.md: got {len(markers)} blocks marked "<!-- command: {name} -->"; expected one')
  return markers[0]


if __name__ == '__main__':
  readme = Path(__file__).resolve().parent.parent / 'README.md'
  try:
    print(command(readme.read_text(encoding='utf-8'), sys.argv[1]))
  except (OSError, ValueError) as error:
    sys.exit(f'readme_command: {error}')
