"""Metadata, README's commands, and what must not be in the tree."""

import configparser
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pinfm_jax

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup_cfg():
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  return parser


def readme_command():
  spec = importlib.util.spec_from_file_location('readme_command', ROOT / '.ci' / 'readme_command.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.command


def test_every_dependency_says_why():
  lines = (ROOT / 'setup.cfg').read_text().splitlines()
  found = 0
  for before, line in zip(lines, lines[1:], strict=False):
    if re.fullmatch(r'  [A-Za-z][\w.-]*(\[\w+\])?(>=|==|~=|<).*', line):
      found += 1
      assert re.fullmatch(r'  # \w.{10,}', before), f'{line.strip()}: got no comment above it; say why it is needed'
  assert found >= 12


def test_versions_agree(setup_cfg):
  assert setup_cfg['metadata']['version'] == 'attr: pinfm_jax.__version__'
  assert re.fullmatch(r'\d+\.\d+\.\d+', pinfm_jax.__version__)
  assert f'\nversion: {pinfm_jax.__version__}\n' in (ROOT / 'CITATION.cff').read_text()
  assert setup_cfg['options']['python_requires'] == '>=3.11'


def test_the_licence_is_apache_in_full(setup_cfg):
  assert setup_cfg['metadata']['license_expression'] == 'Apache-2.0'
  text = (ROOT / 'LICENSE').read_text()
  assert 'Apache License\n                           Version 2.0, January 2004' in text
  assert 'END OF TERMS AND CONDITIONS' in text


def test_the_console_script_points_at_a_function(setup_cfg):
  target = setup_cfg['options.entry_points']['console_scripts'].strip()
  assert target == 'pinfm = pinfm_jax.cli:command'
  pytest.importorskip('pinfm_jax.cli')
  from pinfm_jax.cli import main

  with pytest.raises(SystemExit, match='0'):
    main(['--help'])


def test_pyproject_holds_the_build_system_alone():
  assert list(tomllib.loads((ROOT / 'pyproject.toml').read_text())) == ['build-system']


def test_readme_command_takes_the_marked_block():
  text = 'x\n<!-- command: test -->\n```bash\na &&\nb\n```\n\n<!-- command: other -->\n\n```\nc\n```\n'
  assert readme_command()(text, 'test') == 'a &&\nb'
  assert readme_command()(text, 'other') == 'c'
  with pytest.raises(ValueError, match='got 0 blocks'):
    readme_command()(text, 'missing')
  with pytest.raises(ValueError, match='got 2 blocks'):
    readme_command()(text + text, 'test')


@pytest.mark.skipif(not (ROOT / 'README.md').exists(), reason='there is no README.md yet')
@pytest.mark.parametrize(('name', 'word'), [('test', 'pytest'), ('quickstart', 'pinfm run')])
def test_readme_has_the_two_commands(name, word):
  command = readme_command()((ROOT / 'README.md').read_text(), name)
  assert word in command
  assert 'venv' in command


def test_the_tree_names_no_machine():
  listing = subprocess.run(
    ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True
  )
  if listing.returncode:
    pytest.skip('not a git checkout')
  home = r'/(?:home|root|Users)/[A-Za-z]'
  registry = re.escape('pypi' + '.org') + '|' + re.escape('files.python' + 'hosted')
  secret = r'AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE ' + 'KEY'
  forbidden = re.compile(f'{home}|{registry}|{secret}'.encode())
  for name in filter(None, listing.stdout.decode().split('\0')):
    path = ROOT / name
    match = forbidden.search(path.read_bytes()) if path.is_file() else None
    assert not match, f'{name} holds {match[0]!r}'


def test_heavy_imports_wait_until_they_are_needed():
  """`pinfm --help` has to answer at once: the command line does not import jax or matplotlib by itself."""
  pytest.importorskip('pinfm_jax.cli')
  code = "import sys, pinfm_jax.cli; print([m for m in ('jax', 'matplotlib', 'polars') if m in sys.modules])"
  result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert result.stdout.strip() == '[]'
