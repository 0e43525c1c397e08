"""The device mesh, the one table of logical axis rules, and the shardings of everything a training step touches."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pinfm_jax.config import MeshConfig
from pinfm_jax.errors import UserError

AXES = ('data', 'fsdp', 'model')
BATCH_AXES = ('data', 'fsdp')  # examples lie over these

# Logical axis of a parameter -> mesh axis. An axis that does not divide a dimension leaves it whole.
RULES = (('embed', 'fsdp'), ('mlp', 'model'), ('heads', 'model'), ('layers', None))


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
  """Sizes of the ('data', 'fsdp', 'model') axes over a number of devices; one may be 0 and takes what is left.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  sizes = [config.data, config.fsdp, config.model]
  if sizes.count(0) == 1:
    rest = int(np.prod([size for size in sizes if size]))
    sizes[sizes.index(0)] = devices // rest if devices % rest == 0 else 0
  if min(sizes) < 1 or int(np.prod(sizes)) != devices:
    raise UserError(
      f'mesh {config.data} x {config.fsdp} x {config.model} does not cover the {devices} devices; '
      'set sizes whose product is the number of devices; one may be 0 and takes what is left, if the others divide it'
    )
  return tuple(sizes)


def make_mesh(config: MeshConfig) -> Mesh:
  """A ('data', 'fsdp', 'model') mesh over all devices; one axis may be 0, which takes the devices left.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  return jax.make_mesh(mesh_sizes(config, jax.device_count()), AXES, axis_types=(AxisType.Auto,) * 3)


def parameter_shardings(mesh: Mesh, boxed: Any) -> Any:
  """Shardings of a parameter tree whose kernels carry logical axis names (`nn.with_logical_partitioning`)."""
  specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)
  shapes = nn.unbox(boxed)
  return jax.tree.map(lambda shape, spec: NamedSharding(mesh, _divisible(mesh, shape.shape, spec)), shapes, specs)


def table_sharding(mesh: Mesh, axes: tuple[str, ...] = AXES) -> NamedSharding:
  """Tables (and accumulators) by rows over the table axes; over the other axes they are replicated."""
  return NamedSharding(mesh, P(axes))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Examples over the data and fsdp axes."""
  return NamedSharding(mesh, P(BATCH_AXES))


def process_rows(mesh: Mesh, examples: int) -> np.ndarray:
  """Rows of a global batch of `examples` that this process's devices hold, ascending.

  Processes that share rows (a model axis across processes) all get them: each must supply what its devices hold.
  """
  blocks = _process_blocks(mesh)
  size = examples // (mesh.shape['data'] * mesh.shape['fsdp'])
  return (np.array(blocks)[:, None] * size + np.arange(size)).reshape(-1)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """A process's rows of the global batch (`process_rows`), as global arrays sharded by example."""
  sharding, blocks = batch_sharding(mesh), _process_blocks(mesh)
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  if len(blocks) == parts:
    return put_whole(batch, sharding)

  def put(value: np.ndarray) -> jax.Array:
    size = len(value) // len(blocks)

    def rows(index: tuple[slice, ...]) -> np.ndarray:
      place = blocks.index(index[0].start // size) * size
      return value[place : place + size]

    return jax.make_array_from_callback((size * parts, *value.shape[1:]), sharding, rows)

  return {name: put(value) for name, value in batch.items()}


def put_whole(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """Arrays that every process has whole, as global arrays: each process supplies what its devices hold."""
  if sharding.is_fully_addressable:
    return {name: jax.device_put(value, sharding) for name, value in batch.items()}
  return {
    name: jax.make_array_from_callback(value.shape, sharding, lambda index, value=value: value[index])
    for name, value in batch.items()
  }


def put_examples(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """A batch that every process has whole, by example over the mesh that is set (`jax.set_mesh`).

  One that does not divide is copied to every device; without a mesh it goes to the default device.
  """
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return {name: jnp.asarray(value) for name, value in batch.items()}
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  divides = all(len(value) % parts == 0 for value in batch.values())
  return put_whole(batch, batch_sharding(mesh) if divides else replicated(mesh))


def on_every_device() -> NamedSharding | None:
  """For `out_shardings`: results that each process can read, on the mesh that is set; None without a mesh."""
  mesh = jax.sharding.get_mesh()
  return None if mesh.empty else replicated(mesh)


def _process_blocks(mesh: Mesh) -> list[int]:
  """Which of the data * fsdp blocks of a batch this process's devices hold, ascending."""
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  indices = batch_sharding(mesh).addressable_devices_indices_map((parts,))
  return sorted({index[0].start or 0 for index in indices.values()})


def everywhere(x: jax.Array) -> jax.Array:
  """Asks for the whole array on every device of the mesh of `jax.set_mesh`; without a mesh nothing changes."""
  return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, P())


def _divisible(mesh: Mesh, shape: tuple[int, ...], spec: P) -> P:
  axes = tuple(spec) + (None,) * (len(shape) - len(spec))
  return P(*(axis if axis and size % mesh.shape[axis] == 0 else None for size, axis in zip(shape, axes, strict=True)))
