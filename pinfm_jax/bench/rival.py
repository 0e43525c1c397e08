"""Drives a published PyTorch SASRec (github.com/pmixer/SASRec.pytorch) from the user's own checkout of it.

No line of the rival is part of this project: its model class is imported from the directory given. Around it stands
its published training step: dense Adam (0.001; 0.9, 0.98) over all parameters, binary cross-entropy of each next item
and of one negative a position. Its L2 term is left out, since it weighs 0 by default and yet touches the whole item
table, which would only slow the rival down.
"""

import importlib.util
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from pinfm_jax.errors import UserError


@dataclass(frozen=True)
class Shape:
  """What both sides share.

  Attributes:
    width: of item vectors and of the transformer.
    layers: blocks.
    heads: of the attention.
    length: L, tokens a sequence.
  """

  width: int = 50
  layers: int = 2
  heads: int = 1
  length: int = 200


def torch_is_installed() -> bool:
  """Whether PyTorch, which this project does not need, can be imported."""
  return importlib.util.find_spec('torch') is not None


def find_rival(directory: str | Path) -> Path:
  """The file of the rival's model class: `python/model.py` (or `model.py`) of a checkout.

  Raises:
    UserError: there is no such file.
  """
  root = Path(directory)
  path = next((p for p in (root / 'python' / 'model.py', root / 'model.py') if p.is_file()), None)
  if path is None:
    raise UserError(
      f'--rival {directory} holds no python/model.py; expected a checkout of github.com/pmixer/SASRec.pytorch'
    )
  return path


def load_rival(path: Path) -> ModuleType:
  """Imports the file of the rival's model class.

  Raises:
    UserError: it cannot be imported, or does not define SASRec.
  """
  spec = importlib.util.spec_from_file_location('pinfm_bench_rival', path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:  # whatever that file raises is the checkout's
    raise UserError(f'{path} cannot be imported: {type(error).__name__}: {error}') from error
  if not hasattr(module, 'SASRec'):
    raise UserError(f'{path} defines no SASRec; expected a checkout of github.com/pmixer/SASRec.pytorch')
  return module


def rival_commit(module: ModuleType) -> str:
  """Commit of the checkout, with '+' where the model's file differs from it; 'unknown' where it is no Git checkout."""
  path = Path(module.__file__).resolve()

  def git(*words: str) -> str:
    command = ['git', '-C', str(path.parent), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ''

  changed = git('status', '--porcelain', '--', path.name)
  return (git('rev-parse', 'HEAD') or 'unknown') + ('+' if changed else '')


class Rival:
  """The rival's training run; each call is one step on NumPy batches, as its own loop does it."""

  def __init__(self, module: ModuleType, items: int, shape: Shape, sequences: int, threads: int):
    """Builds and initialises the model as its training script does.

    Args:
      module: see `load_rival`.
      items: of the catalogue.
      shape: sizes of the model.
      sequences: of a batch.
      threads: of PyTorch.
    """
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    self.steps = 0
    arguments = SimpleNamespace(
      device='cpu', hidden_units=shape.width, maxlen=shape.length, num_blocks=shape.layers, num_heads=shape.heads,
      dropout_rate=0.0, norm_first=False,
    )  # fmt: skip
    self._model = module.SASRec(sequences, items, arguments)
    for parameter in self._model.parameters():
      if parameter.dim() > 1:
        torch.nn.init.xavier_normal_(parameter.data)
    with torch.no_grad():
      self._model.item_emb.weight[0] = 0
      self._model.pos_emb.weight[0] = 0
    self._model.train()
    self._optimizer = torch.optim.Adam(self._model.parameters(), lr=0.001, betas=(0.9, 0.98))
    self._criterion = torch.nn.BCEWithLogitsLoss()
    self._rng, self._items, self._shape, self._sequences = np.random.default_rng(0), items, shape, sequences
    self._batches = [self._batch() for _ in range(4)]

  @property
  def parameters(self) -> int:
    """How many parameters the model has."""
    return sum(parameter.numel() for parameter in self._model.parameters())

  def __call__(self, number: int) -> Any:
    """One training step: forward, loss, backward, optimizer."""
    import torch

    users, sequence, positive, negative = self._batches[number % len(self._batches)]
    positive_logits, negative_logits = self._model(users, sequence, positive, negative)
    self._optimizer.zero_grad()
    real = np.where(positive != 0)
    loss = self._criterion(positive_logits[real], torch.ones(len(real[0])))
    loss = loss + self._criterion(negative_logits[real], torch.zeros(len(real[0])))
    loss.backward()
    self._optimizer.step()
    self.steps += 1
    self.loss = loss.item()

  def _batch(self) -> tuple[np.ndarray, ...]:
    events = self._rng.integers(1, self._items + 1, (self._sequences, self._shape.length + 1))
    negative = self._rng.integers(1, self._items + 1, (self._sequences, self._shape.length))
    return np.arange(self._sequences), events[:, :-1], events[:, 1:], negative
