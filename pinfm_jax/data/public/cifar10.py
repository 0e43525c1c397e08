"""CIFAR-10: as folders of images (unpacked, or in a tar of any compression) or as the standard binary batches.

Folders: train/<class>/NNNN.jpg and test/<class>/NNNN.jpg (or .png), classes numbered in alphabetical order, which is
CIFAR-10's own. Binary batches: data_batch_1.bin to data_batch_5.bin and test_batch.bin, 3,073 bytes an image.
"""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pinfm_jax.data.public.archive import is_archive
from pinfm_jax.errors import UserError

CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
SIDE = 32
_RECORD = 1 + 3 * SIDE * SIDE
_SUFFIXES = ('.jpg', '.jpeg', '.png')


@dataclass(frozen=True)
class Images:
  """Images and their classes: pixels uint8 [N, 32, 32, 3], labels int32 [N]."""

  pixels: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, rows: slice | np.ndarray) -> 'Images':
    return Images(self.pixels[rows], self.labels[rows])


def as_floats(pixels: np.ndarray) -> np.ndarray:
  """float32 in [0, 1]."""
  return pixels.astype(np.float32) / np.float32(255)


def load(directory: Path | str, split: str) -> Images:
  """Reads a split, in the order of class and file name, or of the binary files.

  Args:
    directory: holds `train/` and `test/`, or an archive of them, or the binary batches (maybe in
      cifar-10-batches-bin/, as their archive unpacks).
    split: 'train' or 'test'.

  Raises:
    UserError: nothing of the kind is there, or a file is damaged.
  """
  if split not in ('train', 'test'):
    raise UserError(f"split is '{split}'; expected train or test")
  directory = Path(directory)
  for place in (directory, directory / 'cifar-10-batches-bin'):
    if (place / 'test_batch.bin').exists() or (place / 'data_batch_1.bin').exists():
      return _binary(place, split)
  if (directory / split).is_dir():
    files = ((str(path), path.read_bytes()) for path in sorted((directory / split).glob('*/*')) if _is_image(path.name))
    return _decoded(files, directory / split)
  archives = sorted(path for path in directory.glob('*') if is_archive(path.name)) if directory.is_dir() else []
  if len(archives) == 1:
    return _decoded(_members(archives[0], split), archives[0])
  raise UserError(
    f'{directory} holds {"several archives" if archives else "no CIFAR-10"}; expected train/ and test/ with a folder '
    'a class, one archive of them, or data_batch_1.bin to data_batch_5.bin and test_batch.bin'
  )


def shuffled(images: Images, seed: int = 0) -> Images:
  """The same images in a drawn order: folders come sorted by class, so their head is of one class alone."""
  return images[np.random.default_rng(seed).permutation(len(images))]


def _members(archive: Path, split: str) -> Iterator[tuple[str, bytes]]:
  """The split's images of an archive, in the order of their names (an archive's own order is chance)."""
  found = []
  try:
    with tarfile.open(archive) as bundle:
      for member in bundle:
        parts = Path(member.name).parts
        if member.isreg() and len(parts) >= 3 and parts[-3] == split and _is_image(member.name):
          found.append(('/'.join(parts[-3:]), bundle.extractfile(member).read()))
  except (tarfile.TarError, EOFError, OSError) as error:
    raise UserError(f'{archive}: damaged or not a tar archive ({error}); get it again') from None
  return iter(sorted(found))


def _decoded(files: Iterator[tuple[str, bytes]], source: Path) -> Images:
  pixels, labels = [], []
  for name, content in files:
    folder = Path(name).parent.name
    if folder not in CLASSES:
      raise UserError(f"{source}: the class '{folder}' is not one of CIFAR-10's ({', '.join(CLASSES)})")
    try:
      with Image.open(io.BytesIO(content)) as image:
        pixels.append(np.asarray(image.convert('RGB')))
    except (UnidentifiedImageError, OSError) as error:
      raise UserError(f'{source}: {name} is not a readable image ({error}); get it again') from None
    if pixels[-1].shape != (SIDE, SIDE, 3):
      raise UserError(f'{source}: {name} is {pixels[-1].shape[1]} x {pixels[-1].shape[0]}; expected {SIDE} x {SIDE}')
    labels.append(CLASSES.index(folder))
  if not labels:
    raise UserError(f'{source} holds no images; expected <class>/NNNN.jpg')
  return Images(np.stack(pixels), np.asarray(labels, np.int32))


def _binary(directory: Path, split: str) -> Images:
  names = [f'data_batch_{i}.bin' for i in range(1, 6)] if split == 'train' else ['test_batch.bin']
  records = []
  for name in names:
    path = directory / name
    if not path.exists():
      raise UserError(f'{directory} has no {name}; expected {", ".join(names)}')
    content = np.fromfile(path, np.uint8)
    if not content.size or content.size % _RECORD:
      raise UserError(f'{path} has {content.size} bytes; expected a multiple of {_RECORD}: damaged or cut short')
    records.append(content.reshape(-1, _RECORD))
  records = np.concatenate(records)
  if records[:, 0].max() >= len(CLASSES):
    raise UserError(
      f'{directory}: a label of {records[:, 0].max()}; expected 0 to 9 (CIFAR-100 has two labels an image)'
    )
  pixels = records[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
  return Images(np.ascontiguousarray(pixels), records[:, 0].astype(np.int32))


def _is_image(name: str) -> bool:
  return name.lower().endswith(_SUFFIXES)
