"""From a bundle back to what it was made of: to write it again for a newer JAX or another form, or to train on."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pinfm_jax.config import PinFMConfig, RankerConfig
from pinfm_jax.files import complete_directory
from pinfm_jax.model.ranker import DenseStats
from pinfm_jax.overrides import from_dict
from pinfm_jax.serve import checksums
from pinfm_jax.serve.arrays import load_arrays
from pinfm_jax.serve.bundle import (
  CHECKSUMS,
  PARAMETERS,
  TABLES,
  TrainedRanker,
  carried_over,
  check_files,
  exported_content,
  manifest_of,
  write_content,
)
from pinfm_jax.serve.items import map_items
from pinfm_jax.serve.manifest import Manifest, TableLayout
from pinfm_jax.serve.quantize import PackedRows
from pinfm_jax.train.finetune import feature_spec

_BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class TableFile:
  """The packed rows of a bundle's tables.bin, read a block at a time, as often as wanted."""

  path: Path
  layout: TableLayout
  block_rows: int = _BLOCK_ROWS

  def __iter__(self) -> Iterator[np.ndarray]:
    """Consecutive parts, uint8 [rows, row_bytes]."""
    size = self.layout.row_bytes
    with open(self.path, 'rb') as file:
      while block := file.read(self.block_rows * size):
        yield np.frombuffer(block, np.uint8).reshape(-1, size)


def ranker_of_bundle(path: str | Path) -> TrainedRanker:
  """What a bundle of any format version was made of; `export_bundle` makes the same bundle of it again.

  The programs are not read, so the bundle's JAX range may be past. The tables stay on disk (`TableFile`): written in
  the storage that they have, they keep their bytes.

  Raises:
    UserError: no bundle there, or a damaged one.
  """
  path = Path(path)
  manifest = Manifest.read(path)
  check_files(path, manifest.files)
  arrays, model = load_arrays(path / PARAMETERS), from_dict(PinFMConfig, manifest.model)
  tables = manifest.tables
  return TrainedRanker(
    model_config=model,
    ranker_config=from_dict(RankerConfig, manifest.ranker),
    schema=manifest.schema,
    spec=feature_spec(manifest.schema),
    params=arrays['params'],
    rows_GE=PackedRows(TableFile(path / TABLES, tables), tables.storage) if tables else None,
    stats=DenseStats(**arrays['stats']) if 'stats' in arrays else None,
    actions=manifest.actions,
    surfaces=manifest.surfaces,
    id_type=manifest.id_type,
    history_block=manifest.history_block,
    utility=manifest.utility,
    run=manifest.run,
    items=map_items(path, model) if tables and model.content else None,
    clip=tables.clip if tables else False,
    **carried_over(path, manifest),
  )


def refresh_bundle(bundle: str | Path, out: str | Path, overwrite: bool = False) -> Path:
  """Lowers a bundle's programs again for the JAX that runs here; all else stays as it is.

  The tables are hard links to the bundle's where the file system allows it, else copies.

  Args:
    bundle: of any format version and JAX range.
    out: directory to make.
    overwrite: replace a bundle that is there.

  Raises:
    UserError: see `ranker_of_bundle` and `export_bundle`.
  """
  bundle, out = Path(bundle), Path(out)
  earlier, ranker = Manifest.read(bundle), ranker_of_bundle(bundle)
  kept = [entry for entry in earlier.files if entry.name in (TABLES, CHECKSUMS)]
  with complete_directory(out, overwrite) as directory:
    content = exported_content(ranker, earlier.tables.storage if earlier.tables else 'int4')
    names = write_content(directory, content)
    for entry in kept:
      link_or_copy(bundle / entry.name, directory / entry.name)
    files = (*kept, *(checksums.describe(directory, name)[0] for name in names))
    manifest_of(ranker, content.layout, files).write(directory)
  return out


def link_or_copy(source: Path, target: Path) -> None:
  """A second name of a file, or a copy where that cannot be."""
  try:
    os.link(source.resolve(), target)
  except OSError:
    shutil.copyfile(source, target)
