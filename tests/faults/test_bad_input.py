"""Bad input on the command line: exit code 2, one clear line, nothing half-written."""

import json
import shutil
from dataclasses import replace

import pytest

from pinfm_jax.cli import main


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
  """A bundle of the toy ranker without PinFM (quick to export)."""
  from toy_bundle import make_toy

  return make_toy('none').export(tmp_path_factory.mktemp('bundle') / 'bundle')


@pytest.fixture
def fails(tmp_path, capsys, monkeypatch):
  """Runs a command that must fail: returns the one line, and checks that no file appeared or changed."""
  monkeypatch.chdir(tmp_path)

  def run(*words, new=()):
    before = _files(tmp_path)
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith('pinfm: error: ')]
    assert len(errors) == 1, lines
    assert lines[-1] == errors[0]
    assert all(' in ' in line or '%' in line for line in lines[:-1]), lines  # progress lines
    after = _files(tmp_path)
    assert {name for name in after if name not in before} == set(new)
    assert {name: after.get(name) for name in before} == before
    return errors[0]

  return run


def _files(path):
  return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob('*') if p.is_file()}


@pytest.fixture
def launch(tmp_path):
  path = tmp_path / 'launch.py'
  path.write_text('from toy import EXPERIMENT as experiment\n')
  return path


LOG = 'user_id,timestamp,item_id,surface,actions\n1,1700000000,5,feed,click\n1,1700000100,6,feed,save\n'
REQUEST = {'request_id': 'r', 'timestamp': 1_700_000_000_000, 'history': [], 'candidates': [{'item_id': 'item/1'}]}


@pytest.mark.parametrize(
  ('words', 'expected'),
  [
    (['run', 'nothing.py'], ('nothing.py does not exist', 'give a launch file')),
    (['prepare', 'nothing.csv', '--out', 'data'], ('nothing.csv',)),
    (['prepare', '--source', 'kuairand', 'nowhere', '--out', 'data'], ('nowhere',)),
    (['prepare', '--source', 'kuairant', '.', '--out', 'data'], ('kuairant', 'kuairand')),
    (
      ['prepare', '--source', 'kuairand', '.', '--out', 'data', '--cap', '5', '--option', 'cap=6'],
      ('--option cap and --cap are the same setting',),
    ),
    (['score', 'nothing', 'requests.jsonl', '--out', 'scores.jsonl'], ('requests.jsonl', 'no such file')),
    (['download', 'movielens-2m'], ('movielens-2m', 'movielens-1m')),
    (['export', 'nothing', '--out', 'bundle'], ('nothing holds no run', '--workdir')),
    (['report', 'nothing'], ('nothing', 'no such directory')),
  ],
  ids=lambda value: ' '.join(value[:2]) if isinstance(value, list) else '',
)
def test_something_missing(fails, words, expected):
  line = fails(*words)
  assert all(part in line for part in expected), line


def test_a_directory_that_is_no_run(fails, tmp_path):
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'notes.txt').write_text('mine')
  assert 'holds no run' in fails('export', 'other', '--out', 'bundle')
  assert 'experiment.json' in fails('report', 'other')


def test_an_unfinished_run_is_not_exported(fails, tmp_path, toy_run):
  from pinfm_jax.overrides import to_dict

  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'experiment.json').write_text(json.dumps(to_dict(toy_run.experiment)))
  line = fails('export', 'run', '--out', 'bundle')
  assert 'run the finetune stage first' in line
  assert 'expected one of: without PinFM, with PinFM' in fails('export', 'run', '--out', 'bundle', '--arm', 'x')
  towers = replace(toy_run.experiment, arms=())
  (tmp_path / 'run' / 'experiment.json').write_text(json.dumps(to_dict(towers)))
  (tmp_path / 'run' / 'data').symlink_to(toy_run.workdir / 'data')
  assert 'run the pretrain stage first' in fails('export', 'run', '--out', 'bundle')
  assert not (tmp_path / 'run' / 'seed0').exists()
  assert 'has no rankers' in fails('export', 'run', '--out', 'bundle', '--arm', 'x')
  line = fails('import-tables', 'v.npy', '--experiment', 'run', '--out', 'tables', '--set', 'model.tables.rows=0')
  assert 'model.tables.rows' in line
  assert 'v.npy' not in line  # the settings are checked before any vector is read
  (tmp_path / 'run' / 'experiment.json').write_text('{"name": ')
  assert 'is not valid JSON' in fails('export', 'run', '--out', 'bundle')


