"""Writes the portable programs as one TensorFlow SavedModel: their StableHLO inside, parameters as variables.

Needs TensorFlow, where it is written and where it is served; JAX is not needed to serve it.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from jax.experimental import jax2tf

from pinfm_jax.serve.portable.programs import PortableModel, Program

PLATFORMS = ('cpu', 'cuda', 'tpu')


def write_saved_model(path: Path, model: PortableModel, weights: Any, history_length: int) -> dict[str, Any]:
  """Writes a SavedModel with a signature for each program.

  Args:
    path: the directory to make.
    model: the programs.
    weights: their parameters, NumPy arrays.
    history_length: the largest L.

  Returns:
    Inputs and outputs of the signatures by name: type and sizes.
  """
  module, programs = tf.Module(), model.programs()
  module.weights = jax.tree.map(lambda leaf: tf.Variable(leaf, trainable=False), weights)
  signatures, described = {}, {}
  for name, inputs in model.inputs(history_length).items():
    signatures[name] = _signature(programs[name], module.weights, inputs, f'L <= {history_length}')
    outputs = jax.eval_shape(programs[name], weights, inputs)
    described[name] = {'inputs': _described(inputs), 'outputs': _described(outputs)}
  tf.saved_model.save(module, str(path), signatures=signatures)
  return described


def _signature(program: Program, weights: Any, inputs: dict[str, jax.ShapeDtypeStruct], constraint: str) -> Any:
  converted = jax2tf.convert(
    program,
    polymorphic_shapes=[None, {name: f'({", ".join(map(str, x.shape))},)' for name, x in inputs.items()}],
    polymorphic_constraints=[constraint] if any('L' in map(str, x.shape) for x in inputs.values()) else [],
    with_gradient=False,
    native_serialization_platforms=PLATFORMS,
  )
  # The variables are read inside, so that they are saved once and not as constants of each signature.
  call = tf.function(lambda **given: converted(weights, given), autograph=False)
  specs = {name: tf.TensorSpec(_sizes(x.shape, None), x.dtype, name) for name, x in inputs.items()}
  return call.get_concrete_function(**specs)


def _described(tensors: dict[str, Any]) -> dict[str, Any]:
  return {
    name: {'type': np.dtype(x.dtype).name, 'shape': [s if isinstance(s, int) else str(s) for s in x.shape]}
    for name, x in sorted(tensors.items())
  }


def _sizes(shape: tuple, unknown: Any) -> list[Any]:
  return [size if isinstance(size, int) else unknown for size in shape]
