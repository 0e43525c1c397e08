"""CIFAR-10 as folders, as an archive and as binary batches: the same images, and clear words about damage."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pinfm_jax.data.public.cifar10 import CLASSES, Images, as_floats, load, shuffled
from pinfm_jax.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)


def _png(pixels: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, 'png')
  return buffer.getvalue()


@pytest.fixture
def folders(tmp_path: Path) -> Path:
  for i, name in enumerate(CLASSES):
    folder = tmp_path / 'test' / name
    folder.mkdir(parents=True)
    (folder / '0000.png').write_bytes(_png(PIXELS[i]))
    (folder / 'notes.txt').write_text('not an image')
  return tmp_path


def _same(images: Images) -> None:
  np.testing.assert_array_equal(images.pixels, PIXELS)
  np.testing.assert_array_equal(images.labels, range(10))
  assert images.labels.dtype == np.int32


def test_folders(folders: Path) -> None:
  _same(load(folders, 'test'))


def test_archive_in_any_order(folders: Path, tmp_path: Path) -> None:
  place = tmp_path / 'packed'
  place.mkdir()
  with tarfile.open(place / 'images.tar.xz', 'w:xz') as bundle:
    for name in reversed(CLASSES):
      bundle.add(folders / 'test' / name, f'test/{name}')
  _same(load(place, 'test'))
  with pytest.raises(UserError, match='holds no images'):
    load(place, 'train')


def test_binary_batches(tmp_path: Path) -> None:
  place = tmp_path / 'cifar-10-batches-bin'
  place.mkdir()
  records = np.concatenate([np.arange(10, dtype=np.uint8)[:, None], PIXELS.transpose(0, 3, 1, 2).reshape(10, -1)], 1)
  records.tofile(place / 'test_batch.bin')
  _same(load(tmp_path, 'test'))
  for i in range(1, 6):
    records[2 * i - 2 : 2 * i].tofile(place / f'data_batch_{i}.bin')
  _same(load(tmp_path, 'train'))
  (place / 'data_batch_3.bin').write_bytes(b'cut')
  with pytest.raises(UserError, match='multiple of 3073'):
    load(tmp_path, 'train')
  (place / 'data_batch_3.bin').unlink()
  with pytest.raises(UserError, match='has no data_batch_3.bin'):
    load(tmp_path, 'train')


def test_damage_has_a_name(folders: Path, tmp_path: Path) -> None:
  with pytest.raises(UserError, match='no CIFAR-10'):
    load(tmp_path / 'nowhere', 'test')
  with pytest.raises(UserError, match="split is 'validation'"):
    load(folders, 'validation')
  broken = folders / 'test' / 'cat' / '0001.jpg'
  broken.write_bytes(b'no image')
  with pytest.raises(UserError, match='0001.jpg is not a readable image'):
    load(folders, 'test')
  broken.write_bytes(_png(PIXELS[0][:16]))
  with pytest.raises(UserError, match='32 x 16'):
    load(folders, 'test')
  broken.unlink()
  (folders / 'test' / 'lion').mkdir()
  (folders / 'test' / 'lion' / '0000.png').write_bytes(_png(PIXELS[0]))
  with pytest.raises(UserError, match="class 'lion'"):
    load(folders, 'test')
  packed = tmp_path / 'packed'
  packed.mkdir()
  (packed / 'images.tar.xz').write_bytes(b'cut short')
  with pytest.raises(UserError, match='damaged'):
    load(packed, 'test')


def test_order_and_scale() -> None:
  images = Images(PIXELS, np.arange(10, dtype=np.int32))
  mixed = shuffled(images, 3)
  assert sorted(mixed.labels) == list(range(10))
  assert list(mixed.labels) != list(range(10))
  np.testing.assert_array_equal(mixed.pixels, PIXELS[mixed.labels])
  np.testing.assert_array_equal(shuffled(images, 3).labels, mixed.labels)
  assert as_floats(PIXELS).max() <= 1
  assert as_floats(PIXELS).dtype == np.float32


@pytest.mark.slow
def test_public_archive(pinfm_data: Path) -> None:
  test = load(pinfm_data / 'cifar10', 'test')
  assert len(test) == 10_000
  assert np.bincount(test.labels).tolist() == [1000] * 10
  assert 0.4 < as_floats(test.pixels).mean() < 0.52