def test_a_wrong_column(fails, tmp_path):
  (tmp_path / 'log.csv').write_text(LOG.replace('item_id', 'item'))
  line = fails('prepare', 'log.csv', '--out', 'data')
  assert 'item_id' in line
  assert 'item' in line
  (tmp_path / 'log.csv').write_text(LOG.replace('user_id', 'member'))
  line = fails('prepare', 'log.csv', '--out', 'data', '--columns', 'user_id=membr')
  assert 'membr' in line
  assert 'member' in line  # the nearest that the file has
  line = fails('prepare', 'log.csv', '--out', 'data', '--columns', 'usr_id=member')
  assert 'usr_id' in line
  assert 'user_id' in line


@pytest.mark.parametrize('text', ['', LOG.splitlines()[0] + '\n'], ids=['no bytes', 'no rows'])
def test_an_empty_log(fails, tmp_path, text):
  (tmp_path / 'log.csv').write_text(text)
  line = fails('prepare', 'log.csv', '--out', 'data')
  assert 'log.csv' in line or 'no events' in line


def test_a_log_that_is_no_log(fails, tmp_path):
  (tmp_path / 'log.parquet').write_bytes(b'PAR1 but not really')
  assert 'log.parquet' in fails('prepare', 'log.parquet', '--out', 'data')
  (tmp_path / 'log.csv.gz').write_bytes(b'not gzip')
  assert 'log.csv.gz' in fails('prepare', 'log.csv.gz', '--out', 'data')
  (tmp_path / 'log.csv').write_text(LOG + ''.join('1,yesterday,5,feed,click\n' for _ in range(9)))
  line = fails('prepare', 'log.csv', '--out', 'data', new=['data.rejected.jsonl'])
  assert 'of 11 rows of the events are malformed' in line
  assert 'data.rejected.jsonl' in line  # kept on purpose: it says what is wrong with each row


def test_the_output_is_not_overwritten_unasked(fails, tmp_path):
  (tmp_path / 'log.csv').write_text(LOG)
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'thesis.txt').write_text('years of work')
  assert 'exists already' in fails('prepare', 'log.csv', '--out', 'data')
  assert 'not replaced' in fails('prepare', 'log.csv', '--out', 'data', '--overwrite')


