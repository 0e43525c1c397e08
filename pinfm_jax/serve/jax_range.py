"""Which JAX versions run the programs of a bundle."""

import re
from pathlib import Path

import jax

from pinfm_jax.errors import UserError
from pinfm_jax.serve.manifest import JaxRange

# An exported program is promised to run for 6 months of JAX releases, and a minor version takes two months or more.
_MINORS = 3


def exported_range(version: str) -> JaxRange:
  """The versions that run what this version exports."""
  major, minor = _numbers(version)[:2]
  return JaxRange(version, f'{major}.{minor}', f'{major}.{minor + _MINORS}')


def runs_here(known: JaxRange, version: str | None = None) -> bool:
  """Whether a JAX version (None = the one installed) runs a bundle's programs."""
  return _numbers(known.at_least) <= _numbers(version or jax.__version__) < _numbers(known.below)


def check_jax(path: Path, known: JaxRange, version: str) -> None:
  """Raises UserError unless a JAX version runs the programs of the bundle at `path`."""
  if not runs_here(known, version):
    raise UserError(
      f'{path} was exported with JAX {known.exported_with} and runs on JAX >= {known.at_least}, < {known.below}; '
      f'this is JAX {version}: install one of that range, or lower it again: '
      f'pinfm export {path} --refresh --out NEW'
    )


def _numbers(version: str) -> tuple[int, ...]:
  return tuple(int(part) for part in re.match(r'[0-9.]*[0-9]', version)[0].split('.'))
