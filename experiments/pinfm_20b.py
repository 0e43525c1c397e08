"""Pretraining at the paper's size: 8 tables of 80 M rows x 32 (20.48 B parameters), a decoder of 12 layers x 512.

Command:   pinfm run experiments/pinfm_20b.py --set data.path=DIR pretrain.batch_segments=N
           DIR is a prepared data set (`pinfm prepare`) that knows the action `save`. N and the hardware go together;
           these commands say beforehand what a device needs and an estimate of a step's time:
             pinfm plan experiments/pinfm_20b.py --devices 1 --chip H200 --set pretrain.batch_segments=64
             pinfm plan experiments/pinfm_20b.py --devices 8 --chip H100 --set pretrain.batch_segments=512
             pinfm plan experiments/pinfm_20b.py --devices 64 --chip H100 --set pretrain.batch_segments=2048
             pinfm plan experiments/pinfm_20b.py --devices 64 --chip v5p --set pretrain.batch_segments=2048
Hardware:  one GPU of 141 GB, or more and smaller ones: rows and their accumulators take 43.5 GB over all devices.
Time:      planned, not measured: see the table in experiments/README.md, and the commands above for other hardware.
Expected:  the losses ntl, mtl and ftl fall; nothing of the paper's data is public, so no figure of it can be met here.

The paper gives tables, losses and the length of serving (256); it does not give the decoder's size, the length of
training segments, batch, rates or number of steps behind its figures (it shows up to 640,000). Those here are choices.
"""

from pinfm_jax.config import (
  DataConfig,
  Experiment,
  PinFMConfig,
  PretrainConfig,
  TableConfig,
  TowerConfig,
  UpdateConfig,
)

experiment = Experiment(
  name='pinfm_20b',
  data=DataConfig(source='prepared', path='data/activity'),
  model=PinFMConfig(
    tables=TableConfig(sub_tables=8, rows=80_000_000, width=32, dtype='bfloat16'),
    tower=TowerConfig(layers=12, width=512, heads=8, output_width=256, max_positions=512, dtype='bfloat16'),
  ),
  pretrain=PretrainConfig(
    steps=640_000,
    checkpoint_every=5_000,
    log_every=100,
    batch_segments=512,
    segment_length=384,
    downstream_length=256,
    window=16,
    pairs=4,
    positive_actions=('save',),
    max_columns=16_384,
    update=UpdateConfig(learning_rate=1e-3, table_learning_rate=0.05, warmup_steps=5_000),
  ),
  arms=(),
)
