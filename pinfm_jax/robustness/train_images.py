"""Training of the image classifier (plain, adversarial, TRADES) and of the task heads on it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pinfm_jax.data.public.cifar10 import Images, as_floats
from pinfm_jax.errors import UserError
from pinfm_jax.robustness.attacks import Logits, classifier_objective, pgd
from pinfm_jax.robustness.balls import Ball
from pinfm_jax.robustness.cells import fingerprint
from pinfm_jax.robustness.draws import example_seeds, fold, normals, uniforms
from pinfm_jax.robustness.networks import ResNet, ResNetConfig
from pinfm_jax.robustness.tasks import NAMES, Tasks
from pinfm_jax.robustness.training import Loss, Schedule, fit
from pinfm_jax.robustness.views import shifted, view

METHODS = ('plain', 'adversarial', 'trades')
_SHIFT, _NOISE, _BANK = 30, 31, 32  # purposes of draws


@dataclass(frozen=True)
class AdversarialConfig:
  """What the classifier is trained against.

  The default is one sign step from noise of twice the radius, not projected (N-FGSM, de Jorge et al., 2022): as cheap
  as fast adversarial training, without its sudden collapse.

  Attributes:
    method: 'plain', 'adversarial' (cross entropy of attacked images) or 'trades' (Zhang et al., 2019).
    ball: of the attack.
    steps: of the attack inside a training step; 1 = fast, 10 = PGD training.
    step_size: of one step.
    noise: the start's uniform noise, in radii.
    project: keep the attack in the ball (PGD); without, noise and step add up (N-FGSM).
    beta: weight of TRADES' second term.
  """

  method: str = 'adversarial'
  ball: Ball = Ball('linf', 8 / 255)
  steps: int = 1
  step_size: float = 8 / 255
  noise: float = 2.0
  project: bool = False
  beta: float = 6.0

  def __post_init__(self):
    if self.method not in METHODS:
      raise UserError(f"adversarial.method is '{self.method}'; expected one of {', '.join(METHODS)}")


def train_classifier(
  directory: Path,
  network: ResNetConfig,
  adversarial: AdversarialConfig,
  schedule: Schedule,
  train: Images,
  held_out: Images,
) -> Any:
  """Trains a classifier, or reads a trained one; of its averaged weights those most robust on held-out images.

  Args:
    directory: of the run.
    network: the ResNet.
    adversarial: how it is trained.
    schedule: how long.
    train: images to train on.
    held_out: images that choose the weights: by accuracy under PGD-10 (clean, if `method` is plain).
  """
  model = ResNet(network)
  settings = {'network': asdict(network), 'adversarial': asdict(adversarial), 'held_out': len(held_out)}
  logits = lambda params, x: model.apply({'params': params}, x)[0]  # noqa: E731
  measure = jax.jit(lambda params, x, y, index: _accuracies(lambda x: logits(params, x), x, y, index, adversarial))

  def figures(params: Any) -> dict[str, float]:
    x, index = jnp.asarray(as_floats(held_out.pixels)), jnp.arange(len(held_out))
    clean, robust = map(float, measure(params, x, jnp.asarray(held_out.labels), index))
    return {'clean': clean, 'pgd10': robust, 'score': clean if adversarial.method == 'plain' else robust}

  def init(key: jax.Array) -> Any:
    return jax.jit(model.init)(key, jnp.zeros((1, 32, 32, 3)))['params']

  return fit(
    f'classifier ({adversarial.method})',
    directory,
    init,
    classifier_loss(logits, adversarial),
    train,
    schedule,
    figures,
    settings,
  )


def classifier_loss(logits: Any, config: AdversarialConfig) -> Loss:
  """The training loss of one method; `logits` is a function of parameters and images."""

  def loss(params: Any, x: jax.Array, label_B: jax.Array, seed_B: jax.Array) -> tuple[jax.Array, dict]:
    x = shifted(x, fold(seed_B, _SHIFT))
    frozen = lambda x: logits(jax.lax.stop_gradient(params), x)  # noqa: E731
    if config.method == 'trades':
      clean_BK = logits(params, x)
      attacked_BK = logits(params, inner_attack(frozen, x, label_B, fold(seed_B, _NOISE), config))
      value = jnp.mean(_ce(clean_BK, label_B)) + config.beta * jnp.mean(_kl(clean_BK, attacked_BK))
      return value, {'accuracy': _right(attacked_BK, label_B)}
    if config.method == 'adversarial':
      x = inner_attack(frozen, x, label_B, fold(seed_B, _NOISE), config)
    logits_BK = logits(params, x)
    return jnp.mean(_ce(logits_BK, label_B)), {'accuracy': _right(logits_BK, label_B)}

  return loss


def inner_attack(
  logits: Logits, x: jax.Array, label_B: jax.Array, seed_B: jax.Array, config: AdversarialConfig
) -> jax.Array:
  """The images that a training step is about; no gradient flows into how they were found."""
  ball = config.ball
  if config.method == 'trades':
    clean_BK = jax.lax.stop_gradient(logits(x))
    start = x + 0.001 * normals(seed_B, x.shape[1:])
    value = lambda at: jnp.sum(_kl(clean_BK, logits(at)))  # noqa: E731
  else:
    start = ball.clip(x + config.noise * ball.radius * (2 * uniforms(seed_B, x.shape[1:]) - 1))
    value = lambda at: jnp.sum(_ce(logits(at), label_B))  # noqa: E731
  limit = ball.project if config.project or config.method == 'trades' else lambda moved, x: ball.clip(moved)

  def step(at: jax.Array, _: None) -> tuple[jax.Array, None]:
    return limit(at + config.step_size * ball.direction(jax.grad(value)(at)), x), None

  return jax.lax.stop_gradient(jax.lax.scan(step, limit(start, x), None, config.steps)[0])


def train_heads(
  directory: Path, tasks: Tasks, classifier: Any, schedule: Schedule, train: Images, held_out: Images
) -> dict[str, Any]:
  """Trains the task networks on clean images, over the frozen classifier, and fills the bank of negatives.

  The tasks share no weights, so that their losses' sum trains each as if alone.

  Returns:
    Parameters as `Tasks` takes them.
  """
  c = tasks.config

  def losses(heads: Any, x: jax.Array, seed_B: jax.Array) -> dict[str, jax.Array]:
    params = {**heads, 'classifier': classifier}
    functions = zip(NAMES, (tasks.contrastive_in_batch, tasks.rotation_loss, tasks.inpainting), strict=True)
    return {name: jnp.mean(loss(params, x, fold(seed_B, k))) for k, (name, loss) in enumerate(functions)}

  def loss(heads: Any, x: jax.Array, label_B: jax.Array, seed_B: jax.Array) -> tuple[jax.Array, dict]:
    values = losses(heads, shifted(x, fold(seed_B, _SHIFT)), seed_B)
    return sum(values.values()), values

  measure = jax.jit(losses)

  def figures(heads: Any) -> dict[str, float]:
    x, seed_B = jnp.asarray(as_floats(held_out.pixels)), example_seeds(np.arange(len(held_out)), schedule.seed)
    values = {name: float(value) for name, value in measure(heads, x, seed_B).items()}
    return {**values, 'score': -sum(values.values())}

  def init(key: jax.Array) -> Any:
    params = tasks.init(key, classifier)
    return {name: params[name] for name in NAMES}

  settings = {'tasks': asdict(c), 'held_out': len(held_out), 'classifier': fingerprint(classifier)}
  heads = fit('task heads', directory, init, loss, train, schedule, figures, settings)
  return with_bank(tasks, {**heads, 'classifier': classifier}, train, schedule.seed)


def with_bank(tasks: Tasks, params: Mapping[str, Any], images: Images, seed: int = 0) -> dict[str, Any]:
  """The parameters with a bank: embeddings of one view of each of the first images."""
  embed = jax.jit(lambda x, seed_B: tasks.embed(params, view(x, seed_B, tasks.config.view)))
  count = min(tasks.config.bank, len(images))
  rows = [np.arange(start, min(start + 256, count)) for start in range(0, count, 256)]
  parts = [embed(jnp.asarray(as_floats(images.pixels[r])), example_seeds(r, seed, _BANK)) for r in rows]
  return {**params, 'bank': jnp.concatenate(parts)}


def _accuracies(
  logits: Logits, x: jax.Array, label_B: jax.Array, index_B: jax.Array, config: AdversarialConfig
) -> tuple[jax.Array, jax.Array]:
  """Accuracy on clean images, and under PGD-10 of the training's ball."""
  clean = _right(logits(x), label_B)
  found = pgd(classifier_objective(logits, label_B), x, config.ball, index_B, 10)
  return clean, jnp.mean(~found.fooled_B)


def _ce(logits_BK: jax.Array, label_B: jax.Array) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits_BK, label_B)


def _kl(clean_BK: jax.Array, attacked_BK: jax.Array) -> jax.Array:
  """[B]: divergence of the attacked image's classes from the clean one's."""
  log_clean = jax.nn.log_softmax(clean_BK)
  return jnp.sum(jnp.exp(log_clean) * (log_clean - jax.nn.log_softmax(attacked_BK)), axis=-1)


def _right(logits_BK: jax.Array, label_B: jax.Array) -> jax.Array:
  return jnp.mean(jnp.argmax(logits_BK, axis=-1) == label_B)
