"""An ONNX graph under construction: its nodes, its constants, and the sizes that are known only when it runs.

Runtimes have kernels for few integer types, so inside a graph integers are int32, or int64 where they stand for uint32,
and floats are float32; inputs and outputs keep their own types. Unsigned arithmetic is wrapped where it can overflow.
"""

import ast
import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from pinfm_jax.errors import UserError

Dims = tuple[Any, ...]  # a size is an int or one of JAX's symbolic sizes
_OPERATORS = {ast.Add: 'Add', ast.Sub: 'Sub', ast.Mult: 'Mul', ast.Pow: 'Pow'}
_FUNCTIONS = {'max': 'Max', 'min': 'Min'}


@dataclass(frozen=True)
class Value:
  """A tensor: its name in the graph, or its content if that is known while converting.

  Attributes:
    ref: name or content.
    dims: its shape; 1 where a broadcast is left to the node that uses it, since ONNX broadcasts as NumPy does.
  """

  ref: str | np.ndarray
  dims: Dims

  @property
  def known(self) -> bool:
    """Whether the content is known."""
    return isinstance(self.ref, np.ndarray)


def constant(array: Any) -> Value:
  """A value that is known."""
  array = np.asarray(array)
  return Value(array, array.shape)


def inner_type(dtype: Any) -> np.dtype:
  """The type that stands for a JAX type inside a graph."""
  dtype = np.dtype(dtype)
  if dtype.kind == 'b':
    return dtype
  if dtype.kind in 'iu':
    return np.dtype(np.int64 if dtype in (np.uint32, np.int64, np.uint64) else np.int32)
  return np.dtype(np.float32)


