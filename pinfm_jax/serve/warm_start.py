"""Starts a training run from a bundle (tables, tower, maybe ranker) or from imported table rows.

Implements `train.restore.Start`: the run's own checkpoint and an explicit resume come first. Adagrad accumulators,
optimizer state, step and the learnable temperature start fresh: a bundle has none of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import AxisType, Mesh

from pinfm_jax.config import TableConfig, TowerConfig
from pinfm_jax.data.featurize import FeatureSchema
from pinfm_jax.data.info import DatasetInfo
from pinfm_jax.errors import UserError
from pinfm_jax.serve.convert import TableFile, ranker_of_bundle
from pinfm_jax.serve.import_tables import IMPORTED, ImportedManifest, mapped_rows
from pinfm_jax.serve.manifest import MANIFEST
from pinfm_jax.serve.quantize import dequantise
from pinfm_jax.train.checkpoint import described
from pinfm_jax.train.sharding import put_whole
from pinfm_jax.train.step import TrainState

Rows = Iterator[tuple[np.ndarray, np.ndarray]]
_BLOCK_ROWS = 1 << 16
_HASH = ('sub_tables', 'rows', 'width', 'hash_seed')


class StoredRows(Protocol):
  """Table rows on disk; other rows of the table keep the values of a fresh one."""

  def between(self, first: int, last: int) -> Rows:
    """Those with numbers from first to last - 1: ascending numbers and float32 rows, a block at a time."""


@dataclass(frozen=True)
class ImportedRows:
  """What `import_tables` wrote."""

  directory: Path
  manifest: ImportedManifest

  def between(self, first: int, last: int) -> Rows:
    """See `StoredRows`."""
    numbers, rows = mapped_rows(self.directory, self.manifest)
    low, high = np.searchsorted(numbers, [first, last])
    for start in range(low, high, _BLOCK_ROWS):
      block = slice(start, min(start + _BLOCK_ROWS, high))
      yield numbers[block], np.asarray(rows[block])


@dataclass(frozen=True)
class BundleRows:
  """The tables of a bundle, unpacked."""

  file: TableFile
  storage: str

  def between(self, first: int, last: int) -> Rows:
    """See `StoredRows`."""
    layout = self.file.layout
    last, size = min(last, layout.sub_tables * layout.rows), layout.row_bytes
    with open(self.file.path, 'rb') as file:
      file.seek(first * size)
      for start in range(first, last, _BLOCK_ROWS):
        end = min(start + _BLOCK_ROWS, last)
        packed = np.frombuffer(file.read((end - start) * size), np.uint8).reshape(-1, size)
        yield np.arange(start, end), dequantise(packed, self.storage)


@dataclass(frozen=True)
class StoredStart:
  """Implements `Start`: a fresh state with rows, parameters and constants of elsewhere in their places.

  Attributes:
    path: where they are from, for messages.
    rows: of the tables.
    params: top-level parameter groups that are taken.
    constants: normalisation of the dense features that the parameters were trained with; empty = the run's own.
  """

  path: Path
  rows: StoredRows
  params: Mapping[str, Any]
  constants: Mapping[str, np.ndarray]

  def begin(self, create: Callable[[], TrainState], abstract: TrainState) -> TrainState:
    """The state to start from; see `train.restore.Start`.

    Raises:
      UserError: parameters that differ from the model's.
    """
    self._check(abstract)
    state = create()
    params, constants = dict(state.params), state.constants
    for group, values in self.params.items():
      params[group] = _placed(values, params[group])
    if self.constants:
      fields = {name: getattr(constants, name) for name in self.constants}
      constants = type(constants)(**_placed(dict(self.constants), fields))
    tables, state = state.tables, state.replace(tables=None, params=params, constants=constants)
    return state.replace(tables=tables._replace(rows_GE=filled_rows([tables.rows_GE], self.rows)))

  def _check(self, abstract: TrainState) -> None:
    wanted = {group: abstract.params[group] for group in self.params if group in abstract.params}
    have, expected = described(dict(self.params)), described(wanted)
    for name in (*expected, *have):
      if have.get(name) != expected.get(name):
        raise UserError(
          f'{self.path} holds {name} as {have.get(name)} where the model has {expected.get(name)}; '
          'use the model settings it was trained with'
        )


def open_start(
  path: str | Path,
  setting: str,
  tables: TableConfig,
  info: DatasetInfo,
  schema: FeatureSchema | None = None,
  tower: TowerConfig | None = None,
) -> StoredStart:
  """What `pretrain.start_from` or `finetune.start_from` names.

  Args:
    path: a bundle, or the output of `pinfm import-tables`.
    setting: its name, for messages.
    tables: of the model that starts.
    info: of the data set it trains on.
    schema: inputs of the ranker that starts; None = just the tower and the tables are taken.
    tower: of the model that starts; None = not compared with a bundle's.

  Raises:
    UserError: neither is there, or it does not fit the model or the data.
  """
  path = Path(path)
  if (path / IMPORTED).is_file():
    manifest = ImportedManifest.read(path)
    _check_same(path, {name: getattr(manifest, name) for name in _HASH}, _layout(tables))
    _check_same(path, {'item ids': manifest.id_type}, {'item ids': info.id_type.item})
    return StoredStart(path, ImportedRows(path, manifest), {}, {})
  if not (path / MANIFEST).is_file():
    raise UserError(f'{setting} is {str(path)!r}; expected a bundle, or what `pinfm import-tables` wrote')
  ranker = ranker_of_bundle(path)
  if ranker.rows_GE is None:
    raise UserError(f'{setting} is {str(path)!r}, a ranker without PinFM: there is nothing to start from')
  file = ranker.rows_GE.parts
  _check_same(path, {name: getattr(file.layout, name) for name in _HASH}, _layout(tables))
  names = ('actions', 'surfaces')
  have = {name: list(getattr(ranker, name)) for name in names} | {'item ids': ranker.id_type.item}
  _check_same(path, have, {name: list(getattr(info, name)) for name in names} | {'item ids': info.id_type.item})
  if tower is not None:  # what shapes do not tell
    _check_same(path, _meaning(ranker.model_config.tower), _meaning(tower))
  rows = BundleRows(file, ranker.rows_GE.storage)
  if schema is None or not ranker.schema.labels:  # or a tower alone, whose ranker starts fresh
    return StoredStart(path, rows, {'pinfm': ranker.params['pinfm']}, {})
  _check_same(path, asdict(ranker.schema), asdict(schema))
  constants = {name: np.asarray(value) for name, value in vars(ranker.stats).items()}
  return StoredStart(path, rows, ranker.params, constants)


def filled_rows(table: list[jax.Array], rows: StoredRows) -> jax.Array:
  """A sharded table with some rows replaced, a device at a time, in place.

  Args:
    table: a list with the table alone, which is emptied: no other reference to it may live, or it is copied.
    rows: what is put in.
  """
  whole = table.pop()
  shape, sharding, kind = whole.shape, whole.sharding, whole.dtype
  shards = [(shard.device, shard.index[0].indices(shape[0])[:2], shard.data) for shard in whole.addressable_shards]
  del whole
  put = jax.jit(lambda part, at, block: part.at[at].set(block, mode='drop'), donate_argnums=0)
  parts = []
  while shards:
    device, (first, last), part = shards.pop(0)
    # A program for one device does not run under the mesh of the whole state that the caller has set.
    with jax.set_mesh(Mesh(np.array([device]), ('device',), axis_types=(AxisType.Auto,))):
      for numbers, block in rows.between(first, last):
        at = np.full(_BLOCK_ROWS, last - first, np.int32)  # one size, hence one program; what is beyond is dropped
        at[: len(numbers)] = numbers - first
        padded = np.zeros((_BLOCK_ROWS, shape[1]), kind)
        padded[: len(block)] = block.astype(ml_dtypes.bfloat16).view(np.uint16) if kind == jnp.uint16 else block
        part = put(part, *jax.device_put((at, padded), device))
        part.block_until_ready()  # the next block may then reuse this one's memory
    parts.append(part)
  return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _placed(values: Any, like: Any) -> Any:
  """Host arrays where the arrays of `like` are."""
  return jax.tree.map(lambda value, leaf: put_whole({'x': np.asarray(value)}, leaf.sharding)['x'], values, like)


def _meaning(tower: TowerConfig) -> dict[str, Any]:
  return {f'model.tower.{name}': getattr(tower, name) for name in ('backbone', 'heads', 'rotary', 'dot_product')}


def _layout(tables: TableConfig) -> dict[str, int]:
  return {name: getattr(tables, name) for name in _HASH}


def _check_same(path: Path, have: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
  for name in expected:
    if have.get(name) != expected[name]:
      raise UserError(
        f'{path} was made for {name} {_short(have.get(name))}, this run has {_short(expected[name])}: '
        'start from what was made with the same, or change the setting'
      )


def _short(value: Any) -> str:
  text = str(list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value)
  return text if len(text) <= 200 else f'{text[:197]}...'
