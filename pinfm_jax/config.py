"""Frozen dataclasses that configure every stage of an experiment."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


@dataclass(frozen=True)
class DataConfig:
  """Where the events and impressions come from, and how their time is split.

  Days are UTC days counted back from the last impression's, or parts of days (0.25 = 6 hours). Pretraining reads the
  events before the fine-tuning days (or, with `pretrain_overlap`, also those of the fine-tuning days); nothing trains
  on validation or test days.
  """

  source: str = 'simulator'  # 'simulator', a public source's name, or 'prepared'
  path: str = ''  # the raw files of a public source, or a prepared data set; unused by the simulator
  simulator: Mapping[str, Any] = field(default_factory=dict)  # fields of SimulatorConfig that differ from its defaults
  options: Mapping[str, Any] = field(default_factory=dict)  # of a public source's loader (`pinfm prepare --option`)
  test_days: float = 3
  validation_days: float = 1
  finetune_days: float = 10
  pretrain_overlap: bool = False
  # Whose events of the fine-tuning days an overlap reads: 'all' users', or 'others' than those with requests in them,
  # so that no ranker trains on what its tower has seen.
  pretrain_overlap_users: str = 'all'
  min_candidates: int = 4  # smaller requests are not evaluated
  # Of a log without impressions: events at the end of each history that do not train. 1: the last one, which is tested;
  # 2: also the one before, for validation (leave-one-out).
  held_out_events: int = 1


@dataclass(frozen=True)
class TableConfig:
  """Hashed item tables: S sub-tables of R rows x E (PinFM section 2: 8 x 80 M x 32)."""

  sub_tables: int = 8
  rows: int = 80_000_000
  width: int = 32
  hash_seed: int = 0  # of the hash family; -1 = exact rows: an integer id is its own row, one below `rows` - 1
  init_scale: float = 0.02
  dtype: str = 'float32'  # of the stored rows: 'float32', or 'bfloat16' with stochastic rounding

  @property
  def item_width(self) -> int:
    """Width of an item's vector: its S rows concatenated."""
    return self.sub_tables * self.width


@dataclass(frozen=True)
class TowerConfig:
  """The decoder of PinFM and its pointwise MLPs."""

  # 'gpt2' (pre-LN); 'sasrec': queries are normalised, keys and values are not, and residuals start from what is
  # normalised; 'padded_sasrec': as RecTools trains it, on padded windows, for next-item towers alone; or
  # 'hstu', which has no MLP: mlp_ratio is unused
  backbone: str = 'gpt2'
  layers: int = 12
  width: int = 512
  heads: int = 8
  mlp_ratio: int = 4
  output_width: int = 256  # width of phi_out and psi
  max_positions: int = 512
  dropout: float = 0.0  # of what each attention and MLP adds to the residual
  embedding_dropout: float = 0.0  # of elements of the tokens that enter the first block
  token_dropout: float = 0.0  # of whole tokens there
  attention_dropout: float = 0.0  # of the attention weights in the context pass (not hstu)
  rotary: bool = False  # rotary positions of queries and keys instead of learned ones (not hstu, padded_sasrec)
  rms_norm: bool = False  # RMSNorm instead of LayerNorm (not hstu, padded_sasrec)
  swiglu: bool = False  # SiLU-gated MLP instead of GELU (not hstu, padded_sasrec)
  bare_tokens: bool = False  # tokens are E + V + A themselves, without phi_in; width is then the item vectors'
  bare_targets: bool = False  # z is E itself and H the decoder's output, without psi and phi_out (tied weights)
  dot_product: bool = False  # H and z keep their length: scores are inner products, not cosines
  dtype: str = 'float32'  # of the activations; parameters, softmax and losses stay float32
  time_gap_buckets: int = 0  # embeddings of the log2 time since the event before; 0 = off, 32 cover 17 years
  remat: str = 'none'  # what the backward pass computes again, to save memory: 'full', or 'dots' (all but the matmuls)
  attention: str = 'auto'  # 'xla' (plain), 'flash', or 'auto': flash where the device has a kernel for the sizes

  @property
  def padded(self) -> bool:
    """Whether histories end padded windows, so that an event's output depends on how many events follow it."""
    return self.backbone == 'padded_sasrec'


