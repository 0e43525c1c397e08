"""A trained PinFM in a model of one's own: from a run, from a bundle, and the example that README shows."""

import contextlib
import importlib.util
import io
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_bundle

from pinfm_jax.cli import main
from pinfm_jax.errors import UserError
from pinfm_jax.launch import saved_experiment
from pinfm_jax.model.hashing import hash_rows, key_words
from pinfm_jax.model.pinfm import EventBatch, PinFM
from pinfm_jax.pretrained import load_pretrained
from pinfm_jax.stages.context import Run
from pinfm_jax.train.exchange import read_vectors
from pinfm_jax.train.restore import WarmStart, fresh_state, warm_started
from pinfm_jax.train.sharding import make_mesh

EXAMPLE = Path(__file__).resolve().parent.parent / 'experiments' / 'bring_your_own_ranker.py'


@pytest.fixture(scope='module')
def example():
  spec = importlib.util.spec_from_file_location('bring_your_own_ranker', EXAMPLE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_example_names_a_users_mistake_in_one_line(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', [str(EXAMPLE), str(tmp_path / 'nowhere')])
  with pytest.raises(SystemExit) as ended:
    runpy.run_path(str(EXAMPLE), run_name='__main__')
  assert ended.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert 'holds no run' in line


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  root = tmp_path_factory.mktemp('run')
  (root / 'launch.py').write_text('"""The toy experiment."""\n\nfrom toy import EXPERIMENT as experiment\n')
  command = ['run', str(root / 'launch.py'), '--workdir', str(root / 'work'), '--stages', 'prepare,pretrain']
  with contextlib.redirect_stdout(io.StringIO()):
    assert main(command) == 0
  return root / 'work'


def test_a_bundle_gives_the_module_its_parameters_and_vectors(tmp_path):
  toy = toy_bundle.make_toy()
  pretrained = load_pretrained(toy.export(tmp_path / 'bundle', storage='float32'))
  assert (pretrained.actions, pretrained.surfaces) == (toy_bundle.ACTIONS, toy_bundle.SURFACES)
  assert pretrained.model == toy.model
  words = key_words(np.random.default_rng(0).integers(0, 2**63, (3, 7)).astype(np.uint64))
  expected = toy.rows_GE[hash_rows(words, 2, 50, 3)].reshape(3, 7, 16)
  np.testing.assert_array_equal(pretrained.vectors(words), expected)
  events = EventBatch(words, np.ones((3, 7), np.int32), np.full((3, 7), 5, np.uint32), np.arange(7) < [[7], [3], [1]])
  module, weights = PinFM(pretrained.model), {'params': pretrained.params}
  h, kv = jax.jit(lambda w, v: module.apply(w, v, events, method='encode'))(weights, pretrained.vectors(words))
  theirs = jax.jit(lambda p, v: toy.module.apply({'params': p}, v, events, method='context'))(toy.params, expected)
  np.testing.assert_allclose(h[np.arange(3), [6, 2, 0]], theirs.user_UO, atol=1e-5)
  np.testing.assert_allclose(kv.key, theirs.kv.key, atol=1e-5)


def test_packed_rows_are_near(tmp_path, monkeypatch):
  monkeypatch.setattr('pinfm_jax.serve.bundle._programs', lambda *_: {})
  monkeypatch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: {'context': b'c', 'crossing': b'x'})
  toy = toy_bundle.make_toy()
  words = key_words(np.arange(50, dtype=np.uint64))
  exact = toy.rows_GE[hash_rows(words, 2, 50, 3)].reshape(50, 16)
  for storage, most in (('int8', 0.01), ('int4', 0.2)):
    vectors = load_pretrained(toy.export(tmp_path / storage, storage=storage)).vectors(words)
    assert 0 < np.linalg.norm(vectors - exact) < most * np.linalg.norm(exact)


def test_what_is_neither_is_refused(tmp_path, monkeypatch):
  with pytest.raises(UserError, match='holds no run'):
    load_pretrained(tmp_path)
  monkeypatch.setattr('pinfm_jax.serve.bundle._programs', lambda *_: {})
  monkeypatch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: {'crossing': b'x'})
  with pytest.raises(UserError, match='ranker without PinFM'):
    load_pretrained(toy_bundle.make_toy('none').export(tmp_path / 'none'))


@pytest.mark.slow
def test_a_run_gives_what_its_checkpoint_holds(workdir, example):
  pretrained, run = load_pretrained(workdir), Run(saved_experiment(workdir), workdir)
  batches = (batch for batch, _ in example.batches_of(run, 'finetune', 4))
  task, mesh = example.MyTask(run.model, 3, next(batches)), make_mesh(run.experiment.mesh)
  words = key_words(np.arange(20, dtype=np.uint64))[None]
  with jax.set_mesh(mesh):
    create, abstract = fresh_state(task, mesh, 0, None)
    state = warm_started(create, abstract, WarmStart(run.pretrain_directory(0), groups=('pinfm',)))
    (expected,) = jax.jit(lambda rows, ids: read_vectors(rows, (ids,), task.tables))(
      state.tables.rows_GE, jnp.asarray(words)
    )
  np.testing.assert_array_equal(pretrained.vectors(words), expected)
  jax.tree.map(np.testing.assert_array_equal, dict(pretrained.params), state.params['pinfm'])
  with pytest.raises(UserError, match="no arm 'nobody'; expected one of: without PinFM, with PinFM"):
    load_pretrained(workdir, arm='nobody')
  with pytest.raises(UserError, match='no checkpoint'):
    load_pretrained(workdir, arm='with PinFM')


@pytest.mark.slow
@pytest.mark.parametrize('options', [[], ['--train-tables']], ids=['frozen tables', 'trained tables'])
def test_the_example_learns(workdir, example, options, capsys):
  share = example.main([str(workdir), '--steps', '30', '--batch', '16', *options])
  lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith('step')]
  assert float(lines[-1][-1]) < float(lines[0][-1])
  assert 0 < share < 1
