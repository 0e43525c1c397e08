import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.errors import UserError
from pinfm_jax.serve.quantize import PackedRows, dequantise, dequantise_on_device, quantise, quantise_parts, row_bytes


@pytest.fixture(scope='module')
def rows() -> np.ndarray:
  return np.random.default_rng(0).normal(size=(20_000, 32)).astype(np.float32)


def test_a_row_takes_the_published_share_of_float16(rows):
  for storage, share in (('int4', 0.3125), ('int8', 0.5625)):
    for clip in (False, True):
      assert quantise(rows[:100], storage, clip).nbytes == share * rows[:100].astype(np.float16).nbytes
  assert row_bytes(32, 'int4') / 64 == 0.3125
  assert row_bytes(32, 'int8') / 64 == 0.5625
  assert row_bytes(32, 'float32') == 128


@pytest.mark.parametrize(('storage', 'error'), [('int4', 0.079), ('int8', 0.0046)])
def test_relative_error_on_gaussian_rows(rows, storage, error):
  restored = dequantise(quantise(rows, storage), storage)
  assert np.linalg.norm(restored - rows) / np.linalg.norm(rows) == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize(('storage', 'error'), [('int4', 0.0700), ('int8', 0.00433)])
def test_the_least_squared_error_is_lower_at_the_same_bytes(rows, storage, error):
  plain, clipped = quantise(rows, storage), quantise(rows, storage, clip=True)
  assert clipped.shape == plain.shape
  off = [((dequantise(packed, storage) - rows) ** 2).sum(axis=1) for packed in (plain, clipped)]
  assert (off[1] <= off[0] * (1 + 1e-5)).all()  # of every row
  assert np.sqrt(off[1].sum() / (rows**2).sum()) == pytest.approx(error, rel=0.01)


def test_the_search_comes_close_to_an_exhaustive_one(rows):
  rows = rows[:300].astype(np.float64)
  low, span = rows.min(axis=1, keepdims=True), np.ptp(rows, axis=1, keepdims=True)
  best = np.full(len(rows), np.inf)
  for bottom in np.arange(-0.02, 0.2, 0.01):
    for top in np.arange(-0.02, 0.2, 0.01):
      scale, bias = (1 - bottom - top) * span / 15, low + bottom * span
      codes = np.clip(np.rint((rows - bias) / scale), 0, 15)
      best = np.minimum(best, ((bias + scale * codes - rows) ** 2).sum(axis=1))
  found = ((dequantise(quantise(rows, 'int4', clip=True), 'int4') - rows) ** 2).sum()
  assert found <= 1.02 * best.sum()


@pytest.mark.parametrize('clip', [False, True])
@pytest.mark.parametrize('scale', [1e-8, 1e-6, 1e-3, 1.0, 6e4])
def test_any_scale_gives_finite_rows_no_worse_than_plain(rows, scale, clip):
  rows = rows[:500] / np.abs(rows).max() * np.float32(scale)
  plain, found = (dequantise(quantise(rows, 'int4', c), 'int4') for c in (False, clip))
  assert np.isfinite(found).all()
  assert ((found - rows) ** 2).sum() <= ((plain - rows) ** 2).sum() * (1 + 1e-5)


def test_no_rows_at_all():
  for storage in ('int4', 'int8', 'float32'):
    packed = quantise(np.zeros((0, 4), np.float32), storage, clip=True)
    assert packed.shape == (0, row_bytes(4, storage))
    assert dequantise(packed, storage).shape == (0, 4)