@dataclass(frozen=True)
class PinFMConfig:
  """The pretrained model. The vocabulary sizes and the content's width come from the prepared data set."""

  tables: TableConfig = TableConfig()
  tower: TowerConfig = TowerConfig()
  num_actions: int = 0  # 0 = taken from the data set
  num_surfaces: int = 0
  content: bool = False  # add the items' projected content vectors to their id vectors
  content_width: int = 0  # 0 = taken from the data set
  id_mask: float = 0.0  # share of id vectors hidden in training, so that items learn to work by content alone


@dataclass(frozen=True)
class UpdateConfig:
  """One optimizer for tower and tables: AdamW with warm-up and cosine, row-wise Adagrad, SGD or Adam for the rows."""

  learning_rate: float = 1e-3
  table_learning_rate: float = 0.05
  # 'adagrad' (one float32 accumulator a row), 'sgd' (no state), or 'adam' (all rows move in every step, also those
  # that it did not read: for small tables).
  table_rule: str = 'adagrad'
  warmup_steps: int = 100
  final_ratio: float = 0.1  # of the peak learning rate, reached at the last step
  weight_decay: float = 0.01
  beta1: float = 0.9
  beta2: float = 0.99
  clip_norm: float = 1.0  # global norm over tower and row gradients; 0 = off
  pretrained_ratio: float = 1.0  # learning-rate ratio of the pretrained tower and the tables (PinFM section 4: 0.1)
  frozen: tuple[str, ...] = ()  # of the pretrained part, what does not learn: 'tower', 'tables'


@dataclass(frozen=True)
class PretrainConfig:
  """Pretraining over non-overlapping segments of the users' histories (PinFM section 3)."""

  steps: int = 1000
  batch_segments: int = 64  # U of the global batch
  segment_length: int = 384  # L
  pack: bool = False  # several short segments share a row of length L; batch_segments then counts rows
  downstream_length: int = 256  # L_d: the future-token loss's anchor
  window: int = 16  # L'
  pairs: int = 4  # offsets drawn of the window for an anchor of the multi-token loss
  positive_actions: tuple[str, ...] = ()  # A_pos; empty = every event is a positive target
  ntl_weight: float = 1.0
  mtl_weight: float = 1.0
  ftl_weight: float = 1.0
  max_columns: int = 16_384  # K: unique items of the global batch that serve as negatives; 0 = none
  uniform_negatives: int = 0  # random items of the catalogue a step as further columns
  negative_power: float = 0.0  # these are drawn by (positive events)^power: 0 = uniformly, 1 = by popularity
  full_catalogue: bool = False  # instead, all items of the catalogue are columns: the full softmax
  # The random columns together weigh as much as this many; 0 = each counts as one. For losses that were published
  # with this many negatives of each position's own (SASRec+SS: 256).
  count_as: int = 0
  # Of elements of the items' id vectors; in a step an item loses the same ones wherever it stands, as event and as
  # target.
  item_dropout: float = 0.0
  keep_positives: bool = False  # columns that are a user's own positives of the batch stay that user's negatives
  bce_negatives: int = 0  # binary cross-entropy with the weight of so many negatives a positive; 0 = softmax
  bce_calibration: float = 0.0  # t of gSASRec's calibration of the positives for the share of negatives; 0 = none
  impression_negatives: int = 0  # nearest shown events outside A_pos within L' as further negatives of L_ntl
  log_q: str = 'none'  # popularity correction of the columns: 'none', 'counts' (exact) or 'sketch' (streaming)
  sketch_width: int = 1_048_576  # counters of each of the sketch's 4 rows
  sketch_decay: float = 0.999  # a step; what the sketch has counted fades with it
  temperature: float = 0.05  # initial value of the learnable temperature
  fixed_temperature: bool = False  # it does not learn
  action_mask: float = 0.0  # share of events whose actions are hidden and predicted (UniPinRec: 0.2); 0 = off
  action_weight: float = 1.0  # of that loss
  checkpoint_every: int = 500
  log_every: int = 20
  eval_every: int = 0  # steps between measurements on held-out users, who do not train; 0 = all users train
  eval_share: float = 0.02  # of the users, chosen by hash: the same ones in every run
  eval_batches: int = 8  # measured each time, of batch_segments held-out segments
  # Of a log without impressions: instead of a loss on held-out users, the rank of every user's validation event is
  # measured (data.held_out_events 2), and all users train.
  eval_ranking: bool = False
  eval_metric: str = 'ndcg@10'  # by which the best of these measurements is chosen: 'ndcg@10', 'hr@10' or 'mrr'
  patience: int = 0  # measurements without a better one after which training stops; 0 = never
  keep_last: int = 2  # newest checkpoints that stay
  keep_best: int = 0  # besides, so many with the lowest held-out loss, or the best eval_metric
  use_checkpoint: str = 'newest'  # 'newest' or 'best': which one retrieval and fine-tuning use
  ema_decay: float = 0.0  # a step, of the running average of the tower's weights, which all that follows uses; 0 = off
  ema_tables: bool = False  # the tables are averaged too, all rows in every step: for small tables
  resume: str = ''  # directory of another pretraining run (same shapes and data) that a fresh run goes on from
  continue_from: str = ''  # workdir (or pretraining directory) of an earlier run on an earlier state of the data set
  continue_on: str = 'new'  # segments with events that run has not read, or 'all'
  start_from: str = ''  # a bundle (tower and tables), or the output of `pinfm import-tables` (table rows)
  update: UpdateConfig = UpdateConfig()


