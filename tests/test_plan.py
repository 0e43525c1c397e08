"""`pinfm plan`: exact bytes, collectives read from HLO text, the search for what fits, and mistakes in one line."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import toy
from jax.sharding import AbstractMesh

from pinfm_jax.cli import main
from pinfm_jax.data.negatives import NegativeSource
from pinfm_jax.data.packing import PackedSegments
from pinfm_jax.data.pipeline import Segments, training_batches
from pinfm_jax.data.tokens import TokenInputs
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.plan.chips import CHIPS, USABLE, find_chip
from pinfm_jax.plan.compile import Compiled, tpu_topology
from pinfm_jax.plan.fit import BATCHES, memory, nearest_fit
from pinfm_jax.plan.hlo import count_program, group_size, shape_bytes
from pinfm_jax.plan.memory import activation_bytes, batch_bytes, least_bytes, parameters, state_bytes
from pinfm_jax.plan.problem import Problem, abstract_batch, abstract_state
from pinfm_jax.plan.report import verdict
from pinfm_jax.plan.roofline import estimate
from pinfm_jax.plan.work import Bytes, Flops, step_bytes, step_flops
from pinfm_jax.train.sharding import make_mesh
from pinfm_jax.train.step import init_state, make_step

GPU = find_chip(None, 'H100', 1)


@pytest.fixture(autouse=True)
def no_mesh(one_device_mesh):
  """A plan chooses its own mesh, as the command does."""
  with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
    yield


def problem(devices=1, **settings):
  """The toy experiment on some devices; keys have '__' for dots."""
  changes = {key.replace('__', '.'): value for key, value in settings.items()}
  return Problem(apply_overrides(toy.EXPERIMENT, changes), devices)


def compiled(temporaries, devices=1, not_in_place=0):
  words = f'{devices} simulated CPU devices'
  return Compiled(words, 0, temporaries, not_in_place, 0.0, 0.0, 0.0, {}, 0, 0.0, 0)


def test_the_bytes_of_a_real_state_are_those_of_the_arithmetic():
  small = problem(model__tables__dtype='bfloat16')
  mesh = make_mesh(small.experiment.mesh)
  with jax.set_mesh(mesh):
    state = init_state(small.task, mesh, 0, layout=small.layout)()
  found, expected = state_bytes(small), sum(x.nbytes for x in jax.tree.leaves(state))
  assert found.total == expected
  assert found.tables == state.tables.rows_GE.nbytes
  assert found.tables == 1024 * 8 * 2  # 2 x 500 rows, rounded up to a multiple of 256, of 8 bfloat16
  assert found.accumulators == 1024 * 4
  assert found.moments == 2 * found.tower
  assert parameters(small) == (1024 * 8, found.tower // 4)
  assert least_bytes(small) == 1000 * (8 * 2 + 4)
  plain = problem(model__tables__dtype='bfloat16', pretrain__update__table_rule='sgd')
  assert state_bytes(plain) == replace(found, accumulators=0)
  adam = problem(pretrain__update__table_rule='adam', pretrain__ema_decay=0.9, pretrain__ema_tables=True)
  both = state_bytes(adam)
  assert (both.tables, both.accumulators) == (1024 * 8 * 4, 2 * 1024 * 8 * 4)
  assert both.rest == found.rest + both.tables + both.tower  # the averages
  assert least_bytes(adam) == 1000 * 8 * 4 * 3


OPTIONS = {
  'model__tower__time_gap_buckets': 24,
  'model__content': True,
  'model__content_width': 8,
  'model__id_mask': 0.2,
  'pretrain__action_mask': 0.2,
  'pretrain__item_dropout': 0.2,
  'pretrain__uniform_negatives': 16,
  'pretrain__log_q': 'counts',
  'pretrain__pack': True,
}


@pytest.mark.parametrize('settings', [{}, OPTIONS], ids=['plain', 'options'])
def test_the_batch_has_the_columns_of_the_pipeline(settings, toy_run):
  small = problem(**settings)
  config, until = small.experiment.pretrain, toy_run.split.pretrain_until
  source = Segments.before(toy_run.dataset, until, config.segment_length, TokenInputs.of(small.model, toy_run.dataset))
  added = NegativeSource.of(toy_run.dataset, source, config, 0, until, 0)
  source = PackedSegments.of(source) if config.pack else source
  batch = next(added.add(training_batches(source, config.batch_segments, 0, 0), 0))
  columns = lambda arrays: {name: (array.shape, np.dtype(array.dtype)) for name, array in arrays.items()}
  assert columns(abstract_batch(small, small.abstract_mesh)) == columns(batch)


def test_a_step_with_every_option_of_the_input_can_be_planned():
  small = problem(**OPTIONS)
  mesh = make_mesh(small.experiment.mesh)
  with jax.set_mesh(mesh):
    traced = make_step(small.task, small.layout).trace(abstract_state(small, mesh), abstract_batch(small, mesh))
  assert traced.out_info


def test_the_paper_s_tables_on_many_devices_allocate_nothing():
  """41 GB of rows and 2.56 GB of accumulators over 64 devices: the arithmetic needs neither devices nor memory."""
  tables = {'model__tables__sub_tables': 8, 'model__tables__rows': 80_000_000, 'model__tables__width': 32}
  big = problem(64, model__tables__dtype='bfloat16', pretrain__batch_segments=64, **tables)
  found = state_bytes(big)
  assert found.tables == 8 * 80_000_000 * 32 * 2 // 64
  assert found.accumulators == 8 * 80_000_000 * 4 // 64
  replicas = Problem(apply_overrides(big.experiment, {'mesh.table_axes': ('model',), 'mesh.model': 8}), 64)
  assert state_bytes(replicas).tables == 8 * found.tables


def test_fsdp_splits_the_tower_and_the_batch():
  whole, split = state_bytes(problem(8)), state_bytes(problem(8, mesh__fsdp=8))
  assert split.tower < whole.tower
  assert split.moments == 2 * split.tower
  assert split.tables == whole.tables
  assert batch_bytes(problem(8)) == batch_bytes(problem(8, mesh__fsdp=4)) == batch_bytes(problem(1)) // 8
  assert batch_bytes(problem(1)) == 8 * 16 * (8 + 4 + 4 + 1 + 4)


HLO = """HloModule step, is_scheduled=true

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %dot.1 = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %ar = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
}

