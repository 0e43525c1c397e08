"""Interaction blocks on one device and on a mesh of 8; started by test_interaction_sharded.py."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_interaction import CASES, FIELDS, F, config  # noqa: E402

from pinfm_jax.config import MeshConfig  # noqa: E402
from pinfm_jax.model.interaction.build import interaction_block  # noqa: E402
from pinfm_jax.train.sharding import batch_sharding, make_mesh, parameter_shardings  # noqa: E402

WIDE = {'width': 16, 'token_width': 8}  # the axis of 2 divides these


def compare(case: str, mesh: jax.sharding.Mesh) -> dict[str, float]:
  """The largest relative difference of the output and the gradients, and how many parameters lie in parts."""
  name, changes, _ = CASES[case]
  module = interaction_block(config(name, **{**changes, **WIDE}), FIELDS)
  x0 = np.random.default_rng(0).normal(size=(8, 3, F)).astype(np.float32)
  boxed = jax.eval_shape(module.init, jax.random.key(0), x0).get('params', {})
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda s: np.float32(rng.normal(size=s.shape) / 4), meta.unbox(boxed))

  def run(p, x):
    y = module.apply({'params': p}, x)
    return jnp.sum(jnp.sin(y)), y

  both = jax.jit(jax.value_and_grad(run, has_aux=True))
  single = both(params, x0)
  with jax.set_mesh(mesh):
    placed = jax.tree.map(jax.device_put, params, parameter_shardings(mesh, boxed))
    sharded = both(placed, jax.device_put(x0, batch_sharding(mesh)))
  pairs = zip(jax.tree.leaves(single), jax.tree.leaves(sharded), strict=True)
  parts = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
  return {'difference': max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs), 'in_parts': parts}


def main(*cases: str) -> None:
  """Prints one line of JSON."""
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
  print(json.dumps({'devices': jax.device_count(), 'cases': {case: compare(case, mesh) for case in cases}}))


if __name__ == '__main__':
  main(*sys.argv[1:])
