"""Cells of an evaluation: what is finished stands in a file, and is not made again."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pinfm_jax.errors import UserError


def save_cell(path: Path, **arrays: np.ndarray) -> None:
  """Writes an .npz that appears only when it is complete.

  Raises:
    UserError: a value is NaN or infinite: nothing is kept, where it would stop the tables later.
  """
  broken = [name for name, array in arrays.items() if array.dtype.kind == 'f' and not np.isfinite(array).all()]
  if broken:
    raise UserError(f'{path}: {", ".join(broken)} is NaN or infinite for some examples; is the model finite?')
  path.parent.mkdir(parents=True, exist_ok=True)
  partial_path = path.with_name(f'{path.stem}.partial.npz')
  np.savez_compressed(partial_path, **arrays)
  partial_path.replace(path)


def filled(rows_N: np.ndarray, size: int) -> list[np.ndarray]:
  """The rows in parts of one size, so that one compiled program serves all; the last repeats its first row."""
  parts = [rows_N[start : start + size] for start in range(0, len(rows_N), size)]
  return [np.concatenate([part, np.full(size - len(part), part[0])]) for part in parts]


def fingerprint(params: Any) -> str:
  """Tells one network's weights from another's."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:16]
