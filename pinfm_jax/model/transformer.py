"""The decoder M of PinFM: its blocks run as a context pass over histories or a crossing pass over candidates."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from pinfm_jax.config import TowerConfig
from pinfm_jax.model.attention import causal_attention
from pinfm_jax.model.dcat import LayerKV, View, attend_bidirectional, attend_causal, attend_context, attend_rows
from pinfm_jax.model.hstu import HSTUBlock
from pinfm_jax.model.layers import dense, rotate
from pinfm_jax.model.padded_sasrec import PaddedSASRecBlock

Array = jax.Array


class Block(nn.Module):
  """One decoder block: attention, then an MLP, each with a normalised input and a residual.

  As in GPT-2 (LayerNorm, GELU), or with the parts of later decoders: RMSNorm (arXiv:1910.07467), a SwiGLU MLP
  (arXiv:2002.05202), rotary positions (arXiv:2104.09864). In the sasrec backbone (arXiv:1808.09781)
  attention reads normalised queries over keys and values of the events as they are, and both residuals start from the
  normalised input.
  """

  config: TowerConfig

  def setup(self) -> None:
    """Declares the layers."""
    width, dtype = self.config.width, jnp.dtype(self.config.dtype)
    residual_scale = 1 / (2 * self.config.layers)  # GPT-2: residual branches start small, by depth
    self.norm_attention = norm(self.config)
    self.sasrec = self.config.backbone == 'sasrec'
    if self.sasrec:
      self.query = dense(width, ('embed', 'heads'), dtype=dtype)
      self.key_value = dense(2 * width, ('embed', 'heads'), dtype=dtype)
    else:
      self.query_key_value = dense(3 * width, ('embed', 'heads'), dtype=dtype)
    self.attention_out = dense(width, ('heads', 'embed'), residual_scale, dtype=dtype)
    self.norm_mlp = norm(self.config)
    hidden = self.config.mlp_ratio * width
    self.mlp_in = dense(2 * hidden if self.config.swiglu else hidden, ('embed', 'mlp'), dtype=dtype)
    self.mlp_out = dense(width, ('mlp', 'embed'), residual_scale, dtype=dtype)
    self.dropout = nn.Dropout(self.config.dropout)
    self.attention_dropout = nn.Dropout(self.config.attention_dropout)

  def __call__(self, x: Array, context: LayerKV | None, view: View, train: bool) -> tuple[Array, LayerKV | None]:
    """Runs the block.

    Args:
      x: [U, L, D] histories (context pass), [M, C, D] candidates (crossing pass) or events that follow a history.
      context: None for the context pass; else the histories' keys and values.
      view: what x may look at.
      train: dropout on.

    Returns:
      The block's output, like x, and the keys and values to keep (None in the crossing pass).
    """
    normed = self.norm_attention(x)
    query, own = self._project(x, normed, view)
    if context is None and view.bidirectional:
      attended, kept = attend_bidirectional(query, own, view.mask_UL), own
    elif context is None and train and self.config.attention_dropout:
      drop = partial(self.attention_dropout, deterministic=False)
      attended, kept = attend_causal(query, own, view.mask_UL, view.segment_UL, drop), own
    elif context is None:
      # `init` runs on tiny shapes that flash kernels refuse, and any form makes the same parameters.
      kind = 'xla' if self.is_initializing() else self.config.attention
      attended, kept = causal_attention(query, own, view.mask_UL, view.segment_UL, kind), own
    elif view.layout is not None:
      attended, kept = attend_rows(query, view.layout(view, context, own)).astype(query.dtype), None
    else:
      attended = attend_context(query, *view.rows(context), own, view.causal)
      kept = own if view.causal else None
    attended = attended.reshape(x.shape)
    x = (normed if self.sasrec else x) + self.dropout(self.attention_out(attended), deterministic=not train)
    normed = self.norm_mlp(x)
    hidden = self._activate(self.mlp_in(normed))
    x = (normed if self.sasrec else x) + self.dropout(self.mlp_out(hidden), deterministic=not train)
    return x, kept

  def keys_values(self, x: Array, view: View) -> LayerKV:
    """Just the keys and values: all that the crossing pass needs of the context's last layer (PinFM section 6)."""
    return self._project(x, self.norm_attention(x), view)[1]

  def _activate(self, hidden: Array) -> Array:
    if not self.config.swiglu:
      return jax.nn.gelu(hidden)
    gate, value = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * value

  def _project(self, x: Array, normed: Array, view: View) -> tuple[Array, LayerKV]:
    heads = (self.config.heads, self.config.width // self.config.heads)
    if self.sasrec:
      query, (key, value) = self.query(normed), jnp.split(self.key_value(x), 2, axis=-1)
    else:
      query, key, value = jnp.split(self.query_key_value(normed), 3, axis=-1)
    query, key, value = (y.reshape(*x.shape[:-1], *heads) for y in (query, key, value))
    if view.place_UL is not None:
      query, key = (rotate(y, view.place_UL) for y in (query, key))  # keys are kept turned: their places never change
    return query, LayerKV(key, value)


def norm(config: TowerConfig) -> nn.Module:
  """The configured normalisation."""
  return (nn.RMSNorm if config.rms_norm else nn.LayerNorm)(dtype=jnp.dtype(config.dtype))


def block_class(config: TowerConfig, scanned: bool) -> type[nn.Module]:
  """The configured block, rematerialised as configured; the parameters' layout does not depend on `remat`.

  'full' keeps a block's input alone and computes the rest again in the backward pass. 'dots' also keeps the outputs of
  the projections and of the MLP's matmuls, and computes again what is cheap for its size: scores, softmax, GELU, norms.
  """
  block = {'hstu': HSTUBlock, 'padded_sasrec': PaddedSASRecBlock}.get(config.backbone, Block)
  if config.remat == 'none':
    return block
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == 'dots' else None
  # A scan's body cannot share work between forward and backward pass, so nothing need be guarded against it there.
  return nn.remat(block, prevent_cse=not scanned, static_argnums=(4,), policy=policy)


class Decoder(nn.Module):
  """N blocks and a final LayerNorm; the last block stands apart so that its context output can be skipped."""

  config: TowerConfig

  def setup(self) -> None:
    """Declares the scanned blocks and the last one."""
    if self.config.width % self.config.heads:
      raise ValueError(f'tower.width {self.config.width} is not a multiple of tower.heads {self.config.heads}')
    scanned = nn.scan(
      block_class(self.config, scanned=True),
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=(0, nn.broadcast, nn.broadcast),
      length=self.config.layers - 1,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    self.blocks = scanned(self.config) if self.config.layers > 1 else None
    self.last = block_class(self.config, scanned=False)(self.config)
    self.norm = norm(self.config)

  def context(
    self,
    x_ULD: Array,
    mask_UL: Array,
    train: bool = False,
    output_at_U: Array | None = None,
    segment_UL: Array | None = None,
    bidirectional: bool = False,
  ) -> tuple[Array, LayerKV]:
    """The context pass (PinFM Eq. 3).

    Args:
      x_ULD: embedded histories.
      mask_UL: True on real events.
      train: dropout on.
      output_at_U: runs the last layer's attention and MLP at this position of each history alone; of the other
        positions only the keys and values are used (PinFM section 6). None = at every position.
      segment_UL: segments of packed rows, which do not attend to each other; None = one a row.
      bidirectional: events see later events too.

    Returns:
      [U, L, D] outputs ([U, 1, D] at one position), and every layer's keys and values [N, U, L, H, K].

    Raises:
      ValueError: `output_at_U` on packed rows, which have no one last event.
    """
    if segment_UL is not None and output_at_U is not None:
      raise ValueError('packed rows hold several segments: an output at one position needs one history a row')
    place_UL = jnp.arange(x_ULD.shape[1])[None] if self.config.rotary else None
    view, stacked = View(mask_UL, segment_UL, place_UL=place_UL, bidirectional=bidirectional), None
    if self.blocks is not None:
      x_ULD, stacked = self.blocks(x_ULD, None, view, train)
    if output_at_U is None:
      x_ULD, last = self.last(x_ULD, None, view, train)
    elif self.config.padded:  # it has no form for one position
      x_ULD, last = self.last(x_ULD, None, view, train)
      x_ULD = jnp.take_along_axis(x_ULD, output_at_U[:, None, None], axis=1)
    else:
      last = self.last.keys_values(x_ULD, view)
      x_ULD = self._at(x_ULD, last, view, output_at_U, train)
    return self.norm(x_ULD), _append_layer(stacked, last)

  def _at(self, x_ULD: Array, kv: LayerKV, view: View, position_U: Array, train: bool) -> Array:
    """The last layer at one position of each history: a query over the events that it sees, its own key beside."""
    place_L = jnp.arange(view.mask_UL.shape[1])
    others_UL = place_L != position_U[:, None] if view.bidirectional else place_L < position_U[:, None]
    x_U1D = jnp.take_along_axis(x_ULD, position_U[:, None, None], axis=1)
    place_U1 = position_U[:, None] if self.config.rotary else None
    return self.last(x_U1D, kv, View(view.mask_UL & others_UL, place_UL=place_U1), train)[0]

  def extend(self, x_UCD: Array, context: LayerKV, view: View, train: bool = False) -> tuple[Array, LayerKV]:
    """The context pass of C events that follow histories whose keys and values [N, U, L, H, K] are kept.

    Returns:
      Outputs [U, C, D], and the new events' keys and values [N, U, C, H, K].
    """
    x_UCD, stacked, last = self._follow(x_UCD, context, view.replace(causal=True), train)
    return self.norm(x_UCD), _append_layer(stacked, last)

  def crossing(self, x_MCD: Array, context: LayerKV, view: View, train: bool = False) -> Array:
    """The crossing pass (PinFM Eq. 4) of M x C candidate tokens over their users' kept keys and values."""
    return self.norm(self._follow(x_MCD, context, view, train)[0])

  def _follow(
    self, x_MCD: Array, context: LayerKV, view: View, train: bool
  ) -> tuple[Array, LayerKV | None, LayerKV | None]:
    stacked = None
    if self.config.rotary:
      view = view.replace(place_UL=_places_behind(view, x_MCD.shape[1]))
    if self.blocks is not None:
      x_MCD, stacked = self.blocks(x_MCD, jax.tree.map(lambda y: y[:-1], context), view, train)
    x_MCD, last = self.last(x_MCD, jax.tree.map(lambda y: y[-1], context), view, train)
    return x_MCD, stacked, last


def _places_behind(view: View, tokens: int) -> Array:
  """Places of tokens that stand behind their history: all of the candidates at one, events that follow in a row."""
  count_M1 = jnp.sum(view.mask_UL, axis=1)[:, None]
  count_M1 = count_M1 if view.user_M is None else count_M1[view.user_M]
  return count_M1 + jnp.arange(tokens) if view.causal else count_M1


def _append_layer(stacked: LayerKV | None, last: LayerKV) -> LayerKV:
  """Keys and values of the scanned layers and of the last one: [N, ...]."""
  last = jax.tree.map(lambda y: y[None], last)
  return last if stacked is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stacked, last)


def last_event(mask_UL: Array) -> Array:
  """Position of each history's last real event, int32 [U]; 0 for a history without events."""
  return jnp.maximum(jnp.sum(mask_UL, axis=1) - 1, 0)
