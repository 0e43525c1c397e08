"""How each JAX primitive that the models use is said in ONNX."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.serve.portable.onnx.graph import Graph, Value, broadcast_dims, constant, inner_type

Rule = Callable[[Graph, Any, list[Value]], list[Value]]
RULES: dict[str, Rule] = {}
_FLOAT_BITS = {2: (5, 10), 4: (8, 23)}  # bytes of a float -> bits of its exponent and of its mantissa
_OVERFLOWING = ('Add', 'Sub', 'Mul', 'Neg')
_LEAST = np.iinfo(np.int64).min


def unsupported(eqn: Any, why: str = '') -> UserError:
  """The error of a model that has no ONNX form."""
  what = f'{eqn.primitive.name}{f" ({why})" if why else ""}'
  return UserError(f"the model uses JAX's {what}, which has no ONNX form here: export a bundle (--format bundle)")


def _rule(*names: str) -> Callable[[Rule], Rule]:
  def add(rule: Rule) -> Rule:
    RULES.update(dict.fromkeys(names, rule))
    return rule

  return add


def _whole(graph: Graph, eqn: Any, values: list[Value]) -> list[str | np.ndarray]:
  return [graph.full(value, variable.aval.shape) for value, variable in zip(values, eqn.invars, strict=True)]


def _out(eqn: Any, *refs: str) -> list[Value]:
  return [Value(ref, variable.aval.shape) for ref, variable in zip(refs, eqn.outvars, strict=True)]


def _elementwise(kind: str, for_bools: str = '', for_integers: str = '') -> Rule:
  def rule(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
    dtype = np.dtype(eqn.invars[0].aval.dtype)
    chosen = {'b': for_bools, 'i': for_integers, 'u': for_integers}.get(dtype.kind) or kind
    result = graph.node(chosen, *map(graph.ref, values))
    if kind in _OVERFLOWING:
      result = graph.wrap(result, dtype)
    return [Value(result, broadcast_dims(*(v.dims for v in values)))]

  return rule


for _name, _kind in {
  'add': 'Add', 'sub': 'Sub', 'mul': 'Mul', 'div': 'Div', 'max': 'Max', 'min': 'Min', 'pow': 'Pow',
  'eq': 'Equal', 'lt': 'Less', 'le': 'LessOrEqual', 'gt': 'Greater', 'ge': 'GreaterOrEqual',
  'exp': 'Exp', 'log': 'Log', 'tanh': 'Tanh', 'logistic': 'Sigmoid', 'sqrt': 'Sqrt', 'neg': 'Neg', 'abs': 'Abs',
  'sign': 'Sign', 'floor': 'Floor', 'ceil': 'Ceil', 'erf': 'Erf', 'sin': 'Sin', 'cos': 'Cos',
}.items():  # fmt: skip
  RULES[_name] = _elementwise(_kind)
RULES['and'] = _elementwise('', 'And', 'BitwiseAnd')
RULES['or'] = _elementwise('', 'Or', 'BitwiseOr')
RULES['xor'] = _elementwise('', 'Xor', 'BitwiseXor')


@_rule('not')
def _not(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  if eqn.invars[0].aval.dtype != bool:
    raise unsupported(eqn, 'of integers')
  return [Value(graph.node('Not', graph.ref(values[0])), values[0].dims)]


@_rule('ne')
def _ne(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  equal = RULES['eq'](graph, eqn, values)[0]
  return [Value(graph.node('Not', equal.ref), equal.dims)]


@_rule('stop_gradient', 'copy', 'copy_p', 'optimization_barrier', 'sharding_constraint', 'reshard')
def _same(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  return values


@_rule('square')
def _square(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  ref = graph.ref(values[0])
  return [Value(graph.node('Mul', ref, ref), values[0].dims)]


@_rule('integer_pow')
def _integer_pow(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  power, ref = eqn.params['y'], graph.ref(values[0])
  result = ref
  for _ in range(abs(power) - 1):
    result = graph.node('Mul', result, ref)
  if power < 1:
    result = graph.node('Reciprocal', result) if power else np.ones((1,) * len(values[0].dims), np.float32)
  return [Value(result, values[0].dims)]


@_rule('rsqrt')
def _rsqrt(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  return [Value(graph.node('Reciprocal', graph.node('Sqrt', graph.ref(values[0]))), values[0].dims)]


@_rule('log1p')
def _log1p(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  return [Value(graph.node('Log', graph.node('Add', graph.ref(values[0]), np.array(1, np.float32))), values[0].dims)]


@_rule('clamp')
def _clamp(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  low, x, high = values
  ref = graph.node('Min', graph.node('Max', graph.ref(x), graph.ref(low)), graph.ref(high))
  return [Value(ref, broadcast_dims(*(v.dims for v in values)))]


@_rule('is_finite')
def _is_finite(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  ref = graph.ref(values[0])
  either = graph.node('Or', graph.node('IsNaN', ref), graph.node('IsInf', ref))
  return [Value(graph.node('Not', either), values[0].dims)]


@_rule('select_n')
def _select(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  if len(values) != 3 or eqn.invars[0].aval.dtype != bool:
    raise unsupported(eqn, 'of more than two cases')
  which, no, yes = values
  ref = graph.node('Where', graph.ref(which), graph.ref(yes), graph.ref(no))
  return [Value(ref, broadcast_dims(*(v.dims for v in values)))]


@_rule('shift_left', 'shift_right_logical')
def _shift(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  """Multiplied or divided by a power of two: runtimes shift few types."""
  x, by = values
  dtype = eqn.outvars[0].aval.dtype
  if np.dtype(dtype).kind != 'u':
    raise unsupported(eqn, 'of signed integers')
  two = np.array(2, inner_type(dtype))
  factor = np.asarray(two ** graph.ref(by)) if by.known else graph.node('Pow', two, by.ref)
  kind = 'Mul' if eqn.primitive.name == 'shift_left' else 'Div'
  return [Value(graph.wrap(graph.node(kind, graph.ref(x), factor), dtype), broadcast_dims(x.dims, by.dims))]


@_rule('convert_element_type')
def _convert(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  before, after = np.dtype(eqn.invars[0].aval.dtype), np.dtype(eqn.params['new_dtype'])
  ref = graph.ref(values[0])
  if inner_type(before) != inner_type(after):
    ref = graph.cast(ref, inner_type(after))
  narrower = before.kind in 'iu' and after.kind == 'u' and (before.kind == 'i' or before.itemsize > after.itemsize)
  return [Value(graph.wrap(ref, after) if narrower else ref, values[0].dims)]


@_rule('bitcast_convert_type')
def _bitcast(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  """The bits of a float, as integers, to its value: ONNX has no such operator before opset 26, but arithmetic is exact.

  Infinities and NaN do not occur: quantised rows have none.
  """
  before, after = np.dtype(eqn.invars[0].aval.dtype), np.dtype(eqn.params['new_dtype'])
  if before.kind != 'u' or after.kind != 'f' or before.itemsize != after.itemsize:
    raise unsupported(eqn, f'{before} to {after}')
  kind, (exponent_bits, mantissa_bits) = inner_type(before), _FLOAT_BITS[after.itemsize]
  bits, unit = graph.ref(values[0]), np.array(1 << mantissa_bits, kind)
  mantissa = graph.cast(graph.node('Mod', bits, unit), np.float32)
  upper = graph.node('Div', bits, unit)
  steps = np.arange(1 << exponent_bits) - (1 << (exponent_bits - 1)) + 1
  steps[0] = steps[1]  # exponent 0: the mantissa without its hidden one
  powers = np.exp2(steps.astype(np.float64)).clip(max=np.finfo(np.float32).max).astype(np.float32)
  hidden = np.ones(1 << exponent_bits, np.float32)
  hidden[0] = 0
  sign = np.repeat(np.array([1, -1], np.float32), 1 << exponent_bits)
  fraction = graph.node('Mul', mantissa, np.array(2.0**-mantissa_bits, np.float32))
  fraction = graph.node('Add', fraction, graph.node('Gather', np.tile(hidden, 2), upper))
  return [Value(graph.node('Mul', fraction, graph.node('Gather', sign * np.tile(powers, 2), upper)), values[0].dims)]


@_rule('broadcast_in_dim')
def _broadcast(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  """Only puts the axes in place: the nodes that follow broadcast."""
  value, dims = values[0], [1] * len(eqn.params['shape'])
  for axis, size in zip(eqn.params['broadcast_dimensions'], value.dims, strict=True):
    dims[axis] = size
  if value.known:
    return [constant(value.ref.reshape(dims))]
  return [Value(graph.reshape(value.ref, value.dims, tuple(dims)), tuple(dims))]


@_rule('reshape', 'squeeze', 'expand_dims')
def _reshape(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
  return [Value(graph.reshape(graph.full(values[0], before), before, after), after)]


@_rule('transpose')
def _transpose(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  order = eqn.params['permutation']
  dims = tuple(values[0].dims[axis] for axis in order)
  return [Value(graph.node('Transpose', graph.ref(values[0]), perm=list(order)), dims)]


@_rule('concatenate')
def _concatenate(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  return _out(eqn, graph.node('Concat', *_whole(graph, eqn, values), axis=eqn.params['dimension']))


@_rule('stack')
def _stack(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  axis = np.array([eqn.params['axis']], np.int64)
  parts = [graph.node('Unsqueeze', ref, axis) for ref in _whole(graph, eqn, values)]
  return _out(eqn, graph.node('Concat', *parts, axis=eqn.params['axis']))


@_rule('split')
def _split(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  sizes = graph.shape([int(size) for size in eqn.params['sizes']])
  whole, count = _whole(graph, eqn, values)[0], len(eqn.outvars)
  parts = graph.node('Split', whole, sizes, outputs=count, axis=eqn.params['axis'])
  return _out(eqn, *(parts if count > 1 else [parts]))


@_rule('slice')
def _slice(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  starts, ends = eqn.params['start_indices'], eqn.params['limit_indices']
  steps = eqn.params['strides'] or (1,) * len(starts)
  axes = np.arange(len(starts), dtype=np.int64)
  where = (graph.shape(starts), graph.shape(ends), axes, graph.shape(steps))
  return _out(eqn, graph.node('Slice', _whole(graph, eqn, values)[0], *where))


@_rule('rev')
def _reverse(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  axes = np.array(eqn.params['dimensions'], np.int64)
  last, first, back = (np.full(len(axes), x, np.int64) for x in (-1, _LEAST, -1))
  return _out(eqn, graph.node('Slice', _whole(graph, eqn, values)[0], last, first, axes, back))


@_rule('pad')
def _pad(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  low, high, inside = zip(*eqn.params['padding_config'], strict=True)
  if any(inside):
    raise unsupported(eqn, 'between elements')
  x, fill = _whole(graph, eqn, values)
  return _out(eqn, graph.node('Pad', x, graph.shape([*low, *high]), fill))


@_rule('tile')
def _tile(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  return _out(eqn, graph.node('Tile', _whole(graph, eqn, values)[0], graph.shape(eqn.params['reps'])))


@_rule('iota')
def _iota(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  axis, shape = eqn.params['dimension'], eqn.outvars[0].aval.shape
  dims = [1] * len(shape)
  dims[axis] = shape[axis]
  if isinstance(shape[axis], int):
    return [constant(np.arange(shape[axis]).astype(eqn.params['dtype']).reshape(dims))]
  end = graph.node('Squeeze', graph.size(shape[axis]), np.array([0], np.int64))
  numbers = graph.node('Range', np.array(0, np.int64), end, np.array(1, np.int64))
  numbers = graph.cast(numbers, inner_type(eqn.params['dtype']))
  return [Value(graph.reshape(numbers, (shape[axis],), tuple(dims)), tuple(dims))]


@_rule('dim_as_value')
def _dim_as_value(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  size = graph.node('Squeeze', graph.size(eqn.params['dim']), np.array([0], np.int64))
  return [Value(graph.cast(size, inner_type(eqn.outvars[0].aval.dtype)), ())]


@_rule('reduce_sum', 'reduce_max', 'reduce_min')
def _reduce(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  kind = {'reduce_sum': 'ReduceSum', 'reduce_max': 'ReduceMax', 'reduce_min': 'ReduceMin'}[eqn.primitive.name]
  axes = np.array(eqn.params['axes'], np.int64)
  result = graph.node(kind, _whole(graph, eqn, values)[0], axes, keepdims=0)
  return _out(eqn, graph.wrap(result, eqn.outvars[0].aval.dtype))


@_rule('reduce_or', 'reduce_and')
def _reduce_bool(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  kind = 'ReduceMax' if eqn.primitive.name == 'reduce_or' else 'ReduceMin'
  numbers = graph.cast(_whole(graph, eqn, values)[0], np.int32)
  result = graph.node(kind, numbers, np.array(eqn.params['axes'], np.int64), keepdims=0)
  return _out(eqn, graph.cast(result, bool))


@_rule('cumsum')
def _cumsum(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  axis, backwards = np.array(eqn.params['axis'], np.int64), int(eqn.params['reverse'])
  return _out(eqn, graph.node('CumSum', _whole(graph, eqn, values)[0], axis, reverse=backwards))


@_rule('dot_general')
def _dot(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  (left_sum, right_sum), (left_batch, right_batch) = eqn.params['dimension_numbers']
  left, right = _whole(graph, eqn, values)
  ranks = [len(variable.aval.shape) for variable in eqn.invars]
  if not left_batch and ranks[1] == 2 and tuple(left_sum) == (ranks[0] - 1,) and tuple(right_sum) == (0,):
    return _out(eqn, graph.node('MatMul', left, right))
  free = [
    [axis for axis in range(rank) if axis not in (*batch, *summed)]
    for rank, batch, summed in ((ranks[0], left_batch, left_sum), (ranks[1], right_batch, right_sum))
  ]
  if len(left_sum) == 1 and len(free[0]) == len(free[1]) == 1:
    left = _permuted(graph, left, [*left_batch, *free[0], *left_sum])
    right = _permuted(graph, right, [*right_batch, *right_sum, *free[1]])
    return _out(eqn, graph.node('MatMul', left, right))
  letters = iter('abcdefghijklmnopqrstuvwxyz')
  names = [{axis: next(letters) for axis in range(ranks[0])}, {}]
  names[1] = {b: names[0][a] for a, b in zip((*left_batch, *left_sum), (*right_batch, *right_sum), strict=True)}
  names[1] |= {axis: next(letters) for axis in free[1]}
  out = ''.join([names[0][a] for a in (*left_batch, *free[0])] + [names[1][b] for b in free[1]])
  texts = [''.join(name[axis] for axis in range(rank)) for name, rank in zip(names, ranks, strict=True)]
  return _out(eqn, graph.node('Einsum', left, right, equation=f'{texts[0]},{texts[1]}->{out}'))


def _permuted(graph: Graph, ref: str | np.ndarray, order: list[int]) -> str | np.ndarray:
  if order == sorted(order):
    return ref
  return ref.transpose(order) if isinstance(ref, np.ndarray) else graph.node('Transpose', ref, perm=order)


@_rule('gather')
def _gather(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
  """Three of its many forms: a constant slice, whole slices along one axis, and those by rows of a batch."""
  numbers, sizes = eqn.params['dimension_numbers'], eqn.params['slice_sizes']
  shape, axes = eqn.invars[0].aval.shape, numbers.start_index_map
  index, out = values[1], eqn.outvars[0].aval.shape
  batch = numbers.operand_batching_dims
  whole = all(i in (*axes, *batch) or sizes[i] == shape[i] for i in range(len(shape)))
  if index.known and eqn.invars[1].aval.ndim == 1 and not batch and whole:
    operand, starts = graph.full(values[0], shape), np.broadcast_to(index.ref, (len(axes),)).tolist()
    ends = [start + sizes[axis] for start, axis in zip(starts, axes, strict=True)]
    where = (np.array(starts, np.int64), graph.shape(ends), np.array(axes, np.int64))
    ref = graph.node('Slice', operand, *where)
    return [Value(graph.reshape(ref, sizes, out), out)]
  if len(axes) != 1 or not whole or tuple(numbers.collapsed_slice_dims) != tuple(axes) or sizes[axes[0]] != 1:
    raise unsupported(eqn, f'{numbers}, slices {sizes} of {shape}')
  places = eqn.invars[1].aval.shape
  operand, indices = graph.full(values[0], shape), graph.full(index, places)
  rank, axis = len(places) - 1, axes[0]
  if not batch and tuple(numbers.offset_dims) == (*range(axis), *range(axis + rank, len(out))):
    return _out(eqn, graph.node('Gather', operand, graph.reshape(indices, places, places[:-1]), axis=axis))
  by_row = tuple(batch) == tuple(numbers.start_indices_batching_dims) == tuple(range(axis))
  if by_row and tuple(numbers.offset_dims) == tuple(range(rank, len(out))):
    return _out(eqn, graph.node('GatherND', operand, graph.cast(indices, np.int64), batch_dims=axis))
  raise unsupported(eqn, f'{numbers}, slices {sizes} of {shape}')


def item(graph: Graph, value: Value, place: int) -> Value:
  """One element along the first axis."""
  if value.known:
    return constant(value.ref[place])
  index = np.array(0 if _first_is_one(value) else place, np.int64)
  return Value(graph.node('Gather', value.ref, index, axis=0), value.dims[1:])


def _first_is_one(value: Value) -> bool:
  return isinstance(value.dims[0], int) and operator.index(value.dims[0]) == 1
