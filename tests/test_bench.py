"""The benchmarks: figures come from what ran, both sides do their work, results are written, bad input is one line."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
import toy

from pinfm_jax.bench import plot, scaling, tables, training
from pinfm_jax.bench.results import Figure, Findings, environment, write_findings
from pinfm_jax.bench.rival import find_rival, load_rival, rival_commit
from pinfm_jax.bench.timing import Spread, interleave, ratios, use_threads
from pinfm_jax.bench.traffic import collective_bytes, exchange_bytes, measure_traffic
from pinfm_jax.cli import main
from pinfm_jax.config import TableConfig
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import hash_rows


@pytest.fixture
def timed(monkeypatch):
  """Records every comparison: its programs and their seconds."""
  seen = []

  def spy(runs, *arguments, **more):
    seconds = interleave(runs, *arguments, **more)
    seen.append((runs, seconds))
    return seconds

  monkeypatch.setattr(tables, 'interleave', spy)
  monkeypatch.setattr(training, 'interleave', spy)
  return seen


def _figures(findings):
  return {figure.name: figure for figure in findings.figures}


def test_programs_run_in_turn_and_the_warm_up_is_not_timed():
  now, calls = [0.0], []

  def program(name, seconds):
    def run(number):
      calls.append((name, number))
      now[0] += seconds

    return run

  seconds = interleave({'a': program('a', 1.0), 'b': program('b', 3.0)}, 2, warmup=1, clock=lambda: now[0])
  assert calls == [('a', 0), ('b', 0), ('a', 1), ('b', 1), ('a', 2), ('b', 2)]
  assert seconds == {'a': (1.0, 1.0), 'b': (3.0, 3.0)}


def test_ratios_are_taken_within_a_round():
  assert ratios((2.0, 9.0, 40.0), (1.0, 3.0, 10.0)) == Spread(3.0, 2.0, 4.0)  # the ratio of medians is 3, of means 3.6
  with pytest.raises(ValueError):
    ratios((1.0,), (1.0, 2.0))


@pytest.mark.parametrize(
  ('bounds', 'met'),
  [({}, None), ({'at_most': 2.0}, True), ({'at_most': 1.9}, False), ({'at_least': 2.0}, True),
   ({'at_least': 2.1}, False), ({'at_most': 1.0, 'at_least': 1.0}, False)],
)  # fmt: skip
def test_a_figure_meets_what_is_asked(bounds, met):
  assert Figure('x', 'x', 2.0, **bounds).met is met


def test_findings_are_printed_and_written(tmp_path, capsys):
  figures = [
    Figure.of('a/ratio', 'one over two', Spread(1.5, 1.0, 2.0), at_most=1.15),
    Figure('b', 'size', 12345.0, unit='bytes'),
  ]  # fmt: skip
  write_findings(
    Findings('A title', {'ids': 7}, figures, ['A note.'], environment() | {'load_at_start': 3.0}), tmp_path
  )
  found = json.loads((tmp_path / 'results.json').read_text())
  assert found['figures']['a/ratio'] == {
    'text': 'one over two', 'value': 1.5, 'least': 1.0, 'greatest': 2.0, 'unit': 'x', 'at_most': 1.15, 'met': False
  }  # fmt: skip
  assert found['environment']['jax'] == jax.__version__
  assert found['environment']['peak_memory_gb'] > 0.05
  for text in (capsys.readouterr().out, (tmp_path / 'results.md').read_text()):
    assert '12,345 bytes' in text
    assert 'at most 1.15' in text
    assert 'NO' in text
    assert 'The load average was 3.0' in text


def test_the_tables_are_compared_by_what_ran(tmp_path, timed):
  sizes = replace(tables.QUICK, rounds=2)
  findings = tables.bench_tables(tmp_path, ('alone', 'dense'), sizes)
  figures = _figures(findings)
  (alone, alone_seconds), (dense, dense_seconds) = timed
  assert all(run.steps == 2 + 2 for run in alone.values())
  assert all(run.steps == sizes.dense_rounds + 1 for run in dense.values())
  expected = ratios(alone_seconds['large'], alone_seconds['small'])
  assert (figures['alone/ratio'].value, figures['alone/ratio'].greatest) == (expected.median, expected.greatest)
  assert figures['dense/128/ratio'].value == ratios(dense_seconds['dense'], dense_seconds['sparse']).median
  assert figures['alone/temporary_ratio'].value == 1.0
  assert figures['alone/temporary'].value == alone['large'].temporary_bytes > 0
  assert figures['alone/large'].value == Spread.of(alone_seconds['large']).median
  assert all(figure.met is None for figure in findings.figures)  # nothing is asked of quick sizes
  assert (tmp_path / 'tables.png').read_bytes().startswith(b'\x89PNG')
  assert set(json.loads((tmp_path / 'results.json').read_text())['figures']) == set(figures)


@pytest.mark.parametrize('kind', [tables._SparseTable, tables._DenseTable])
def test_both_ways_move_the_rows_of_the_ids_and_no_others(kind):
  config, words = TableConfig(sub_tables=1, rows=5_000, width=4), tables._fresh_ids(64, 2)
  run = kind(config, words)
  before = np.array(jax.tree.leaves(run.arrays)[0])
  jax.block_until_ready(run(1))
  moved = np.flatnonzero(np.any(np.array(jax.tree.leaves(run.arrays)[0]) != before, axis=1))
  np.testing.assert_array_equal(moved, np.unique(hash_rows(np.asarray(words[1]), 1, 5_000)))
  assert run.steps == 1


@pytest.mark.slow
def test_the_full_step_is_compared_by_what_ran(tmp_path, timed):
  figures = _figures(tables.bench_tables(tmp_path, ('step',), replace(tables.QUICK, rounds=2, dtype='bfloat16')))
  [(runs, seconds)] = timed
  assert all(run.steps == 4 for run in runs.values())
  assert figures['step/ratio'].value == ratios(seconds['large'], seconds['small']).median
  assert figures['step/temporary_ratio'].value == 1.0


HLO = """
  %a.1 = (s32[1,64]{1,0}, s32[1,64]{1,0}, /*index=2*/s32[1,64]{1,0}, s32[1,64]{1,0}) all-to-all(%x, %y), channel_id=1
  %b = f32[8,16]{1,0} all-reduce(%c), channel_id=2, to_apply=%sum
  ROOT %c = (f32[32]{0}, bf16[32]{0}) all-reduce(%d, %e), channel_id=3
  %g = pred[4,100]{0,1} all-gather(%h), dimensions={0}
  %h = f32[10]{0} reduce-scatter(%i), dimensions={0}
  %k = u16[6]{0} collective-permute(%l)
  %m = f32[999]{0} add(%all-reduce, %all-to-all)