@dataclass(frozen=True)
class TransActConfig:
  """The ranker's own sequence module, trained from scratch: what the production baseline has (TransAct, PinFM 1)."""

  length: int = 0  # newest events that it reads; 0 = no such module (100 in production)
  width: int = 32  # of an event's item and actions and of the candidate, which stand side by side: 96 in all
  layers: int = 2
  heads: int = 2
  feedforward: int = 32
  outputs: int = 10  # outputs of the newest events that go to the ranker beside the maximum over all
  mask_hours: float = 1.0  # training hides the events of a random time, at most so long, before the request
  item_buckets: int = 65_536  # rows of its own hashed item table


@dataclass(frozen=True)
class InteractionConfig:
  """The block that crosses the features (`model.interaction`); `ranker.interaction` reads what is of its kind."""

  concat: bool = True  # the MLP behind the block reads x0 too, not the block's output alone
  parallel: int = 1  # copies of the block side by side, each with its own weights; their outputs are concatenated
  deep: tuple[int, ...] = ()  # layers of an MLP on x0 beside the block, whose output is concatenated too; empty = none
  rank: int = 32  # of low-rank DCNv2
  activation: str = 'none'  # in DCNv2's low-rank space: 'none', 'tanh' or 'relu'
  experts: int = 4  # of dcnv2_mixture
  expert_gate: str = 'softmax'  # how these are weighted: 'softmax' or 'sigmoid'
  blocks: int = 3  # MaskNet blocks (masknet_serial, masknet_parallel, final)
  ratio: float = 2.0  # hidden width of a MaskNet mask (transformer: of a layer's MLP), in widths of what goes through
  width: int = 512  # of the output of a MaskNet block, a FinalMLP stream, a DHEN layer, a layer of `mlp`
  token_width: int = 32  # blocks over fields (cin, autoint, transformer, fm) project each field to this width
  heads: int = 4  # of attention, and of FinalMLP's fusion
  maps: int = 64  # feature maps of a CIN layer
  outputs: int = 16  # of FinalMLP's fusion
  first_gate: tuple[str, ...] = ()  # fields that choose the features of FinalMLP's first stream; empty = learned
  second_gate: tuple[str, ...] = ()  # of the second
  ensemble: tuple[str, ...] = ('dcnv2', 'masknet_parallel')  # blocks of a DHEN layer
  most_field_width: int = 0  # wider fields (features, outputs of modules) are projected to this width; 0 = none
  field_norm: bool = False  # layer norm of each field
  field_gates: bool = False  # each field is scaled by a gate that sees all of them


