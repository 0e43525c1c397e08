"""SASRec with three losses as configurations of the same tower, beside our model: arms for experiments/sequential/*.py.

Command:   pinfm sweep experiments/sequential/beauty.py --arms experiments/sequential/baselines.py --split test
           (sports.py, toys.py and ml1m.py alike; --only PinFM SASRec+SS leaves the two losses of ml1m's papers out)
Hardware:  2 CPU cores, 3 GB of memory
Time:      see experiments/README.md
Expected:  SASRec+SS within 4 % of its published rows on Beauty, Sports and Toys (experiments/README.md)

SASRec+SS: length 50 (ml1m: 200), 1 block, 1 head, width 64, dropout 0.2 (of the item vectors too), softmax over 256
sampled negatives, Adam 1e-3 (beta2 0.98), patience 50 epochs by HR@10 of the validation events; its authors' ml1m has
2 blocks, dropout 0.1 and 100 epochs, which is the second arm. SASRec (binary cross-entropy with the weight of 1
negative) and gSASRec (256 negatives, calibration t = 0.75) have the sizes that gSASRec's authors publish for ml1m: 2
blocks, width 128, dropout 0.5. The positions of a step share negatives, 2,048 that weigh as 256 (the last two arms:
256); the published codes draw for each position.
"""

from pinfm_jax.sequential import baselines

arms = baselines
about = (
  'SASRec+SS, SASRec and gSASRec are configurations of the same tower with the published settings (of the latter two, '
  'those for ml1m). The positions of a step share negatives.'
)
baseline = 'SASRec+SS'
