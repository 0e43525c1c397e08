"""FinalMLP, and the plain MLP that it and others are measured against."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.model.interaction.fields import Fields
from pinfm_jax.model.layers import dense

Array = jax.Array


class MLP(nn.Module):
  """Layers with ReLU; none of them: x0 itself."""

  widths: tuple[int, ...]

  @nn.compact
  def __call__(self, x0: Array) -> Array:
    """[..., F] -> [..., last width]."""
    for i, width in enumerate(self.widths):
      x0 = jax.nn.relu(dense(width, (None, 'mlp'), scale=2.0, name=f'layer_{i}')(x0))
    return x0


class FinalMLP(nn.Module):
  """Two MLPs on differently gated features, fused by a bilinear form of several heads (arXiv:2304.00902).

  Stream s sees 2 sigmoid(gate_s) * x0 (stream-specific feature selection), where gate_s is an MLP of one hidden layer
  on some fields, say those of the user or of the item, or learned and the same for all examples. Their outputs o1, o2
  are fused to w1^T o1 + w2^T o2 + b + sum over heads of o1_h^T W_h o2_h (stream-level interaction aggregation). The
  paper's fusion is one logit; here it has `outputs` elements, since several labels read it.

  Attributes:
    fields: of x0.
    layers: of each stream.
    width: of each stream's layers, and of the gates' hidden layer.
    heads: parts of o1 and o2 that meet their like; they divide `width`.
    outputs: width of the output.
    gates: names of the fields that each stream's gate sees; () = learned.
  """

  fields: Fields
  layers: int
  width: int
  heads: int
  outputs: int
  gates: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

  @nn.compact
  def __call__(self, x0: Array) -> Array:
    """[..., F] -> [..., outputs]."""
    streams = []
    for i, names in enumerate(self.gates):
      chosen = 2 * jax.nn.sigmoid(self._gate(x0, names, i)) * x0
      streams.append(MLP((self.width,) * self.layers, name=f'stream_{i}')(chosen))
    linear = dense(self.outputs, (None, None), name='first')(streams[0])
    linear += dense(self.outputs, (None, None), use_bias=False, name='second')(streams[1])
    return linear + self._bilinear(*streams)

  def _gate(self, x0: Array, names: tuple[str, ...], stream: int) -> Array:
    """What stands in the sigmoid; it starts at 0, a gate of 1."""
    width, zeros = x0.shape[-1], nn.initializers.zeros_init()
    if not names:
      return self.param(f'gate_{stream}', zeros, (width,))
    seen = jnp.concatenate([x0[..., f.start : f.start + f.width] for f in self._named(names)], axis=-1)
    hidden = jax.nn.relu(dense(self.width, (None, 'mlp'), scale=2.0, name=f'gate_{stream}_in')(seen))
    return nn.Dense(width, kernel_init=zeros, name=f'gate_{stream}_out')(hidden)

  def _named(self, names: tuple[str, ...]) -> Fields:
    return tuple(field for field in self.fields if field.name in names)

  def _bilinear(self, first: Array, second: Array) -> Array:
    """sum_h first_h^T W_h second_h for each output.

    A product a head: one over all heads at once is five times slower on a CPU.
    """
    part, total = self.width // self.heads, 0.0
    init = nn.initializers.normal(1 / (part * np.sqrt(self.heads)))
    kernel_HIJO = self.param('bilinear', init, (self.heads, part, part, self.outputs))
    for head in range(self.heads):
      first_I, second_J = (x[..., head * part : (head + 1) * part] for x in (first, second))
      left_JO = (first_I @ kernel_HIJO[head].reshape(part, -1)).reshape(*first.shape[:-1], part, self.outputs)
      total += jnp.sum(left_JO * second_J[..., None], axis=-2)
    return total


def check_gates(names: tuple[str, ...], fields: Fields, setting: str) -> None:
  """Checks the names of a gate's fields, which depend on the data.

  Raises:
    UserError: a name that is no field.
  """
  known = [field.name for field in fields]
  for name in names:
    if name not in known:
      raise UserError(f"{setting} names '{name}'; the fields are: {', '.join(known)}")