%cond (p: (s32[], f32[8,4])) -> pred[] {
  %c = s32[] constant(3)
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%open_cond (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %w1 = (s32[], f32[8,4]{1,0}) while(%a), condition=%open_cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %w2 = (s32[], f32[8,4]{1,0}) while(%a), condition=%cond, body=%body
  %w3 = (s32[], f32[8,4]{1,0}) while(%a), condition=%open_cond, body=%body
  %ags = (bf16[8,4]{1,0:T(8,128)(2,1)}, bf16[32,4]{1,0:T(8,128)(2,1)}) all-gather-start(%a), replica_groups={{0,1,2,3},{4,5,6,7}}
  %agd = bf16[32,4]{1,0} all-gather-done(%ags)
  %rs = f32[2,4]{1,0} reduce-scatter(%a), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add
  %a2a = (f32[2,4]{1,0}, f32[2,4]{1,0}, /*index=2*/f32[2,4]{1,0}, f32[2,4]{1,0}) all-to-all(%a), replica_groups=[2,4]<=[8]
  ROOT %cp = f32[8,4]{1,0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
}
"""  # noqa: E501


def test_collectives_and_matmuls_are_counted_with_their_loops():
  counts = count_program(HLO)
  reduced = counts.traffic['all-reduce']
  assert (reduced.calls, reduced.payload) == (9, 9 * 128)  # 5 stated, 3 by the condition, 1 of unknown length
  assert reduced.sent == 9 * 128 * 2 * 3 / 4
  assert counts.open_loops == 1
  assert counts.matmul_flops == 9 * 2 * 8 * 8 * 4
  gathered, scattered = counts.traffic['all-gather'], counts.traffic['reduce-scatter']
  assert (gathered.calls, gathered.payload, gathered.sent) == (1, 64, 3 * 64)
  assert (scattered.payload, scattered.sent) == (128, 96)
  exchanged, permuted = counts.traffic['all-to-all'], counts.traffic['collective-permute']
  assert (exchanged.payload, exchanged.sent) == (128, 96)
  assert (permuted.payload, permuted.sent) == (128, 128)


def test_shapes_and_groups_are_read():
  assert shape_bytes('(s4[3]{0}, /*index=1*/pred[2,2]{1,0:T(8,128)(4,1)}, u16[], f8e4m3fn[5]{0})') == [2, 4, 2, 5]
  assert group_size("replica_groups=mesh['a'=8,'b'=4] {'a','b':(1)2}, x") == 16
  assert group_size('replica_groups={}') == 0


def test_flops_follow_the_parameters():
  flops = step_flops(problem())
  # phi_in 16x16 + 16x16, blocks 2 x 12 x 16^2, phi_out 16x16 + 16x8, psi 16x16 + 16x8: 128 tokens, 6 FLOPs an element.
  assert flops.dense == 6 * 128 * (512 + 6144 + 384 + 384)
  assert flops.attention == 12 * 128 * 16 * 16 * 2
  assert flops.logits == 6 * 128 * 64 * 8
  doubled = step_flops(problem(pretrain__batch_segments=16))
  assert doubled.model == 2 * flops.model


def test_memory_traffic_of_rows_and_its_factor_on_tpu():
  wide, tpu = problem(model__tables__dtype='bfloat16'), find_chip(None, 'v5e', 1)
  state = state_bytes(wide)
  rows = 128 * 2
  assert step_bytes(wide, state, GPU).rows == rows * (3 * 8 * 2 + 64)
  assert step_bytes(wide, state, tpu).rows == rows * (3 * 8 * 2 * tpu.row_traffic + 64)


def test_the_estimate_is_the_work_over_the_rates():
  on_8, wide = problem(8, model__tower__dtype='bfloat16'), Bytes(3.35e12, 0, 0, 0)
  flops = Flops(8 * 989e12, 0, 0, 8 * 989e12).one_device(8)
  assert flops == 2 * 989e12
  found = estimate(on_8, flops, wide, 450e9, GPU)
  assert (found.compute, found.memory, found.network) == pytest.approx((2.0, 1.0, 1.0))
  assert (found.overlapped, found.serial, found.bound) == (pytest.approx(2.0), pytest.approx(4.0), 'compute')
  assert estimate(problem(8), flops, wide, 0, GPU).compute == pytest.approx(4.0)  # float32: half the rate
  beyond = problem(16, pretrain__batch_segments=16)
  assert estimate(beyond, flops, wide, 450e9, GPU).network == pytest.approx(9.0)  # 50 GB/s


def _chip(size):
  return replace(GPU, memory=size / USABLE)


def _all_fits(start, chip, scale):
  """Sizes of every change of half batches and bfloat16 tables that fits, the hard way."""
  fits = []
  for k in range(4):
    for kind, extra in (('float32', 0), ('bfloat16', 2)):
      changed = problem(pretrain__batch_segments=8 >> k, model__tables__dtype=kind, model__tables__rows=5000)
      total = state_bytes(changed).total + BATCHES * batch_bytes(changed) + scale * activation_bytes(changed)
      fits += [k + extra] if total <= chip.usable else []
  return fits


def test_the_nearest_change_fits_and_no_smaller_one_does():
  start = problem(model__tables__rows=5000)
  scale, first = 1.5, memory(start, compiled(1.5 * activation_bytes(start)))
  chip = _chip(first.total - 0.7 * first.temporaries)
  asked = []

  def compile_again(candidate):
    asked.append(candidate)
    return compiled(scale * activation_bytes(candidate))

  found = nearest_fit(start, chip, compiled(first.temporaries), compile_again)
  assert found.verified == 'compiled'
  assert found.total <= chip.usable
  changed = Problem(apply_overrides(start.experiment, found.change.settings), found.change.devices)
  assert asked == [changed]
  assert found.total == memory(changed, compiled(scale * activation_bytes(changed))).total
  assert found.change.size <= min(_all_fits(start, chip, scale))
  line = verdict(first, chip, start, found)
  assert 'does not fit' in line and 'verified by compiling it' in line  # noqa: PT018


def test_a_compile_that_says_otherwise_moves_on():
  start = problem(model__tables__rows=5000)
  first = memory(start, compiled(activation_bytes(start)))
  chip = _chip(first.total - 1)
  sizes = []

  def compile_again(candidate):
    sizes.append(candidate.tokens)
    return compiled(activation_bytes(candidate) if len(sizes) > 1 else chip.usable)

  found = nearest_fit(start, chip, compiled(first.temporaries), compile_again)
  assert len(sizes) == 2
  assert found.verified == 'compiled'


def test_more_devices_are_named_where_only_they_help():
  start = problem(8, pretrain__batch_segments=8, model__tables__rows=4_000_000, model__tables__dtype='bfloat16')
  state = state_bytes(start)
  chip = _chip(state.total - state.tables / 3)
  found = nearest_fit(start, chip, compiled(0, 8), lambda candidate: compiled(0, candidate.devices))
  # 8 segments do not divide over more data and fsdp devices, so nothing can be done but by the model axis: not tried.
  assert found is None
  wider = Problem(apply_overrides(start.experiment, {'pretrain.batch_segments': 64}), 8)
  found = nearest_fit(wider, chip, compiled(0, 8), lambda candidate: compiled(0, candidate.devices))
  assert found.change.devices == 16
  assert found.change.settings == {'mesh.data': 16, 'mesh.fsdp': 1, 'mesh.model': 1}
  assert '--devices 16 ' in verdict(memory(wider, compiled(0, 8)), chip, wider, found)
  nothing = nearest_fit(wider, _chip(1e5), compiled(0, 8), lambda candidate: compiled(0))
  assert nothing is None
  assert 'no change' in verdict(memory(wider, compiled(0)), _chip(1000.0), wider, None)


def test_every_chip_is_complete_and_found_by_name():
  for chip in CHIPS:
    assert find_chip(None, chip.name.upper(), 1) == chip == find_chip(chip.platform, chip.name, 1)
    assert chip.flops > 1e14
    assert 1e10 < chip.memory < 1e12
    assert chip.network <= chip.link < chip.bandwidth
  assert find_chip('cpu', None, 4).memory * 4 == pytest.approx(find_chip('cpu', None, 1).memory)
  assert tpu_topology('H100', 8) is None
  assert tpu_topology('v5e', 7) is None


@pytest.fixture
def launch(tmp_path):
  path = tmp_path / 'launch.py'
  path.write_text('from toy import EXPERIMENT as experiment\n')
  return str(path)


@pytest.mark.parametrize(
  ('words', 'expected'),
  [
    (['--devices', '8', '--chip', 'H1000'], "--chip got 'H1000'; nearest is 'H100'"),
    (['--devices', '8', '--platform', 'gpu'], "--platform got 'gpu'; expected one of: cpu, cuda, tpu"),
    (['--devices', '8', '--platform', 'tpu', '--chip', 'H100'], "of platform 'cuda', not 'tpu'"),
    (['--devices', '0'], '--devices got 0; expected at least 1'),
    (['--devices', '8', '--mesh', '3,1,1'], 'mesh 3 x 1 x 1 does not cover the 8 devices'),
    (['--devices', '8', '--mesh', '8,1'], "--mesh got '8,1'; expected data,fsdp,model"),
    (['--devices', '8', '--mesh', '8,x,1'], "--mesh got '8,x,1'"),
    (['--devices', '16'], 'batch_segments 8 does not divide over 16 devices (mesh data x fsdp); for example --set'),
    (['--devices', '8', '--set', 'model.tables.row=1'], "nearest is 'rows'"),
    (
      ['--devices', '8', '--set', 'pretrain.uniform_negatives=9'],
      'is 9; expected a multiple of pretrain.batch_segments 8',
    ),
  ],
)
def test_a_mistake_is_one_line(launch, capsys, words, expected):
  assert main(['plan', launch, *words]) == 2
  error = capsys.readouterr().err
  assert error.startswith('pinfm: error: ')
  assert error.count('\n') == 1
  assert expected in error


def test_every_option_s_columns_are_in_the_batch():
  """The columns are those that the pipeline makes: widths in bytes an event, and those of the draws."""
  plain = batch_bytes(problem())
  events = 8 * 16
  for settings, more in (
    ({'pretrain__pack': True}, 4 * events),
    ({'model__tower__time_gap_buckets': 8}, 4 * events),
    ({'model__content': True, 'model__content_width': 24}, 48 * events),
    ({'pretrain__log_q': 'counts'}, 4 * events),
    ({'pretrain__uniform_negatives': 32}, 32 * 8),
    ({'pretrain__uniform_negatives': 32, 'pretrain__log_q': 'counts'}, 4 * events + 32 * 12),
  ):
    assert batch_bytes(problem(**settings)) == plain + more, settings
  sketch = state_bytes(problem(pretrain__log_q='sketch', pretrain__sketch_width=1024))
  assert sketch.rest == state_bytes(problem()).rest + 4 * 1024 * 4 + 4