"""


def test_bytes_of_collectives_are_read_from_a_program():
  assert collective_bytes(HLO, 4) == {
    'all-to-all': 4 * 64 * 4 * 3 // 4,
    'all-reduce': 8 * 16 * 4 * 3 // 2 + (32 * 4 + 32 * 2) * 3 // 2,
    'all-gather': 400 * 3 // 4,
    'reduce-scatter': 10 * 4 * 3,
    'collective-permute': 12,
  }


def test_bytes_of_an_exchange_by_arithmetic():
  config = TableConfig(sub_tables=2, rows=100, width=8)
  assert exchange_bytes(config, 50, 1) == {'rows': 50 * 32, 'ids': 50 * 8, 'gradients': 50 * 32}
  two = exchange_bytes(replace(config, dtype='bfloat16'), 100, 2)  # two rounds of 50 places
  assert two == {'rows': 100 * 16, 'ids': 100 * 4 + 150 * 4, 'gradients': 150 * 32}


COMPILED = """
import sys, re, jax, jax.numpy as jnp
from pinfm_jax.bench.traffic import exchange_bytes
from pinfm_jax.config import MeshConfig, TableConfig
from pinfm_jax.model.tables import Tables
from pinfm_jax.train.exchange import Exchange
from pinfm_jax.train.sharding import AXES, batch_sharding, make_mesh, table_sharding
mesh, config, capacity = make_mesh(MeshConfig()), TableConfig(sub_tables=2, rows=400, width=8), 24
rows, exchange = table_sharding(mesh), Exchange(config, 800, AXES, capacity)
def step(tables, ids):
  plan = exchange.plan((ids,))
  gathered = exchange.lookup(tables.rows_GE, plan)
  grad = jax.grad(lambda x: jnp.sum(exchange.vectors(x, plan, (ids,))[0] ** 2))(gathered)
  summed = exchange.sum_gradients(plan, grad)
  return exchange.update(tables, plan, grad, summed, jnp.float32(1), jnp.float32(1), jnp.uint32(0))
