"""A trained PinFM to build into a model of one's own: its configuration, its parameters, its item vectors.

Public API, with `model.pinfm.PinFM` (`items`, `encode`, `cross`, `targets`) and `model.pinfm.EventBatch`:

  pretrained = load_pretrained('runs/quickstart')          # or a bundle
  class MyRanker(nn.Module):                               # ... has PinFM(pretrained.model, name='pinfm') inside
  params = {**my_fresh_params, 'pinfm': pretrained.params}
  vectors_UCV = pretrained.vectors(key_words(item_keys))   # frozen tables; to train them, see train.step.Task
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pinfm_jax.config import PinFMConfig
from pinfm_jax.data.info import IdTypes
from pinfm_jax.errors import UserError
from pinfm_jax.launch import saved_experiment
from pinfm_jax.model.hashing import hash_rows
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.serve.manifest import MANIFEST
from pinfm_jax.serve.quantize import as_float32, dequantise
from pinfm_jax.stages.context import Run
from pinfm_jax.train.restore import stored_state


@dataclass(frozen=True)
class Pretrained:
  """A trained PinFM.

  Attributes:
    model: its configuration, vocabulary sizes filled in: build `PinFM(model)` with it.
    params: the parameters of that module, nested dictionaries of NumPy arrays.
    rows: table rows by number: a checkpoint's [S * R, E] (float32, or the bits of bfloat16), or a bundle's `RowSource`.
    storage: how the rows of a bundle are packed; None = a checkpoint's.
    actions: names, bit a of `EventBatch.actions_UL` is action a.
    surfaces: names, in the order of `EventBatch.surface_UL`'s codes.
    id_type: how ids are spelled (`data.events.id_key` makes keys of them).
  """

  model: PinFMConfig
  params: Mapping[str, Any]
  rows: Any
  storage: str | None
  actions: tuple[str, ...]
  surfaces: tuple[str, ...]
  id_type: IdTypes

  def vectors(self, words: np.ndarray) -> np.ndarray:
    """Id vectors of items: each one's S rows concatenated (PinFM section 2).

    Args:
      words: uint32 [..., 2] (`model.hashing.key_words`).

    Returns:
      float32 [..., S * E]; an item that training never saw gets rows of other items or untrained ones.
    """
    tables = self.model.tables
    if self.storage is not None:
      rows = dequantise(self.rows.rows(words), self.storage)
    else:
      rows = as_float32(self.rows[hash_rows(words, tables.sub_tables, tables.rows, tables.hash_seed)])
    return rows.reshape(*words.shape[:-1], tables.item_width)


def load_pretrained(path: str | Path, seed: int = 0, arm: str | None = None) -> Pretrained:
  """Opens a bundle, or reads a run's checkpoint: that of `pretrain.use_checkpoint`, of a ranker the newest.

  A checkpoint's tables are read into memory; a bundle's stay mapped from disk, as they are packed.

  Args:
    path: a bundle, or the workdir of `pinfm run`.
    seed: of the run.
    arm: the fine-tuned ranker whose PinFM to take; None = the pretrained one.

  Raises:
    UserError: neither a bundle nor a run, not trained yet, no such arm, or a ranker without PinFM.
  """
  path = Path(path)
  return _of_bundle(path) if (path / MANIFEST).is_file() else _of_run(path, seed, arm)


def _of_bundle(path: Path) -> Pretrained:
  bundle = load_bundle(path)
  manifest = bundle.manifest
  if manifest.pinfm is None:
    raise UserError(f'{path} is a ranker without PinFM: there is nothing pretrained in it')
  names = (manifest.actions, manifest.surfaces, manifest.id_type)
  return Pretrained(manifest.pinfm, bundle.params['pinfm'], bundle.rows, manifest.tables.storage, *names)


def _of_run(path: Path, seed: int, arm: str | None) -> Pretrained:
  run = Run(saved_experiment(path), path)
  directory = run.pretrain_directory(seed)
  if arm is not None:
    found = [known for known in run.experiment.arms if known.name == arm]
    if not found:
      raise UserError(f"no arm '{arm}'; expected one of: {', '.join(known.name for known in run.experiment.arms)}")
    directory, run = run.arm_directory(seed, found[0]), run.of_arm(found[0])
  stored = stored_state(directory, run.experiment.pretrain.use_checkpoint if arm is None else 'newest')
  model, info = run.model, run.dataset.info
  if not stored.has_tables:
    raise UserError(f"{directory} is a ranker without PinFM; name an arm whose ranker.sequence is 'pinfm'")
  params, rows_GE = stored.parts('params')['params']['pinfm'], stored.table(model.tables)
  return Pretrained(model, params, rows_GE, None, info.actions, info.surfaces, info.id_type)
