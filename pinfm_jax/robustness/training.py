"""The training loop of the image networks: resumable, averaged, with the best held-out weights kept.

Which images a step sees is a function of (seed, step), and every draw is a hash of (seed, step, image), so a resumed
run is the uninterrupted one.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp

from pinfm_jax.data.public.cifar10 import Images
from pinfm_jax.errors import UserError
from pinfm_jax.progress import Progress
from pinfm_jax.robustness.draws import example_seeds
from pinfm_jax.workdir import claim, write_json

logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax reports every file it touches

# (params, images float [B, H, W, C] in [0, 1], label_B, seed_B) -> mean loss and named figures.
Loss = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
# params -> named figures of held-out images; 'score' is the one by which weights are kept, higher = better.
HeldOut = Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class Schedule:
  """How long and how fast.

  Attributes:
    epochs: over the training images.
    batch: images of a step.
    learning_rate: its peak; it rises linearly for `warmup` of the steps and falls linearly to 0.
    warmup: share of the steps.
    weight_decay: of kernels; gains, biases and norms have none.
    momentum: Nesterov's.
    average: decay a step of the exponential average of the weights, which is what is evaluated and kept.
    evaluations: how often the held-out images are looked at, evenly spread; a checkpoint is written each time.
    seed: of initialisation, order and draws.
  """

  epochs: float = 20.0
  batch: int = 128
  learning_rate: float = 0.1
  warmup: float = 0.2
  weight_decay: float = 5e-4
  momentum: float = 0.9
  average: float = 0.995
  evaluations: int = 10
  seed: int = 0

  def __post_init__(self):
    for name in ('epochs', 'batch', 'learning_rate', 'evaluations'):
      if not getattr(self, name) > 0:
        raise UserError(f'schedule.{name} is {getattr(self, name)}; expected a positive number')

  def steps(self, images: int) -> int:
    """Of the whole training."""
    return max(1, round(self.epochs * images / self.batch))


def fit(
  label: str,
  directory: Path,
  init: Callable[[jax.Array], Any],
  loss: Loss,
  images: Images,
  schedule: Schedule,
  held_out: HeldOut,
  settings: Mapping[str, Any],
) -> Any:
  """Trains, or reads what has been trained.

  Args:
    label: of the progress line.
    directory: of checkpoints, history.json and the finished weights; made with other settings, it is refused.
    init: a key to parameters.
    loss: of a batch.
    images: to train on.
    schedule: how long and how fast.
    held_out: figures of averaged weights.
    settings: everything else that the result depends on.

  Returns:
    The averaged weights of the best held-out score.
  """
  settings = {**settings, 'schedule': asdict(schedule), 'images': len(images)}
  claim(directory, settings, started=any(directory.glob('checkpoints/[0-9]*')))
  steps, optimizer = schedule.steps(len(images)), _optimizer(schedule, len(images))
  create = lambda: _created(init(jax.random.key(schedule.seed)), optimizer)  # noqa: E731
  checkpoints = ocp.training.Checkpointer(
    (directory / 'checkpoints').absolute(),
    preservation_policy=ocp.training.preservation_policies.LatestN(1),
    save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
  )
  try:
    if checkpoints.latest is None:
      state = create()
    else:
      here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), jax.eval_shape(create)
      )
      state = checkpoints.load(checkpoints.latest.step, abstract)
    step, history = int(state['step']), _history(directory)
    if step < steps:
      state = _run(label, directory, state, (loss, optimizer, held_out), images, schedule, checkpoints, history)
    return state['best']
  finally:
    checkpoints.close()


def _run(
  label: str,
  directory: Path,
  state: dict[str, Any],
  parts: tuple[Loss, optax.GradientTransformation, HeldOut],
  images: Images,
  schedule: Schedule,
  checkpoints: Any,
  history: list[dict[str, float]],
) -> dict[str, Any]:
  loss, optimizer, held_out = parts
  step, steps = int(state['step']), schedule.steps(len(images))
  due = {round(steps * (i + 1) / schedule.evaluations) for i in range(schedule.evaluations)}
  advance = train_step(loss, optimizer, schedule)
  pixels, labels = jnp.asarray(images.pixels), jnp.asarray(images.labels)
  order, note = Order(len(images), schedule), ''
  history = [row for row in history if row['step'] <= step]
  progress = Progress(label, steps, 'steps')
  progress.start_at(step)
  while step < steps:
    state, figures = advance(state, pixels, labels, jnp.asarray(order.rows(step)))
    step += 1
    if step in due:
      measured = held_out(state['average'])
      history.append({'step': step, **{k: float(v) for k, v in figures.items()}, **measured})
      if not np.isfinite(history[-1]['loss']):
        raise UserError(f'{label}: the loss is {history[-1]["loss"]} at step {step}; lower schedule.learning_rate')
      if measured['score'] > float(state['best_score']):
        # A copy: the step gives the buffers of its state away.
        best = jax.tree.map(jnp.copy, state['average'])
        state = {**state, 'best': best, 'best_score': jnp.float32(measured['score'])}
      checkpoints.save(step, state)
      write_json(directory / 'history.json', history)
      note = '  '.join(f'{name} {value:.3f}' for name, value in measured.items() if name != 'score')
    progress.update(step, note)
  progress.close(note)
  return state


def train_step(loss: Loss, optimizer: optax.GradientTransformation, schedule: Schedule) -> Callable[..., Any]:
  """One step as a compiled function (state, pixels uint8, labels, rows_B) -> (state, figures)."""

  def step(
    state: dict[str, Any], pixels: jax.Array, labels: jax.Array, rows_B: jax.Array
  ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    x = pixels[rows_B].astype(jnp.float32) / 255
    seed_B = example_seeds(rows_B, schedule.seed, state['step'])
    (value, figures), gradients = jax.value_and_grad(loss, has_aux=True)(state['params'], x, labels[rows_B], seed_B)
    updates, opt_state = optimizer.update(gradients, state['opt_state'], state['params'])
    params = optax.apply_updates(state['params'], updates)
    # A young average would be mostly the initial weights.
    decay = jnp.minimum(schedule.average, (1.0 + state['step']) / (10.0 + state['step']))
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state['average'], params)
    state = {**state, 'step': state['step'] + 1, 'params': params, 'opt_state': opt_state, 'average': average}
    return state, {'loss': value, **figures}

  return jax.jit(step, donate_argnums=0)


class Order:
  """Which images a step sees: every epoch a permutation of its own; the last, incomplete batch runs into the next."""

  def __init__(self, images: int, schedule: Schedule):
    self._images, self._batch, self._seed = images, schedule.batch, schedule.seed
    self._epoch, self._rows = -1, np.zeros(0, np.int64)

  def rows(self, step: int) -> np.ndarray:
    """[batch] int32."""
    places = np.arange(step * self._batch, (step + 1) * self._batch)
    epochs = places // self._images
    return np.concatenate([self._permutation(e)[places[epochs == e] % self._images] for e in np.unique(epochs)]).astype(
      np.int32
    )

  def _permutation(self, epoch: int) -> np.ndarray:
    if epoch != self._epoch:
      rng = np.random.default_rng((self._seed, int(epoch)))
      self._epoch, self._rows = epoch, rng.permutation(self._images)
    return self._rows


def _optimizer(schedule: Schedule, images: int) -> optax.GradientTransformation:
  steps = schedule.steps(images)
  rise = max(1, round(schedule.warmup * steps))
  rate = optax.join_schedules(
    [
      optax.linear_schedule(schedule.learning_rate / rise, schedule.learning_rate, rise),
      optax.linear_schedule(schedule.learning_rate, 0.0, max(1, steps - rise)),
    ],
    [rise],
  )
  kernels = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
  return optax.chain(
    optax.clip_by_global_norm(5.0),
    optax.add_decayed_weights(schedule.weight_decay, kernels),
    optax.sgd(rate, schedule.momentum, nesterov=True),
  )


def _created(params: Any, optimizer: optax.GradientTransformation) -> dict[str, Any]:
  return {
    'step': jnp.int32(0),
    'params': params,
    'average': jax.tree.map(jnp.copy, params),
    'opt_state': optimizer.init(params),
    'best': jax.tree.map(jnp.copy, params),
    'best_score': jnp.float32(-jnp.inf),
  }


def _history(directory: Path) -> list[dict[str, float]]:
  path = directory / 'history.json'
  return json.loads(path.read_text(encoding='utf-8')) if path.exists() else []
