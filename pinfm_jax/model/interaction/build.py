"""The interaction block that the configuration names."""

from dataclasses import replace
from functools import partial

import flax.linen as nn

from pinfm_jax.config import RankerConfig
from pinfm_jax.model.interaction.cross import CrossNetwork, GatedCross, LowRankCross, MixtureCross
from pinfm_jax.model.interaction.ensemble import DHEN, Beside
from pinfm_jax.model.interaction.fields import Fields
from pinfm_jax.model.interaction.mask import FinalBlock, MaskNet
from pinfm_jax.model.interaction.settings import INTERACTIONS
from pinfm_jax.model.interaction.streams import MLP, FinalMLP, check_gates
from pinfm_jax.model.interaction.tokens import AutoInt, CompressedInteraction, FactorizationMachine, FieldTransformer


def interaction_block(config: RankerConfig, fields: Fields, name: str = 'cross') -> nn.Module:
  """The configured block: x0 [..., F] -> [..., a width of its own].

  Args:
    config: names the block and has its settings, checked (`settings.check_interaction`).
    fields: of x0.
    name: in the parameter tree.

  Raises:
    ValueError: an unknown name.
    UserError: a gate of FinalMLP names a field that is not there.
  """
  block = config.block
  if block.parallel == 1 and not block.deep:
    return _single(config, config.interaction, fields, name)
  make = partial(_single, config, config.interaction, fields)
  return Beside(make, block.parallel, block.deep, name=name)


def joins_input(config: RankerConfig) -> bool:
  """Whether what follows the block reads x0 too; without a block it reads x0 once."""
  return config.block.concat and config.interaction != 'none'


def _single(config: RankerConfig, kind: str, fields: Fields, name: str) -> nn.Module:
  """One block of a kind, without others beside it."""
  block, layers = config.block, config.cross_layers
  of_tokens = (fields, block.token_width, layers)
  mask = (fields, block.blocks, block.width, block.ratio)
  match kind:
    case 'dcnv2':
      return CrossNetwork(layers, name=name)
    case 'dcnv2_low_rank':
      return LowRankCross(layers, block.rank, block.activation, name=name)
    case 'dcnv2_mixture':
      return MixtureCross(layers, block.rank, block.experts, block.activation, block.expert_gate, name=name)
    case 'gdcn':
      return GatedCross(layers, name=name)
    case 'masknet_serial' | 'masknet_parallel':
      return MaskNet(*mask, serial=kind == 'masknet_serial', name=name)
    case 'final':
      return FinalBlock(*mask, layers, name=name)
    case 'finalmlp':
      check_gates(block.first_gate, fields, 'ranker.block.first_gate')
      check_gates(block.second_gate, fields, 'ranker.block.second_gate')
      gates = (block.first_gate, block.second_gate)
      return FinalMLP(fields, layers, block.width, block.heads, block.outputs, gates, name=name)
    case 'dhen':
      make = partial(_single, replace(config, cross_layers=1))
      return DHEN(fields, layers, block.width, block.token_width, make, block.ensemble, name=name)
    case 'transformer':
      return FieldTransformer(*of_tokens, block.heads, block.ratio, name=name)
    case 'autoint':
      return AutoInt(*of_tokens, block.heads, name=name)
    case 'cin':
      return CompressedInteraction(*of_tokens, block.maps, name=name)
    case 'fm':
      return FactorizationMachine(fields, block.token_width, name=name)
    case 'mlp':
      return MLP((block.width,) * layers, name=name)
    case 'none':
      return MLP((), name=name)
  raise ValueError(f"ranker.interaction is '{kind}'; expected one of: {', '.join(INTERACTIONS)}")