@dataclass(frozen=True)
class RankerConfig:
  """The multi-task ranking model around the user-sequence module (feature_interactions: Homefeed ranker)."""

  sequence: str = 'pinfm'  # 'pinfm' or 'none'
  fusion: str = 'early'  # the candidate follows the history (DCAT); late: 'mean' or 'last' output of the history alone
  bidirectional: bool = False  # the history's events see each other all, not just the earlier ones
  similarity: bool = True  # <H of the last event, z of the candidate> is an input of the ranker too
  user_output: bool = False  # H of the last event is an input beside the candidate's output (late fusion has it anyway)
  similarity_width: int = 0  # so are the terms of that sum, one a direction, projected to this width; 0 = they are not
  transact: TransActConfig = TransActConfig()
  interaction: str = 'dcnv2'  # the block that crosses the features
  cross_layers: int = 3  # its layers (MaskNet alone has `block.blocks` instead)
  block: InteractionConfig = InteractionConfig()
  mlp: tuple[int, ...] = (256, 128)
  dropout: float = 0.0
  item_buckets: int = 65_536  # the ranker's own hashed item-id embedding, with or without PinFM; 0 = none
  max_sparse_width: int = 32
  sparse_width: int = 0  # of all embeddings of sparse features; 0 = by cardinality, at most max_sparse_width
  raw_embeddings: bool = False  # these enter as they are, not normalised to unit length
  embedding_width: int = 32  # embedding features are projected to this width
  module_width: int = 64  # the module's outputs are projected to this width
  learnable_token: bool = False  # one more token between the history and the candidate (PinFM-GraphSAGE-LT)
  candidate_content: bool = False  # projected content of the item is added to the candidate's token (PinFM-GraphSAGE)


@dataclass(frozen=True)
class ColdStartConfig:
  """Fine-tuning techniques for new items (PinFM section 3.2: CIR and IDD)."""

  randomise: float = 0.1  # share of candidate ids replaced by a random id
  age_edges_hours: tuple[float, ...] = (168.0, 672.0)
  age_dropout: tuple[float, ...] = (0.7, 0.5)  # of the module's outputs, for items younger than each edge
  whole_vector: bool = False  # all of an item's outputs are dropped together, not each element by itself


@dataclass(frozen=True)
class FinetuneConfig:
  """Fine-tuning inside the ranking model over request-grouped batches."""

  epochs: float = 1.0
  batch_requests: int = 64  # U of the global batch
  candidates: int = 16  # C: longer requests are split, shorter ones padded
  min_candidates: int = 1  # smaller requests do not train
  history_length: int = 256  # L_d
  history_block: int = 32  # the history window slides in blocks of this many events
  init: str = 'pretrained'  # 'pretrained' (warm start) or 'scratch'
  label_weights: Mapping[str, float] = field(default_factory=dict)  # weight of a label's loss; 1 if not named
  module_weight: float = 0.5  # ranking losses applied to the module's own output
  tie_weight: float = 0.1  # squared difference of the module's and the ranker's predictions
  ntl_weight: float = 0.1  # next-token loss over the histories
  mtl_weight: float = 0.0  # multi-token loss over the histories
  mtl_window: int = 16  # L' of that loss
  mtl_pairs: int = 4  # offsets drawn of the window for an anchor
  ntl_columns: int = 2048  # negatives of these two losses
  align_weight: float = 0.1  # aligns projected content with the items' vectors, where ranker.candidate_content adds it
  cold_start: ColdStartConfig = ColdStartConfig()
  checkpoint_every: int = 500
  log_every: int = 20
  resume: str = ''  # directory of another fine-tuning run (same shapes and data) that a fresh run goes on from
  start_from: str = ''  # instead of `init`, for rankers with PinFM: a bundle, or imported table rows
  update: UpdateConfig = UpdateConfig(pretrained_ratio=0.1, table_learning_rate=0.05)


