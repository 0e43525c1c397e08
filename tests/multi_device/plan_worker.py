"""On 8 fake devices: bytes of a real state on each device, and counts of a program whose collectives are known."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import toy  # noqa: E402

from pinfm_jax.overrides import apply_overrides  # noqa: E402
from pinfm_jax.plan.hlo import count_program  # noqa: E402
from pinfm_jax.plan.memory import state_bytes  # noqa: E402
from pinfm_jax.plan.problem import Problem  # noqa: E402
from pinfm_jax.train.sharding import make_mesh  # noqa: E402
from pinfm_jax.train.step import init_state  # noqa: E402

LOOP, SIZE = 5, 1024


def real_bytes(problem: Problem) -> list[int]:
  """Bytes of the state's shards on each device, after making it."""
  mesh = make_mesh(problem.layout)
  with jax.set_mesh(mesh):
    state = init_state(problem.task, mesh, 0, layout=problem.layout)()
  held = dict.fromkeys(jax.devices(), 0)
  for leaf in jax.tree.leaves(state):
    for shard in leaf.addressable_shards:
      held[shard.device] += shard.data.nbytes
  return list(held.values())


def known_program() -> dict[str, list[float]]:
  """A loop of psums over the whole mesh, and one of every other collective over part of it; each device holds SIZE."""
  mesh = make_mesh(toy.EXPERIMENT.mesh.__class__(data=2, fsdp=4))

  def local(x):
    def body(carry, _):
      return jax.lax.psum(jnp.sin(carry), ('data', 'fsdp')), None

    x, _ = jax.lax.scan(body, x, length=LOOP)
    gathered = jax.lax.all_gather(x, 'fsdp', tiled=True)
    scattered = jax.lax.psum_scatter(jnp.cos(gathered), 'data', tiled=True)
    exchanged = jax.lax.all_to_all(scattered[:SIZE].reshape(4, -1), 'fsdp', 0, 0, tiled=True)
    return jax.lax.ppermute(exchanged, 'data', [(0, 1), (1, 0)])

  both = P(('data', 'fsdp'))
  program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=both, out_specs=both, check_vma=False))
  text = program.lower(jax.ShapeDtypeStruct((8 * SIZE,), jnp.float32)).compile().as_text()
  return {kind: [t.calls, t.payload, t.sent] for kind, t in count_program(text).traffic.items()}


def main(*meshes: str) -> None:
  """Prints one line of JSON: arithmetic and bytes of the devices by mesh 'D,F,M', and the known program's counts."""
  found = {}
  for text in meshes:
    sizes = dict(zip(('mesh.data', 'mesh.fsdp', 'mesh.model'), map(int, text.split(',')), strict=True))
    problem = Problem(apply_overrides(toy.EXPERIMENT, sizes), 8)
    found[text] = [state_bytes(problem).total, real_bytes(problem)]
  print(json.dumps({'meshes': found, 'program': known_program()}))


if __name__ == '__main__':
  main(*sys.argv[1:])