@pytest.mark.parametrize('damage', ['truncate', 'remove', 'flip'])
def test_a_damaged_shard_of_a_prepared_data_set(fails, tmp_path, launch, toy_run, damage):
  shutil.copytree(toy_run.workdir / 'data', tmp_path / 'data')
  (shard,) = (tmp_path / 'data').glob('histories-*')
  content = shard.read_bytes()
  if damage == 'truncate':
    shard.write_bytes(content[: len(content) // 2])
  elif damage == 'remove':
    shard.unlink()
  else:
    half = len(content) // 2
    shard.write_bytes(content[:half] + bytes(b ^ 0xFF for b in content[half : half + 64]) + content[half + 64 :])
  settings = ('data.source=prepared', f'data.path={tmp_path / "data"}')
  new = ['work/experiment.json']
  if damage == 'flip':  # its size is right: found when it is read
    new += ['work/seed0/pretrain/settings.json']
  line = fails('run', launch, '--workdir', 'work', '--set', *settings, new=_Allowed(tmp_path, new))
  assert shard.name in line
  assert 'prepare the data set again' in line


class _Allowed:
  """Stands for any subset of some files."""

  def __init__(self, root, names):
    self._root, self._names = root, names

  def __iter__(self):
    return iter([name for name in self._names if (self._root / name).exists()])


def test_a_prepared_data_set_that_is_not_there(fails, launch):
  new = ['work/experiment.json']
  line = fails('run', launch, '--workdir', 'work', '--set', 'data.source=prepared', 'data.path=nowhere', new=new)
  assert 'nowhere is not a prepared data set' in line


def test_a_public_source_without_a_path_can_be_mended(fails, launch, tmp_path):
  """The first try lacks the path; the second must not be refused for differing from the first."""
  command = ('run', launch, '--workdir', 'work', '--stages', 'prepare', '--set', 'data.source=kuairand')
  line = fails(*command, new=['work/experiment.json', 'work/prepare/settings.json'])
  assert 'data.path is empty; set it' in line
  assert main([str(w) for w in command[:-1]] + ['data.source=simulator', 'data.simulator.users=20']) == 0
  assert (tmp_path / 'work' / 'data' / 'dataset.json').exists()


def test_unknown_settings(fails, launch):
  line = fails('run', launch, '--set', 'pretrain.stepz=3')
  assert "unknown setting 'pretrain.stepz'" in line
  assert "nearest is 'steps'" in line
  assert "got 'pretrain.steps'; expected KEY=VALUE" in fails('run', launch, '--set', 'pretrain.steps')
  assert "'pretrain.steps' got 'many'; expected a value of type int" in fails(
    'run', launch, '--set', 'pretrain.steps=many'
  )


def test_an_unknown_stage(fails, launch):
  line = fails('run', launch, '--stages', 'prepare,finetun', '--workdir', 'work')
  assert "unknown stage 'finetun'; expected some of prepare,pretrain,finetune" in line


def test_a_stage_before_its_time(fails, launch, tmp_path, toy_run):
  shutil.copytree(toy_run.workdir, tmp_path / 'work')
  before = ['work/experiment.json', 'work/prepare/settings.json']
  new = [name for name in before if not (tmp_path / name).exists()]
  line = fails('run', launch, '--workdir', 'work', '--stages', 'evaluate', new=new)
  assert 'has no predictions yet; run the finetune stage first' in line


def test_a_flipped_byte_in_any_file_of_a_bundle(fails, bundle, tmp_path):
  (tmp_path / 'requests.jsonl').write_text(json.dumps(REQUEST) + '\n')
  files = [p.relative_to(bundle) for p in sorted(bundle.rglob('*')) if p.is_file()]
  assert len(files) >= 3
  for name in files:
    shutil.copytree(bundle, tmp_path / 'damaged')
    content = bytearray((tmp_path / 'damaged' / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / 'damaged' / name).write_bytes(content)
    line = fails('score', 'damaged', 'requests.jsonl', '--out', 'scores.jsonl')
    assert str(name) in line
    assert 'damaged' in line
    assert 'export it again' in line
    shutil.rmtree(tmp_path / 'damaged')


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('{"request_id": "r", ', ('not valid JSON',)),
    ('[]', ('request',)),
    ('{"request_id": "r", "history": []}', ('candidates',)),
    ('{"request_id": "r", "history": [], "candidate": []}', ('candidate', 'candidates')),
    ('{"request_id": "r", "history": [], "candidates": [{"item_id": 5}]}', ('candidate 0', '5')),
    (
      '{"request_id": "r", "history": [{"item_id": "a", "surface": "feed", "actions": ["clik"]}], "candidates": []}',
      ('clik', 'click'),
    ),
    ('{"request_id": "r", "history": [], "candidates": [{"item_id": "a", "price": "dear"}]}', ('price', 'dear')),
  ],
)
def test_a_malformed_request(fails, bundle, tmp_path, text, expected):
  (tmp_path / 'requests.jsonl').write_text(json.dumps(REQUEST) + '\n\n' + text + '\n')
  line = fails('score', bundle, 'requests.jsonl', '--out', 'scores.jsonl')
  assert 'requests.jsonl, line 3' in line
  assert all(part in line for part in expected), line


def test_earlier_scores_survive_a_failed_run(fails, bundle, tmp_path):
  (tmp_path / 'requests.jsonl').write_text('{')
  (tmp_path / 'scores.jsonl').write_text('yesterday\n')
  fails('score', bundle, 'requests.jsonl', '--out', 'scores.jsonl')
  assert (tmp_path / 'scores.jsonl').read_text() == 'yesterday\n'


def test_places_that_cannot_be_written(fails, bundle, tmp_path):
  (tmp_path / 'requests.jsonl').write_text(json.dumps(REQUEST) + '\n')
  assert 'cannot be written' in fails('score', bundle, 'requests.jsonl', '--out', 'no/such/scores.jsonl')
  assert 'give another --out' in fails('score', bundle, 'requests.jsonl', '--out', 'requests.jsonl')
  assert 'is not a bundle' in fails('score', tmp_path, 'requests.jsonl', '--out', 'scores.jsonl')


def test_a_workdir_that_is_a_file(fails, launch, tmp_path):
  (tmp_path / 'work').write_text('a file')
  assert 'work' in fails('run', launch, '--workdir', 'work')