@dataclass(frozen=True)
class EvaluateConfig:
  """What is measured on the test split, and the utility that orders a request."""

  main_label: str = 'save'
  labels: tuple[str, ...] = ()  # shown in the table; empty = all
  utility: Mapping[str, float] = field(default_factory=dict)  # weight of each label's probability; hide's is negative
  age_edges_hours: tuple[float, ...] = (24.0, 168.0, 672.0)  # of the item-age buckets in tables
  resample: str = 'users'  # what the intervals' bootstrap draws: 'users' (all rows of one stay together) or 'requests'
  split: str = 'test'  # 'validation' while tuning: the test split is read once, at the end
  retrieval_users: int = 2000  # users of the whole-catalogue evaluation of the pretrained tower
  filter_seen: bool = False  # of that evaluation: a user's earlier items are not ranked, but for the target itself
  whole_catalogue: bool = False  # also with items that training never saw, as candidates and as targets
  ks: tuple[int, ...] = (10, 50)


@dataclass(frozen=True)
class ServeConfig:
  """The exported bundle."""

  storage: str = 'int4'  # 'int4', 'int8' or 'float32' tables
  clip: bool = True  # round rows with the least squared error; false = from minimum to maximum, as in the paper


@dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes (0 = all devices that are left), and how table rows lie over them."""

  data: int = 0
  fsdp: int = 1
  model: int = 1
  table_axes: tuple[str, ...] = ('data', 'fsdp', 'model')  # rows lie over these, with replicas over the others
  exchange_capacity: int = 0  # rows a device may ask of another in a round; 0 = measured on the first batch


@dataclass(frozen=True)
class Arm:
  """One fine-tuned ranker of a comparison: the experiment with some settings changed."""

  name: str
  overrides: Mapping[str, Any] = field(default_factory=dict)
  paper: str = ''  # the paper's own figure for such an arm, shown beside ours

  @property
  def directory(self) -> str:
    """Name of the arm's folder in a seed's folder."""
    name = ''.join(c if c.isalnum() else '_' for c in self.name.lower())
    if len(name) > 80:  # file systems end at 255 bytes, and logs have longer names still
      name = f'{name[:69]}_{hashlib.sha256(self.name.encode()).hexdigest()[:10]}'
    return f'ranker_{name}'


@dataclass(frozen=True)
class Experiment:
  """Everything `pinfm run` needs; a launch file defines one, named `experiment`."""

  name: str
  data: DataConfig = DataConfig()
  model: PinFMConfig = PinFMConfig()
  pretrain: PretrainConfig = PretrainConfig()
  ranker: RankerConfig = RankerConfig()
  finetune: FinetuneConfig = FinetuneConfig()
  evaluate: EvaluateConfig = EvaluateConfig()
  serve: ServeConfig = ServeConfig()
  mesh: MeshConfig = MeshConfig()
  # No arm: the tower is pretrained and evaluated by retrieval alone, which a log without impressions can do.
  arms: tuple[Arm, ...] = (Arm('without PinFM', {'ranker.sequence': 'none'}), Arm('with PinFM'))
  baseline: str = 'without PinFM'
  challenger: str = ''  # an arm whose differences from every other arm get a table of their own
  seeds: tuple[int, ...] = (0,)