class Graph:
  """Nodes in order; see the module for the types."""

  def __init__(self):
    self.nodes: list[Any] = []
    self.initializers: list[Any] = []
    self._constants: dict[tuple, str] = {}
    self._sizes: dict[str, str] = {}
    self._count = 0

  def name(self, hint: str) -> str:
    """A name that is not in use."""
    self._count += 1
    return f'{hint}_{self._count}'

  def node(self, kind: str, *inputs: str | np.ndarray, outputs: int = 1, **attributes: Any) -> Any:
    """Adds a node; arrays become constants. Returns the name of its output, or the names of several."""
    names = [self.name(kind.lower()) for _ in range(outputs)]
    inputs = [self.constant(x) if isinstance(x, np.ndarray) else x for x in inputs]
    self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
    return names[0] if outputs == 1 else names

  def constant(self, array: np.ndarray) -> str:
    """The name of a constant of one of the inner types; equal ones are kept once."""
    array = np.asarray(array, order='C')  # unlike ascontiguousarray, leaves a scalar one
    key = (array.dtype.str, array.shape, hashlib.blake2b(array.data, digest_size=16).digest())
    if key not in self._constants:
      self._constants[key] = self.name('constant')
      self.initializers.append(numpy_helper.from_array(array, self._constants[key]))
    return self._constants[key]

  def cast(self, ref: str, dtype: Any) -> str:
    """The tensor in another type."""
    return self.node('Cast', ref, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

  def ref(self, value: Value) -> str | np.ndarray:
    """The value in its inner type, broadcasts left out."""
    return value.ref.astype(inner_type(value.ref.dtype), copy=False) if value.known else value.ref

  def full(self, value: Value, dims: Dims) -> str | np.ndarray:
    """The value in its inner type and its whole shape."""
    ref = self.ref(value)
    if tuple(value.dims) == tuple(dims):
      return ref
    if value.known and all(isinstance(d, int) for d in dims):
      return np.broadcast_to(ref, dims)
    return self.node('Expand', ref, self.shape(dims))

  def define_size(self, symbol: str, tensor: str, axis: int) -> None:
    """Says where a symbolic size is read from."""
    if symbol not in self._sizes:
      self._sizes[symbol] = self.node('Shape', tensor, start=axis, end=axis + 1)

  def size(self, dim: Any) -> str | np.ndarray:
    """A size as an int64 tensor [1]."""
    if isinstance(dim, int | np.integer):
      return np.array([dim], np.int64)
    text = str(dim)
    if text not in self._sizes:
      self._sizes[text] = self._computed(ast.parse(text.replace('^', '**'), mode='eval').body)
    return self._sizes[text]

  def shape(self, dims: Sequence[Any]) -> str | np.ndarray:
    """Sizes as one int64 tensor."""
    if all(isinstance(d, int | np.integer) for d in dims):
      return np.array(dims, np.int64)
    return self.node('Concat', *(self.size(d) for d in dims), axis=0)

  def reshape(self, ref: str, before: Dims, after: Dims) -> str:
    """The tensor in another shape; sizes that stay in place are copied, so that shapes can be inferred."""
    if tuple(before) == tuple(after):
      return ref
    sizes = [
      0 if i < len(before) and not isinstance(d, int) and before[i] == d else d for i, d in enumerate(after)
    ]  # 0 = as before
    unknown = [i for i, d in enumerate(sizes) if not isinstance(d, int)]
    if len(unknown) == 1 and 0 not in after:
      sizes[unknown[0]] = -1  # = what is left
    return self.node('Reshape', ref, self.shape(sizes))

  def wrap(self, ref: str, dtype: Any) -> str:
    """Brings the result of unsigned arithmetic back into the type's range."""
    dtype = np.dtype(dtype)
    if dtype.kind != 'u':
      return ref
    return self.node('Mod', ref, np.array(1 << 8 * dtype.itemsize, inner_type(dtype)))

  def _computed(self, tree: ast.AST) -> str | np.ndarray:
    """A size that is computed from others; the text of JAX's symbolic sizes is an expression of Python."""
    match tree:
      case ast.Constant(value=int(value)):
        return np.array([value], np.int64)
      case ast.Name(id=name) if name in self._sizes:
        return self._sizes[name]
      case ast.UnaryOp(op=ast.USub(), operand=operand):
        return self.node('Neg', self._computed(operand))
      case ast.BinOp(op=op, left=left, right=right) if type(op) in _OPERATORS:
        return self.node(_OPERATORS[type(op)], self._computed(left), self._computed(right))
      case ast.Call(func=ast.Name(id=name), args=arguments) if name in _FUNCTIONS:
        return self.node(_FUNCTIONS[name], *map(self._computed, arguments))
      case ast.Call(func=ast.Name(id='mod'), args=[left, right]):
        return self.node('Mod', self._computed(left), self._computed(right))
      case ast.Call(func=ast.Name(id='floordiv'), args=[left, right]):
        left, right = self._computed(left), self._computed(right)
        return self.node('Div', self.node('Sub', left, self.node('Mod', left, right)), right)
    raise UserError(f'the size {ast.unparse(tree)} has no form in ONNX: export a bundle instead (--format bundle)')


def broadcast_dims(*shapes: Dims) -> Dims:
  """The shape that ONNX gives to a node over these inputs."""
  rank = max(map(len, shapes))
  padded = [(1,) * (rank - len(dims)) + tuple(dims) for dims in shapes]
  return tuple(next((d for d in column if not _is_one(d)), 1) for column in zip(*padded, strict=True))


def tensor_info(name: str, dtype: Any, dims: Dims) -> Any:
  """The description of an input or output; symbolic sizes keep their names."""
  sizes = [operator.index(d) if isinstance(d, int | np.integer) else str(d) for d in dims]
  return helper.make_tensor_value_info(name, element_type(dtype), sizes)


def element_type(dtype: Any) -> int:
  """ONNX's number of a type."""
  return TensorProto.BOOL if np.dtype(dtype).kind == 'b' else helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _is_one(dim: Any) -> bool:
  return isinstance(dim, int | np.integer) and dim == 1
