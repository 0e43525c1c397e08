"""Nested dictionaries of arrays in one .npz file, without pickle: the entry 'a/b' is tree['a']['b']."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def plain_arrays(tree: Any) -> Any:
  """The tree with NumPy leaves; floats of any width become float32."""
  if isinstance(tree, Mapping):
    return {name: plain_arrays(value) for name, value in tree.items()}
  array = np.asarray(tree)
  return array if array.dtype.kind in 'iub' else array.astype(np.float32)


def save_arrays(path: Path, tree: Mapping[str, Any]) -> None:
  """Writes a tree of NumPy arrays."""
  with open(path, 'wb') as file:
    np.savez(file, **_flatten(tree))


def load_arrays(path: Path) -> dict[str, Any]:
  """Reads what `save_arrays` wrote."""
  tree: dict[str, Any] = {}
  with np.load(path, allow_pickle=False) as archive:
    for name in archive.files:
      *parents, last = name.split('/')
      node = tree
      for parent in parents:
        node = node.setdefault(parent, {})
      node[last] = archive[name]
  return tree


def _flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, np.ndarray]:
  flat = {}
  for name, value in tree.items():
    flat |= _flatten(value, f'{prefix}{name}/') if isinstance(value, Mapping) else {prefix + name: value}
  return flat