with jax.set_mesh(mesh):
  tables = Tables(jax.ShapeDtypeStruct((800, 8), jnp.float32, sharding=rows),
                  jax.ShapeDtypeStruct((800,), jnp.float32, sharding=rows))
  ids = jax.ShapeDtypeStruct((8, 64, 2), jnp.uint32, sharding=batch_sharding(mesh))
  hlo = jax.jit(step).lower(tables, ids).compile().as_text()
sizes = [8 * capacity * (4 if 's32' in shapes else 4 * 8)
         for shapes in re.findall(r'= (.*?) all-to-all\\(', hlo) if f'[1,{capacity}' in shapes]
assert len(sizes) == len(re.findall(r' all-to-all\\(', hlo)) == 2 + 3 * 2, hlo
# lookup's loop, the first round of the sums, and the loops of further rounds in sums and update
one = exchange_bytes(config, 8 * capacity, 1)
assert sum(sizes) == sum(one.values()) + 2 * (one['gradients'] + one['ids'] / 2), (sizes, one)
"""


@pytest.mark.slow
def test_bytes_of_an_exchange_are_those_of_the_compiled_program():
  flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  _python('-W', 'error', '-c', COMPILED, flags=flags)


def _python(*words, flags=''):
  environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_traffic_between_8_devices(tmp_path):
  figures = {figure.name: figure for figure in measure_traffic(tmp_path, quick=True)}
  for name in ('simulated segments', 'uniform ids'):
    ratio, distinct = figures[f'traffic/{name}/ratio'], figures[f'traffic/{name}/distinct'].value
    assert 1 <= ratio.least <= ratio.value <= ratio.greatest < 2
    assert figures[f'traffic/{name}/rows'].value == pytest.approx(ratio.value * distinct * 32 * 4)
  assert figures['traffic/simulated segments/distinct'].value < figures['traffic/uniform ids/distinct'].value <= 64 * 8
  # The compiler's way reduces all K rows of the global batch over all devices, whatever the ids are.
  assert figures['traffic/automatic/all-reduce'].value > 2 * 7 / 8 * 32 * 16 * 8 * 32 * 4


def test_tokens_per_second_are_those_of_the_steps_done(tmp_path, timed, capsys):
  sizes = replace(training.QUICK, items=(60,))
  findings = training.bench_pretrain(tmp_path, None, ('speed',), sizes)
  [(runs, seconds)] = timed
  assert list(runs) == ['ours']
  assert runs['ours'].steps == sizes.rounds + 2
  speed = _figures(findings)['60/4/ours']
  assert speed.value == pytest.approx(np.median([4 * 16 / s for s in seconds['ours']]))
  assert 'Skipped: the comparison with SASRec; give a checkout' in capsys.readouterr().out
  assert (tmp_path / 'pretrain.png').exists()


def test_the_tower_is_measured(tmp_path, monkeypatch):
  found = {'ratio_median': 0.75, 'ratio_min': 0.7, 'ratio_max': 0.8, 'tower_flops': 3e9, 'plain_flops': 4e9}
  monkeypatch.setattr(training, 'measure_tower', lambda tower, users, length, repeats: found)
  share = _figures(training.bench_pretrain(tmp_path, None, ('tower',)))['tower/share']
  assert (share.value, share.least, share.greatest, share.met) == (0.75, 0.7, 0.8, True)


def _checkout(path, text):
  (path / 'python').mkdir(parents=True)
  (path / 'python' / 'model.py').write_text(text)
  return path


def test_a_rival_is_found_imported_and_named_by_its_commit(tmp_path):
  checkout = _checkout(tmp_path / 'rival', 'class SASRec: pass\n')
  module = load_rival(find_rival(checkout))
  assert module.SASRec.__name__ == 'SASRec'
  assert rival_commit(module) == 'unknown'
  git = ['git', '-C', str(checkout), '-c', 'user.name=x', '-c', 'user.email=x@y']
  for words in (['init', '-q'], ['add', '-A'], ['commit', '-qm', 'x']):
    subprocess.run([*git, *words], check=True)
  head = subprocess.run([*git, 'rev-parse', 'HEAD'], check=True, capture_output=True, text=True).stdout.strip()
  assert rival_commit(module) == head
  (checkout / 'python' / 'model.py').write_text('class SASRec: changed = True\n')
  assert rival_commit(module) == head + '+'


@pytest.mark.parametrize(('text', 'words'), [('x = 1', 'defines no SASRec'), ('import nonsense_xyz', 'nonsense_xyz')])
def test_a_rival_that_is_none_is_refused(tmp_path, text, words):
  with pytest.raises(UserError, match=words):
    load_rival(find_rival(_checkout(tmp_path, text)))


def test_a_rival_without_pytorch_is_left_out_and_said(tmp_path, monkeypatch):
  monkeypatch.setattr(training, 'torch_is_installed', lambda: False)
  assert training._module(_checkout(tmp_path, 'import torch')) is None
  notes = training._notes(('speed',), training.QUICK, 'rival', None)
  assert 'PyTorch is not installed' in notes[-1]


MODEL = """
import torch
class SASRec(torch.nn.Module):
  def __init__(self, users, items, args):
    super().__init__()
    self.item_emb = torch.nn.Embedding(items + 1, args.hidden_units, padding_idx=0)
    self.pos_emb = torch.nn.Embedding(args.maxlen + 1, args.hidden_units, padding_idx=0)
    self.shapes, self.dropout = [], args.dropout_rate
  def forward(self, users, sequence, positive, negative):
    self.shapes.append(tuple(x.shape for x in (users, sequence, positive, negative)))
    features, chosen = (self.item_emb(torch.LongTensor(x)) for x in (sequence, positive))
    return (features * chosen).sum(-1), (features * self.item_emb(torch.LongTensor(negative))).sum(-1)
