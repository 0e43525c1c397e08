"""The items that a bundle knows: their content and whether training saw them, for a model with content vectors.

  items/keys.bin     uint64 item keys, ascending
  items/content.bin  float16 content of unit length, a row an item
  items/known.bin    one byte an item, 1 = training saw it; only for a model that was trained with hidden ids

Numbers are little-endian. The files are memory-mapped: a lookup touches the pages of a binary search and of the rows.
"""

from pathlib import Path

import numpy as np

from pinfm_jax.config import PinFMConfig
from pinfm_jax.data.tokens import ItemContent
from pinfm_jax.errors import UserError

KEYS, CONTENT, KNOWN = 'items/keys.bin', 'items/content.bin', 'items/known.bin'


def write_items(directory: Path, items: ItemContent | None, model: PinFMConfig) -> list[str]:
  """Writes the files that a model with content needs.

  Args:
    directory: the bundle's.
    items: what to write.
    model: the model's configuration.

  Returns:
    Their names.

  Raises:
    ValueError: no items, or items that do not fit the model.
  """
  if (
    items is None or items.vectors_VW.shape[1] != model.content_width or (items.known_V is None) == bool(model.id_mask)
  ):
    raise ValueError(
      f'a model with content of width {model.content_width} and id_mask {model.id_mask} needs the content of its items'
      f'{" and which of them training saw" if model.id_mask else ""}'
    )
  columns = {KEYS: items.keys_V.astype('<u8'), CONTENT: items.vectors_VW.astype('<f2')}
  if items.known_V is not None:
    columns[KNOWN] = items.known_V.astype(np.uint8)
  (directory / 'items').mkdir(exist_ok=True)
  for name, column in columns.items():
    with open(directory / name, 'wb') as file:
      file.write(np.ascontiguousarray(column).data)
  return list(columns)


def map_items(directory: Path, model: PinFMConfig) -> ItemContent:
  """Maps the files.

  Raises:
    UserError: their sizes do not fit each other.
  """
  count = (directory / KEYS).stat().st_size // 8
  expected = {KEYS: 8 * count, CONTENT: 2 * model.content_width * count} | ({KNOWN: count} if model.id_mask else {})
  for name, size in expected.items():
    if not (directory / name).is_file() or (directory / name).stat().st_size != size:
      raise UserError(f'{directory / name} does not hold {count} items: export the bundle again')
  if not count:  # an empty file cannot be mapped
    vectors_VW = np.zeros((0, model.content_width), np.float16)
    return ItemContent(np.zeros(0, np.uint64), vectors_VW, np.zeros(0, bool) if model.id_mask else None)
  return ItemContent(
    _map(directory / KEYS, '<u8', (count,)),
    _map(directory / CONTENT, '<f2', (count, model.content_width)),
    _map(directory / KNOWN, np.bool_, (count,)) if model.id_mask else None,
  )


def _map(path: Path, dtype: object, shape: tuple[int, ...]) -> np.ndarray:
  # A plain array over the map: indexing a np.memmap returns memmaps, which is slower and means nothing here.
  return np.asarray(np.memmap(path, dtype, 'r', shape=shape))
