"""Runs as processes: order, what one that fails does to the others, how they end. The runs are small scripts."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import toy

from pinfm_jax.errors import UserError
from pinfm_jax.sweep import jobs as sweep_jobs
from pinfm_jax.sweep.jobs import FAILED, FINISHED, WAITING, Job, machine_slots, run_jobs

# Does what the experiment's name says, in the directory that the baseline names; the end of its input ends it.
SCRIPT = """
import json, os, sys, threading, time
with open(0, 'rb', buffering=0, closefd=False) as stdin:
  request = json.loads(stdin.readline())
threading.Thread(target=lambda: (os.read(0, 1), os._exit(143)), daemon=True).start()
what, directory = request['experiment']['name'], request['experiment']['baseline']
print('this is', what)
os.makedirs(directory, exist_ok=True)
open(directory + '/begin', 'w').write(repr(time.time()))
if what == 'user':
  print('pinfm: error: a mistake')
  sys.exit(2)
if what == 'crash':
  raise SystemError('it broke')
if what == 'nothing':
  sys.exit(0)
if what == 'long':
  time.sleep(60)
time.sleep(0.3)
open(directory + '/end', 'w').write(repr(time.time()))
open(directory + '/results.json', 'w').write('{}')
"""


@pytest.fixture(autouse=True)
def script(monkeypatch):
  monkeypatch.setattr(sweep_jobs, 'CHILD', ('-c', SCRIPT))


def _job(root, name, what='good', needs=None):
  experiment = replace(toy.EXPERIMENT, name=what, baseline=str(root / name))
  return Job(name, 'finetune', experiment, root / name, root / 'logs' / f'{name}.log', needs and root / needs)


def _time(root, name, moment):
  return float((root / name / moment).read_text())


def test_jobs_run_one_after_the_other(tmp_path):
  seen = []
  found = run_jobs([_job(tmp_path, n) for n in 'abc'], tmp_path, 1, lambda job, outcome: seen.append(job.label))
  assert seen == ['a', 'b', 'c']
  assert {path.name: outcome.status for path, outcome in found.items()} == dict.fromkeys('abc', FINISHED)
  assert all(0.3 < outcome.seconds < 30 for outcome in found.values())
  assert _time(tmp_path, 'a', 'end') < _time(tmp_path, 'b', 'begin')


def test_two_at_once_and_none_before_what_it_needs(tmp_path):
  run_jobs([_job(tmp_path, 'a'), _job(tmp_path, 'b'), _job(tmp_path, 'c', needs='a')], tmp_path, 2)
  assert _time(tmp_path, 'b', 'begin') < _time(tmp_path, 'a', 'end')
  assert _time(tmp_path, 'c', 'begin') > _time(tmp_path, 'a', 'end')


@pytest.mark.parametrize(
  ('what', 'words'),
  [('user', ['a mistake']), ('crash', ['exit code 1', 'this is crash', 'SystemError: it broke']),
   ('nothing', ['has no result'])],
)  # fmt: skip
def test_a_failed_job_is_told_and_the_others_go_on(tmp_path, capsys, what, words):
  jobs = [_job(tmp_path, 'a', what), _job(tmp_path, 'b', needs='a'), _job(tmp_path, 'c')]
  found = {path.name: outcome for path, outcome in run_jobs(jobs, tmp_path).items()}
  assert [found[n].status for n in 'abc'] == [FAILED, WAITING, FINISHED]
  output = capsys.readouterr().out
  for word in (*words, 'a: FAILED after', 'logs/a.log', 'b: cannot run', 'c: finished in', '[3/3]'):
    assert word in output
  assert words[0] in found['a'].message


def test_a_killed_job_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr(sweep_jobs, 'CHILD', ('-c', 'import os; os.kill(os.getpid(), 9)'))
  (outcome,) = run_jobs([_job(tmp_path, 'a')], tmp_path).values()
  assert outcome.status == FAILED
  assert 'killed by signal 9' in outcome.message


def test_an_interrupt_ends_the_runs(tmp_path, monkeypatch):
  job, started = _job(tmp_path, 'a', 'long'), []
  begin = sweep_jobs._start
  monkeypatch.setattr(sweep_jobs, '_start', lambda *words: started.append(begin(*words)) or started[-1])

  def interrupt(seconds):
    if (tmp_path / 'a' / 'begin').exists():
      raise KeyboardInterrupt
    time.sleep(0)

  monkeypatch.setattr(sweep_jobs, '_poll', interrupt)
  with pytest.raises(KeyboardInterrupt):
    run_jobs([job], tmp_path)
  assert started[0].poll() == 143  # it ended itself, within the grace period


def test_a_run_ends_with_a_sweep_that_was_killed():
  """The real child: its input ends while it waits for a workdir that never comes."""
  code = 'import sys; from pinfm_jax.sweep import child; child._run = lambda r: __import__("time").sleep(60); '
  process = subprocess.Popen([sys.executable, '-c', code + 'sys.exit(child.main())'], stdin=subprocess.PIPE)
  process.stdin.write(b'{"cores": []}\n')
  process.stdin.flush()
  time.sleep(0.5)
  assert process.poll() is None
  process.stdin.close()
  assert process.wait(20) == 143


def test_the_cores_are_shared_out(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1, 2, 3, 4}, raising=False)
  assert [slot.cores for slot in machine_slots(1)] == [()]
  assert [slot.cores for slot in machine_slots(2)] == [(0, 2, 4), (1, 3)]
  assert [slot.cores for slot in machine_slots(7)] == [(0,), (1,), (2,), (3,), (4,), (0,), (1,)]
  with pytest.raises(UserError, match='--jobs is 0; expected at least 1'):
    machine_slots(0)


def test_each_job_has_gpus_of_its_own(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,7')
  environments = [slot.environment for slot in machine_slots(2)]
  assert environments == [{'CUDA_VISIBLE_DEVICES': '4,7'}, {'CUDA_VISIBLE_DEVICES': '5'}]
  with pytest.raises(UserError, match='--jobs is 4, but there are 3 GPUs'):
    machine_slots(4)


def test_the_child_says_a_users_mistake_in_one_line(tmp_path):
  """Input that stays open, as a sweep keeps it."""
  request = {
    'stage': 'finetune',
    'workdir': str(tmp_path),
    'cores': [],
    'towers_alone': False,
    'experiment': {'nam': 1},
  }
  command = [sys.executable, '-m', 'pinfm_jax.sweep.child']
  process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
  process.stdin.write(json.dumps(request).encode() + b'\n')
  process.stdin.flush()
  assert process.wait(60) == 2
  (line,) = process.communicate()[1].decode().splitlines()
  assert line.startswith("pinfm: error: unknown setting 'nam'")
