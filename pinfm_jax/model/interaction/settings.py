"""Names of the interaction blocks, the checks of their settings, and how they are described."""

from pinfm_jax.config import RankerConfig
from pinfm_jax.errors import UserError

# What stands in `ranker.interaction` -> in words.
INTERACTIONS = {
  'dcnv2': 'DCNv2',
  'dcnv2_low_rank': 'low-rank DCNv2',
  'dcnv2_mixture': 'DCNv2 with a mixture of low-rank experts',
  'gdcn': 'GDCN',
  'masknet_serial': 'serial MaskNet',
  'masknet_parallel': 'parallel MaskNet',
  'final': 'parallel MaskNet with DCNv2 on top',
  'finalmlp': 'FinalMLP',
  'dhen': 'DHEN',
  'transformer': 'a transformer over fields',
  'autoint': 'AutoInt',
  'cin': 'CIN',
  'fm': 'FM',
  'mlp': 'an MLP',
  'none': 'no interaction block',
}
_OF_FIELDS = ('transformer', 'autoint', 'cin', 'fm')
_MAY_HAVE_NO_LAYER = ('dcnv2', 'dcnv2_low_rank', 'dcnv2_mixture', 'gdcn', 'final', 'mlp')  # it leaves x0 as it is
_WITHOUT_LAYERS = ('masknet_serial', 'masknet_parallel', 'fm', 'none')  # `cross_layers` says nothing of these


def check_interaction(ranker: RankerConfig) -> None:
  """Checks the settings of the interaction block that depend on each other.

  Raises:
    UserError: the first that cannot work.
  """
  name, block = ranker.interaction, ranker.block
  if not ranker.cross_layers and name not in (*_MAY_HAVE_NO_LAYER, *_WITHOUT_LAYERS):
    raise UserError(f"ranker.cross_layers is 0; ranker.interaction '{name}' needs at least 1")
  if not block.ratio > 0:
    raise UserError(f'ranker.block.ratio is {block.ratio}; expected a positive number')
  if any(width < 1 for width in block.deep):
    raise UserError(f'ranker.block.deep is {block.deep}; expected numbers of at least 1')
  if name == 'none' and (block.parallel > 1 or block.deep):
    raise UserError(
      "ranker.interaction is 'none', but ranker.block.parallel or ranker.block.deep asks for more beside it; set "
      'ranker.interaction=mlp, or parallel to 1 and deep to empty'
    )
  if name == 'dhen':
    _check_ensemble(ranker)
  parts = set(block.ensemble) if name == 'dhen' else {name}
  if parts & {'transformer', 'autoint'} and block.token_width % block.heads:
    raise UserError(
      f'ranker.block.token_width {block.token_width} is not a multiple of ranker.block.heads {block.heads}'
    )
  if 'finalmlp' in parts and block.width % block.heads:
    raise UserError(f'ranker.block.width {block.width} is not a multiple of ranker.block.heads {block.heads}')


def _check_ensemble(ranker: RankerConfig) -> None:
  block = ranker.block
  allowed = [name for name in INTERACTIONS if name not in ('dhen', 'none')]
  wrong = [name for name in block.ensemble if name not in allowed]
  if wrong or not block.ensemble:
    found = f"names '{wrong[0]}'" if wrong else 'is empty'
    raise UserError(f'ranker.block.ensemble {found}; expected some of: {", ".join(allowed)}')
  if len(set(block.ensemble)) < len(block.ensemble):
    raise UserError(f'ranker.block.ensemble is {",".join(block.ensemble)}; expected each block once')
  if ranker.cross_layers > 1 and 'finalmlp' in block.ensemble and (block.first_gate or block.second_gate):
    raise UserError(
      'ranker.block.first_gate and second_gate name fields, which the second layer of ranker.interaction dhen does not '
      'have; leave them empty, or set ranker.cross_layers=1'
    )
  of_fields = [name for name in block.ensemble if name in (*_OF_FIELDS, 'masknet_serial', 'masknet_parallel', 'final')]
  if of_fields and ranker.cross_layers > 1 and block.width % block.token_width:
    raise UserError(
      f"ranker.block.width {block.width} is not a multiple of ranker.block.token_width {block.token_width}: '"
      f"{of_fields[0]}' in the second layer of ranker.interaction dhen needs fields of that width"
    )


def describe_interaction(ranker: RankerConfig) -> str:
  """The block in a few words, for a model card."""
  name, block, layers = ranker.interaction, ranker.block, ranker.cross_layers
  text = INTERACTIONS.get(name, name)
  if name in ('masknet_serial', 'masknet_parallel', 'final'):
    text += f' ({block.blocks} blocks of width {block.width}'
    text += f', {layers} layers of DCNv2)' if name == 'final' else ')'
  elif name == 'dhen':
    text += f' of {layers} layers of {" + ".join(block.ensemble)}, width {block.width}'
  elif name not in _WITHOUT_LAYERS:
    text += f' of {layers} layers'
  if block.parallel > 1:
    text = f'{block.parallel} times {text}, side by side'
  if block.deep:
    text += f', an MLP {" x ".join(map(str, block.deep))} beside it'
  return text
