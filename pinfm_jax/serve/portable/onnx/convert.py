"""Converts a JAX function with symbolic sizes to one ONNX model: traces it and translates the trace."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx
from jax.extend.core import Literal
from onnx import helper

from pinfm_jax.serve.portable.onnx.graph import Graph, Value, constant, element_type, inner_type, tensor_info
from pinfm_jax.serve.portable.onnx.rules import RULES, item, unsupported

# Opset 18 and IR 8 are read by ONNX Runtime 1.14 (2023) and later.
OPSET, IR_VERSION = 18, 8
_INLINED = {'jit', 'pjit', 'closed_call', 'core_call', 'custom_jvp_call', 'custom_vjp_call', 'checkpoint', 'remat'}
_NOT_COMPUTED = _INLINED | {'scan', 'broadcast_in_dim', 'iota', 'dim_as_value'}
_EXTERNAL_ABOVE = 1 << 30  # bytes of constants: a protocol buffer holds 2 GiB at most

Tree = Any


def to_onnx(
  function: Callable[[Tree, dict[str, jax.Array]], dict[str, jax.Array]],
  params: Tree,
  inputs: Mapping[str, jax.ShapeDtypeStruct],
  name: str,
) -> onnx.ModelProto:
  """Converts `function(params, inputs)`.

  Args:
    function: traceable; returns outputs by name.
    params: NumPy arrays, which become constants of the model.
    inputs: shapes, which may be symbolic, and types by name; those that the function does not use are left out.
    name: of the graph.

  Raises:
    UserError: the function uses something that has no ONNX form here.
  """
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  traced = jax.jit(function).trace(shapes, dict(inputs))
  jaxpr, names = traced.jaxpr.jaxpr, sorted(inputs)
  leaves = jax.tree.leaves(params)
  used, _ = _live(jaxpr)
  graph, infos, values = Graph(), [], [constant(leaf) for leaf in leaves]
  for variable, label in zip(jaxpr.invars[len(leaves) :], names, strict=True):
    values.append(Value(label, variable.aval.shape))
    if variable in used:
      infos.append(tensor_info(label, variable.aval.dtype, variable.aval.shape))
      values[-1] = _typed_input(graph, label, variable.aval)
  results = _interpret(graph, jaxpr, list(map(constant, traced.jaxpr.consts)), values)
  labels = sorted(traced.out_info)
  outputs = [
    _output(graph, label, value, v.aval) for label, value, v in zip(labels, results, jaxpr.outvars, strict=True)
  ]
  body = helper.make_graph(graph.nodes, name, infos, outputs, graph.initializers)
  opsets = [helper.make_opsetid('', OPSET)]
  return helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION, producer_name='pinfm_jax')


def write_model(path: Path, model: onnx.ModelProto) -> list[Path]:
  """Checks and writes the model; constants of more than 1 GiB go into a file beside it. Returns the files."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if sum(len(x.raw_data) for x in model.graph.initializer) <= _EXTERNAL_ABOVE:
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return [path]
  beside = path.with_name(f'{path.name}.data')
  onnx.save(model, path, save_as_external_data=True, location=beside.name)
  onnx.checker.check_model(path)
  return [path, beside]


def described_model(model: onnx.ModelProto) -> dict[str, Any]:
  """Inputs and outputs by name: type and sizes."""

  def tensors(infos: Any) -> dict[str, Any]:
    return {
      info.name: {
        'type': helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type).name,
        'shape': [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim],
      }
      for info in infos
    }

  return {'inputs': tensors(model.graph.input), 'outputs': tensors(model.graph.output)}


def _typed_input(graph: Graph, label: str, aval: Any) -> Value:
  for axis, size in enumerate(aval.shape):
    if str(size).isidentifier():
      graph.define_size(str(size), label, axis)
  inner = inner_type(aval.dtype)
  return Value(label if inner == np.dtype(aval.dtype) else graph.cast(label, inner), aval.shape)