"""


def test_the_rival_trains(tmp_path, timed):
  pytest.importorskip('torch')
  sizes = replace(training.QUICK, items=(60,))
  findings = training.bench_pretrain(tmp_path / 'out', _checkout(tmp_path / 'rival', MODEL), ('speed',), sizes)
  [(runs, seconds)] = timed
  rival, rounds = runs['SASRec'], sizes.rounds + 2
  assert rival.steps == runs['ours'].steps == rounds == len(rival._model.shapes)
  assert rival._model.shapes[0] == ((4,), (4, 16), (4, 16), (4, 16))
  assert rival._model.dropout == 0.0
  losses = []
  for number in range(40):
    rival(number)
    losses.append(rival.loss)
  assert losses[-1] < losses[0]
  assert _figures(findings)['60/4/ratio'].value == ratios(seconds['SASRec'], seconds['ours']).median


def test_numbers_are_short():
  assert [plot.count(n) for n in (8_000_000, 128_000, 129_729, 200, 0.5)] == ['8 M', '128 k', '129.7 k', '200', '0.5']


@pytest.fixture
def scaling_file(tmp_path):
  path = tmp_path / 'launch.py'
  path.write_text(
    'from dataclasses import replace\n'
    'from toy import EXPERIMENT\n'
    'from pinfm_jax.bench.scaling import Scaling\n'
    'experiment = replace(EXPERIMENT, arms=(), pretrain=replace(EXPERIMENT.pretrain, eval_every=3, eval_share=0.3))\n'
    "scaling = Scaling(rows=(50, 500), towers=({'width': 8}, {}), quick={'pretrain.steps': 3}, quick_rows=(500,))\n"
  )
  return path


def test_the_points_of_a_scaling_law_are_trained_once_each_and_kept(tmp_path, scaling_file, monkeypatch):
  trained = []

  def pretrain(dataset, until_ms, model, config, mesh, directory, seed, layout):
    trained.append((model.tables.rows, model.tower.width, config.steps))
    rows = [{'step': 3, 'eval/loss': 9.0, 'eval/ntl': 8.0}, {'step': 4, 'loss': 1.0}]
    rows.append({'step': 6, 'eval/loss': 5.0 + model.tables.rows / 1000, 'eval/ntl': 2.0})
    (directory / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (directory / 'checkpoints').mkdir()
    return type('State', (), {'params': {'a': np.zeros((2, 3)), 'b': np.zeros(4)}})

  monkeypatch.setattr(scaling, 'pretrain', pretrain)
  for _ in range(2):
    findings = scaling.bench_scaling(scaling_file, tmp_path / 'out')
  assert trained == [(50, 16, 6), (500, 16, 6), (500, 8, 6)]
  figures = _figures(findings)
  assert figures['rows2x50_tower2x16/loss'].value == 5.05
  assert figures['rows2x500_tower2x8/ntl'].value == 2.0
  assert not (tmp_path / 'out' / 'points' / 'rows2x50_tower2x16' / 'checkpoints').exists()
  assert (tmp_path / 'out' / 'scaling.png').exists()
  assert '100 rows, tower of 10 parameters: held-out loss' in (tmp_path / 'out' / 'results.md').read_text()
  with pytest.raises(UserError, match='another'):
    scaling.bench_scaling(scaling_file, tmp_path / 'out', quick=True)


def test_a_point_shared_by_both_series_is_one(scaling_file):
  experiment, law = scaling._load(scaling_file, quick=True)
  assert experiment.pretrain.steps == 3
  points = scaling._points(experiment, law)
  assert [(p.in_rows, p.in_towers) for p in points] == [(True, True), (False, True)]


@pytest.mark.slow
def test_a_scaling_law_end_to_end(tmp_path, scaling_file):
  findings = scaling.bench_scaling(scaling_file, tmp_path / 'out', quick=True)
  assert all(np.isfinite(figure.value) and figure.value > 0 for figure in findings.figures)
  assert len(findings.figures) == 4


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('from toy import EXPERIMENT as experiment', 'defines no `scaling`'),
    (
      'from toy import EXPERIMENT as experiment\n'
      'from pinfm_jax.bench.scaling import Scaling\nscaling = Scaling((5,), ())',
      'eval_every is 0',
    ),
    (
      'from toy import EXPERIMENT\nfrom pinfm_jax.overrides import apply_overrides\n'
      "experiment = apply_overrides(EXPERIMENT, {'pretrain.eval_every': 3, 'pretrain.eval_share': 0.3})\n"
      "from pinfm_jax.bench.scaling import Scaling\nscaling = Scaling((), ({'heads': 1}, {'heads': 2}))",
      'two towers of `scaling` are rows2x500_tower2x16',
    ),
    (
      'from toy import EXPERIMENT\nfrom pinfm_jax.overrides import apply_overrides\n'
      "changes = {'pretrain.eval_every': 3, 'pretrain.eval_share': 0.3, 'pretrain.ntl_weight': 0.0}\n"
      'experiment = apply_overrides(EXPERIMENT, changes)\n'
      'from pinfm_jax.bench.scaling import Scaling\nscaling = Scaling((5,), ())',
      'the points are compared by L_ntl',
    ),
  ],
)
def test_a_file_without_a_scaling_law_is_refused(tmp_path, text, words):
  path = tmp_path / 'launch.py'
  path.write_text(text)
  with pytest.raises(UserError, match=words):
    scaling.bench_scaling(path, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('threads', [0, 100_000])
def test_impossible_numbers_of_threads_are_refused(threads):
  with pytest.raises(UserError, match=f'--threads is {threads}; this process may use 1 to'):
    use_threads(threads)


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['tables', '--parts', 'step,nothing'], "--parts names 'nothing'; expected some of: step,alone,dense,traffic"),
    (['tables', '--threads', '0'], '--threads is 0; this process may use 1 to'),
    (['tables', '--quick', '--parts', 'alone', '--out', 'file/x'], 'file/x cannot be made (Not a directory)'),
    (['pretrain', '--parts', 'tow'], "--parts names 'tow'; expected some of: speed,tower"),
    (['pretrain', '--width', '10', '--heads', '3'], '--width 10 is not a multiple of --heads 3'),
    (['pretrain', '--batches', '8,0'], '--batches is 8,0; expected numbers of at least 1'),
    (['pretrain', '--rival', 'nowhere'], '--rival nowhere holds no python/model.py; expected a checkout of'),
    (['scaling', 'nowhere.py'], 'nowhere.py does not exist'),
  ],
)
def test_bad_arguments_end_in_one_line(words, message, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').write_text('')
  assert main(['bench', *words]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1
  assert message in lines[0]
  assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_the_toy_experiment_is_what_the_scaling_file_expects():
  assert (toy.EXPERIMENT.model.tables.rows, toy.EXPERIMENT.model.tower.width) == (500, 16)
