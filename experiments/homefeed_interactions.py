"""Which interaction block, under which limits: the learning experiments of arXiv:2412.01985 in their order, and others.

Command:   pinfm study experiments/kuairand.py --blocks experiments/homefeed_interactions.py --jobs 2
           the same with --split test, once the choice is made
           pinfm study experiments/quickstart.py --blocks experiments/homefeed_interactions.py --quick
Hardware:  2 CPU cores, 6 GB of memory
Time:      kuairand: about 80 minutes (21 blocks, 6 settings each, then 3 seeds); --quick: under 5 minutes
Expected:  see experiments/README.md

The paper's ranker has four full-rank DCNv2 layers, whose output stands beside their input x0 in front of a shared
MLP. It tried, in this order: more layers; layers side by side; a non-linearity inside the interaction, probed with
low-rank DCNv2; a transformer, of which two layers fitted; three parallel MaskNet blocks with four DCNv2 layers on top;
and that block without x0 beside it and with a smaller MLP, which bought back the latency. The other rows are the
alternatives that it cites. Widths fit these data: MaskNet blocks have 64 or 128 outputs, not 512. A mask of ratio 2.0
costs as much as four cross layers of the same input, and there are three of them: where x0 is narrow, as here, no small
MLP makes up for that. So one more row has masks of a quarter of that width.

The rankers have no sequence module, so that a row differs from another by its block alone and a run is short. Every
block tries the same learning rates and two sizes of what is its own to size.
"""

from pinfm_jax.config import Arm

about = (
  'The first rows are the learning experiments of arXiv:2412.01985 in its order, the others the alternatives that it '
  'cites. Rankers have no sequence module; widths are 64 to 128 where the paper has 512.'
)
baseline = 'DCNv2, 4 layers'
settings = {
  'ranker.sequence': 'none',
  'ranker.transact.length': 0,
  'ranker.cross_layers': 4,
  'ranker.mlp': (128, 64),
  'ranker.block.width': 64,
  'ranker.block.token_width': 16,
}
tune = {'finetune.update.learning_rate': (1e-3, 2e-3, 4e-3)}

_MLP = tuple({'ranker.mlp': value} for value in ((64, 32), (128, 64)))
_WIDTH = tuple({'ranker.block.width': value} for value in (64, 128))
_NARROW = tuple({'ranker.block.width': value} for value in (16, 32))
_RANK = tuple({'ranker.block.rank': value} for value in (16, 32))
_TOKEN = tuple({'ranker.block.token_width': value} for value in (16, 32))
_FINAL = {'ranker.interaction': 'final', 'ranker.block.blocks': 3, 'ranker.block.ratio': 2.0}
_SHRUNK = {'ranker.block.concat': False, 'ranker.mlp': (64,)}


def _named(interaction: str, layers: int = 2, **block) -> dict:
  return {
    'ranker.interaction': interaction,
    'ranker.cross_layers': layers,
    **{f'ranker.block.{name}': value for name, value in block.items()},
  }


# Block -> (its settings, the sizes that it tries).
_blocks = {
  # The paper's learning experiments.
  baseline: (_named('dcnv2', 4), _MLP),
  'DCNv2, 2 layers': (_named('dcnv2', 2), _MLP),
  'DCNv2, 8 layers': (_named('dcnv2', 8), _MLP),
  'two DCNv2 side by side': (_named('dcnv2', 4, parallel=2), _MLP),
  'DCNv2 beside an MLP': (_named('dcnv2', 4, deep=(128, 64)), _MLP),
  'low-rank DCNv2': (_named('dcnv2_low_rank', 4), _RANK),
  'low-rank DCNv2 with tanh': (_named('dcnv2_low_rank', 4, activation='tanh'), _RANK),
  'transformer, 2 layers': (_named('transformer', 2), _TOKEN),
  'MaskNet under DCNv2': (_FINAL, _WIDTH),
  'MaskNet under DCNv2, no concat, small MLP': (_FINAL | _SHRUNK, _WIDTH),
  'MaskNet under DCNv2, no concat, small masks': (_FINAL | _SHRUNK | {'ranker.block.ratio': 0.5}, _NARROW),
  # Alternatives.
  'MaskNet, serial': (_named('masknet_serial', blocks=3), _WIDTH),
  'MaskNet, parallel': (_named('masknet_parallel', blocks=3), _WIDTH),
  'mixture of low-rank experts': (_named('dcnv2_mixture', 3, activation='tanh'), _RANK),
  'GDCN': (_named('gdcn', 3), _MLP),
  'FinalMLP': (_named('finalmlp', 2), _WIDTH),
  'DHEN': (_named('dhen', 2), _WIDTH),
  'AutoInt': (_named('autoint', 2), _TOKEN),
  'CIN': (_named('cin', 2, maps=32), _TOKEN),
  'FM': (_named('fm'), _TOKEN),
  'MLP': (_named('mlp', 2), _WIDTH),
}
arms = tuple(Arm(name, overrides) for name, (overrides, _) in _blocks.items())
sizes = {name: tried for name, (_, tried) in _blocks.items()}
quick = (
  'DCNv2, 2 layers',
  'low-rank DCNv2 with tanh',
  'MaskNet under DCNv2, no concat, small MLP',
  'MaskNet, parallel',
  'MLP',
)