def _output(graph: Graph, label: str, value: Value, aval: Any) -> Any:
  ref = graph.full(value, aval.shape)
  graph.nodes.append(
    helper.make_node(
      'Cast', [graph.constant(ref) if isinstance(ref, np.ndarray) else ref], [label], to=element_type(aval.dtype)
    )
  )
  return tensor_info(label, aval.dtype, aval.shape)


def _interpret(graph: Graph, jaxpr: Any, consts: list[Value], values: list[Value]) -> list[Value]:
  """Translates the equations of a jaxpr that its outputs need."""
  known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))

  def read(atom: Any) -> Value:
    return constant(np.asarray(atom.val, atom.aval.dtype)) if isinstance(atom, Literal) else known[atom]

  for eqn in _live(jaxpr)[1]:
    known.update(zip(eqn.outvars, _translated(graph, eqn, [read(atom) for atom in eqn.invars]), strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _translated(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  name = eqn.primitive.name
  if name in _INLINED:
    inner = next(eqn.params[key] for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr') if key in eqn.params)
    return _interpret(graph, getattr(inner, 'jaxpr', inner), list(map(constant, getattr(inner, 'consts', []))), values)
  if name == 'scan':
    return _unrolled(graph, eqn, values)
  if name not in _NOT_COMPUTED and all(value.known for value in values) and _is_static(eqn):
    arrays = [np.broadcast_to(v.ref, x.aval.shape) for v, x in zip(values, eqn.invars, strict=True)]
    outputs = eqn.primitive.bind(*arrays, **eqn.params)
    return list(map(constant, outputs if eqn.primitive.multiple_results else [outputs]))
  if name not in RULES:
    raise unsupported(eqn)
  return RULES[name](graph, eqn, values)


def _unrolled(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  """A scan as so many copies of its body: a decoder has few layers."""
  params, body = eqn.params, eqn.params['jaxpr']
  # Read off the shapes, since JAX's names of these counts change: what is scanned has one axis more outside the body.
  carried = sum(a.aval.ndim == b.aval.ndim for a, b in zip(eqn.outvars, body.jaxpr.outvars, strict=True))
  scanned = sum(a.aval.ndim > b.aval.ndim for a, b in zip(eqn.invars, body.jaxpr.invars, strict=True))
  fixed = len(eqn.invars) - carried - scanned
  carry, columns = values[fixed : fixed + carried], values[fixed + carried :]
  columns = [
    Value(graph.full(value, variable.aval.shape), variable.aval.shape) if not value.known else value
    for value, variable in zip(columns, eqn.invars[fixed + carried :], strict=True)
  ]
  collected = []
  for place in range(params['length']):
    place = params['length'] - 1 - place if params['reverse'] else place
    rows = [item(graph, column, place) for column in columns]
    consts = list(map(constant, body.consts))
    results = _interpret(graph, body.jaxpr, consts, [*values[:fixed], *carry, *rows])
    carry = results[:carried]
    collected.append(results[carried:])
  if params['reverse']:
    collected.reverse()
  first = np.array([0], np.int64)
  stacked = []
  for parts, variable in zip(zip(*collected, strict=True), body.jaxpr.outvars[carried:], strict=True):
    rows = [graph.node('Unsqueeze', graph.full(part, variable.aval.shape), first) for part in parts]
    stacked.append(Value(graph.node('Concat', *rows, axis=0), (len(rows), *variable.aval.shape)))
  return [*carry, *stacked]


def _is_static(eqn: Any) -> bool:
  return all(isinstance(size, int) for variable in eqn.outvars for size in variable.aval.shape)


def _live(jaxpr: Any) -> tuple[set, list]:
  """The variables and the equations that the outputs need."""
  used = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
  equations = []
  for eqn in reversed(jaxpr.eqns):
    if any(variable in used for variable in eqn.outvars):
      used |= {atom for atom in eqn.invars if not isinstance(atom, Literal)}
      equations.append(eqn)
  return used, equations[::-1]
