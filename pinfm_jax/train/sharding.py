"""The device mesh, the one table of logical axis rules, and the shardings of everything a training step touches."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pinfm_jax.config import MeshConfig
from pinfm_jax.errors import UserError

AXES = ('data', 'fsdp', 'model')
BATCH_AXES = ('data', 'fsdp')  # examples lie over these

# Logical axis of a parameter -> mesh axis. An axis that does not divide a dimension leaves it whole.
RULES = (('embed', 'fsdp'), ('mlp', 'model'), ('heads', 'model'), ('layers', None))


def make_mesh(config: MeshConfig) -> Mesh:
  """A ('data', 'fsdp', 'model') mesh over all devices; one axis may be 0, which takes the devices left.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.device_count()
  sizes = [config.data, config.fsdp, config.model]
  if sizes.count(0) == 1:
    rest = int(np.prod([size for size in sizes if size]))
    sizes[sizes.index(0)] = devices // rest if devices % rest == 0 else 0
  if min(sizes) < 1 or int(np.prod(sizes)) != devices:
    raise UserError(
      f'mesh {config.data} x {config.fsdp} x {config.model} does not cover the {devices} devices; '
      'set mesh.data=0 to take what is left, or sizes whose product is the number of devices'
    )
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


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


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """A process's part of the global batch, as global arrays sharded by example."""
  sharding = batch_sharding(mesh)
  return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def _divisible(mesh: Mesh, shape: tuple[int, ...], spec: P) -> P:
  axes = tuple(spec) + (None,) * (len(shape) - len(spec))
  return P(*(axis if axis and size % mesh.shape[axis] == 0 else None for size, axis in zip(shape, axes, strict=True)))