@pytest.mark.parametrize('scale', [1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize(('storage', 'levels'), [('int4', 15), ('int8', 255)])
def test_no_value_is_off_by_more_than_half_a_step(rows, storage, levels, scale):
  rows = rows[:2000] * np.float32(scale) + np.float32(scale)
  off = np.abs(dequantise(quantise(rows, storage), storage) - rows).max(axis=1)
  step = np.ptp(rows, axis=1) / levels
  half_precision = np.abs(rows).max(axis=1) * 2.0**-10 + 2.0**-24 * levels  # of the bias, and of tiny scales
  assert (off <= 0.501 * step + half_precision).all()


@pytest.mark.parametrize('clip', [False, True])
@pytest.mark.parametrize('storage', ['int4', 'int8'])
def test_constant_rows_are_exact_to_float16(storage, clip):
  values = np.array([0, 1, -0.02, 1e-7, 60_001, -65_504], np.float32)
  restored = dequantise(quantise(np.repeat(values[:, None], 8, axis=1), storage, clip), storage)
  np.testing.assert_array_equal(restored, np.repeat(values.astype(np.float16).astype(np.float32)[:, None], 8, axis=1))


def test_codes_fit_the_rounded_constants():
  # The ends of this row lie between two float16 numbers; codes chosen for the unrounded ends would be off by one.
  row = np.linspace(1000.3, 1015.3, 16, dtype=np.float32)[None]
  packed = quantise(row, 'int4')
  restored = dequantise(packed, 'int4')
  scale, bias = packed[0, -4:].view('<f2').astype(np.float32)
  every_code = bias + scale * np.arange(16, dtype=np.float32)
  nearest = every_code[np.abs(row[0, :, None] - every_code).argmin(axis=1)]
  np.testing.assert_allclose(restored[0], nearest)


def test_byte_layout():
  packed = quantise(np.array([[2, 5, 17, 2.0]]), 'int4')  # scale 1, bias 2: codes 0, 3, 15, 0
  assert packed.tolist() == [[0x30, 0x0F, *np.array([1, 2], '<f2').tobytes()]]
  packed = quantise(np.array([[2, 257.0]]), 'int8')
  assert packed.tolist() == [[0, 255, *np.array([1, 2], '<f2').tobytes()]]


def test_float32_storage_is_exact(rows):
  np.testing.assert_array_equal(dequantise(quantise(rows[:10], 'float32'), 'float32'), rows[:10])


@pytest.mark.parametrize('storage', ['int4', 'int8', 'float32'])
def test_device_equals_host(rows, storage):
  packed = quantise(rows[:24], storage).reshape(2, 3, 4, -1)
  on_device = jax.jit(lambda x: dequantise_on_device(x, 32, storage))(jnp.asarray(packed))
  np.testing.assert_allclose(on_device, dequantise(packed, storage), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('clip', [False, True])
def test_parts_equal_the_whole(clip):
  rows = np.random.default_rng(0).normal(size=(150_000, 2)).astype(np.float32)
  whole = quantise(rows, 'int8', clip)
  np.testing.assert_array_equal(np.concatenate(list(quantise_parts(rows, 'int8', clip))), whole)
  np.testing.assert_array_equal(np.concatenate(list(quantise_parts(iter([rows[:7], rows[7:]]), 'int8', clip))), whole)


def test_packed_parts_pass_as_they_are():
  packed = quantise(np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32), 'int4')
  for part in quantise_parts(PackedRows([packed, packed[:2]], 'int4'), 'int4', clip=True):
    np.testing.assert_array_equal(part, packed[: len(part)])
  [other] = quantise_parts(PackedRows([packed], 'int4'), 'int8')
  np.testing.assert_array_equal(other, quantise(dequantise(packed, 'int4'), 'int8'))


@pytest.mark.parametrize('bad', [np.nan, np.inf, 1e5])
def test_values_that_cannot_be_stored_are_refused(bad):
  with pytest.raises(UserError, match='diverged'):
    quantise(np.array([[0, bad]]), 'int4')


def test_unfit_settings_are_refused():
  with pytest.raises(UserError, match='serve.storage=int8'):
    row_bytes(7, 'int4')
  with pytest.raises(UserError, match="'int2', expected one of int4, int8, float32"):
    row_bytes(8, 'int2')
