"""The sequence losses on meshes of 8 fake devices; started by test_losses_sharded.py.

python losses_worker.py OUT: writes OUT, an .npz of loss, figures and gradients by mesh, and of the floats that cross.
"""

import math
import re
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.config import PretrainConfig
from pinfm_jax.model.hashing import fold_seed
from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.train import negatives
from pinfm_jax.train.losses import Extra, sequence_losses
from pinfm_jax.train.negatives import positive_mask
from pinfm_jax.train.popularity import empty_sketch, sketch_frequency, update_sketch
from pinfm_jax.train.sharding import AXES, batch_sharding, everywhere, replicated

# 8 rows of 10 events: a device of a model group of 2 or 4 has 20 or 8 tokens' share, which leaves a rest on 3.
# Where there is an option, it comes with the rest: the plain losses are run on one mesh that has all axes.
MESHES = {'1': (1, 1, 1), '2': (2, 1, 1), '2_2_2': (2, 2, 2), '8': (8, 1, 1), 'fsdp8': (1, 8, 1), 'model3': (1, 2, 3)}
ROWS, LENGTH, WIDTH, ITEMS = 8, 10, 6, 40
PLAIN = PretrainConfig(positive_actions=('save',), downstream_length=4, window=4, pairs=2, max_columns=16)
CONFIGS = {
  'plain': PLAIN,
  'all': replace(PLAIN, uniform_negatives=16, impression_negatives=2, log_q='sketch'),
  'fewer': replace(PLAIN, max_columns=0, uniform_negatives=16, count_as=4),
}


def batch() -> tuple[dict[str, np.ndarray], EventBatch]:
  """Vectors and events; users appear in several rows, hence on several devices."""
  rng = np.random.default_rng(0)
  item = rng.integers(0, ITEMS, (ROWS, LENGTH)).astype(np.uint32)
  segment = np.cumsum(rng.random((ROWS, LENGTH)) < 0.2, axis=1).astype(np.int32)
  user = np.take_along_axis(rng.integers(0, 5, (ROWS, LENGTH + 1)), segment, axis=1).astype(np.uint32)
  drawn = rng.integers(0, ITEMS, (ROWS, 2)).astype(np.uint32)
  table = rng.normal(size=(ITEMS, WIDTH)).astype(np.float32)
  h = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
  actions = rng.integers(0, 4, (ROWS, LENGTH)).astype(np.uint32)
  events = EventBatch(words(item), segment * 0, actions, rng.random((ROWS, LENGTH)) < 0.9, user, segment)
  return {'h': h, 'z': table[item], 'z_drawn': table[drawn], 'drawn': words(drawn)}, events


def words(item: np.ndarray) -> np.ndarray:
  """Id words."""
  return np.stack([item, item * 0], axis=-1)


def program(name: str):
  """The jitted loss, figures, gradients and sketch of a configuration."""
  config = CONFIGS[name]

  def loss(vectors, log_temperature, drawn, events, sketch):
    extra = Extra(drawn, vectors['z_drawn'], catalogue=ITEMS) if config.uniform_negatives else None
    if config.log_q == 'sketch':
      frequencies = sketch_frequency(sketch, events.item_UL2), sketch_frequency(sketch, drawn)
      extra = Extra(drawn, vectors['z_drawn'], *frequencies, ITEMS)
    index_U = jnp.arange(ROWS, dtype=jnp.int32)
    vectors = vectors['h'], vectors['z']
    return sequence_losses(*vectors, log_temperature, events, config, 2, fold_seed(3, 1), index_U, extra)

  def run(vectors, log_temperature, drawn, events):
    ids = (events.item_UL2.reshape(-1, 2), positive_mask(events, 2).reshape(-1))
    sketch = update_sketch(empty_sketch(64), *(everywhere(x) for x in ids), 0.9)
    found = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(vectors, log_temperature, drawn, events, sketch)
    return *found, sketch

  return jax.jit(run)


def floats_that_cross(text: str) -> list[int]:
  """The floats of each array that the collectives of a compiled program move, largest first."""
  lines = [line for line in text.splitlines() if re.search(r' (all-\w+|collective-permute|reduce-scatter)\(', line)]
  shapes = [shape for line in lines for shape in re.findall(r'f32\[([\d,]*)\]', line.split('(%')[0])]
  return sorted((math.prod(int(n) for n in shape.split(',') if n) for shape in shapes), reverse=True)


def main(out: str) -> None:
  """Runs every configuration on every mesh."""
  negatives.CHUNK_LOGITS = 128  # several chunks a device
  vectors, events = batch()
  drawn, seen = vectors.pop('drawn'), {}
  for mesh_name, sizes in MESHES.items():
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=devices)
    with jax.set_mesh(mesh):
      arguments = jax.device_put((vectors, drawn, events), batch_sharding(mesh))
      temperature = jax.device_put(jnp.float32(np.log(0.2)), replicated(mesh))
      for name in CONFIGS if mesh_name in ('1', '2_2_2') else ('all',):
        compiled = program(name).lower(arguments[0], temperature, *arguments[1:]).compile()
        (value, figures), (grads, slope), sketch = compiled(arguments[0], temperature, *arguments[1:])
        parts = {'loss': value, **figures, **{f'grad_{k}': g for k, g in grads.items()}, 'grad_temperature': slope,
                 'sketch': sketch.counts_C}  # fmt: skip
        seen |= {f'{name}/{mesh_name}/{part}': np.asarray(x) for part, x in parts.items()}
        seen[f'{name}/{mesh_name}/floats_that_cross'] = np.array(floats_that_cross(compiled.as_text()))
  np.savez(out, **seen)


if __name__ == '__main__':
  main(sys.argv[1])
