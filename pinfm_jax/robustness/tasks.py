"""The self-supervised tasks on images: their losses in training, and as terms of a repair.

The paper's three: agreement of augmented views (contrastive), the rotation, the hidden parts. In a repair each
example's loss is its own: the contrastive negatives are a fixed bank of clean images' embeddings, not batch mates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pinfm_jax.errors import UserError
from pinfm_jax.robustness.draws import fold, uniforms
from pinfm_jax.robustness.networks import (
  Inpainter,
  Projection,
  ResNet,
  ResNetConfig,
  RotationHead,
  RotationNet,
  normalise,
)
from pinfm_jax.robustness.repair import LossTerm
from pinfm_jax.robustness.views import ViewConfig, centre_mask, mask, rotate, view

NAMES = ('contrastive', 'rotation', 'inpainting')


@dataclass(frozen=True)
class TasksConfig:
  """The task networks and how their losses are drawn.

  Attributes:
    views: of an image, in the contrastive loss.
    view: how they are drawn.
    temperature: of the contrastive softmax.
    bank: how many clean images' embeddings are its negatives in a repair.
    projection: hidden and output width of the contrastive head.
    rotation: 'head' on the classifier's frozen map of stage `rotation_stage`, or 'network', one of its own (paper).
    rotation_stage: which stage's map the head reads.
    rotation_width: channels of the head or network.
    rotations: 4 = every loss sees an image in all four rotations (paper); 1 = in one that is drawn, a quarter of the
      work.
    inpainting_width: channels of the inpainting network.
    inpainting_blocks: its residual blocks.
    mask: 'patches' (half of the 8 x 8 squares, drawn) or 'centre' (the paper's square of 16 x 16).
    weights: alpha of each task in the repair.
  """

  views: int = 2
  view: ViewConfig = ViewConfig()
  temperature: float = 0.2
  bank: int = 1024
  projection: tuple[int, int] = (256, 16)
  rotation: str = 'head'
  rotation_stage: int = 1
  rotation_width: int = 64
  rotations: int = 1
  inpainting_width: int = 64
  inpainting_blocks: int = 2
  mask: str = 'patches'
  weights: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 1.0))

  def __post_init__(self):
    for name, choices in (('rotation', ('head', 'network')), ('rotations', (1, 4)), ('mask', ('patches', 'centre'))):
      if getattr(self, name) not in choices:
        raise UserError(f'tasks.{name} is {getattr(self, name)!r}; expected one of {", ".join(map(str, choices))}')
    if self.views < 2:
      raise UserError(f'tasks.views is {self.views}; expected at least 2: a loss compares them')
    if set(self.weights) != set(NAMES):
      raise UserError(f'tasks.weights names {", ".join(self.weights)}; expected {", ".join(NAMES)}')


class Tasks:
  """The three tasks' losses over a frozen classifier.

  Parameters are given to each call: 'classifier', 'contrastive', 'rotation', 'inpainting', and 'bank' [N, width], the
  clean images' embeddings.
  """

  def __init__(self, config: TasksConfig, classifier: ResNetConfig):
    self.config = config
    self.classifier = ResNet(classifier)
    self.projection = Projection(*config.projection)
    network = RotationHead if config.rotation == 'head' else RotationNet
    self.rotation = network(config.rotation_width, min(32, config.rotation_width))
    self.inpainter = Inpainter(config.inpainting_width, config.inpainting_blocks, min(16, config.inpainting_width))
    self._shares = _shares(config, classifier)

  def init(self, rng: jax.Array, classifier: Any) -> dict[str, Any]:
    """Untrained parameters of the heads beside a classifier's; the control of the tables repairs with them.

    The bank is empty: `embed` clean images to fill it.
    """
    x = jnp.zeros((1, 32, 32, 3))
    rngs = jax.random.split(rng, 3)
    _, features, maps = self.classifier.apply({'params': classifier}, x)
    source = maps[self.config.rotation_stage] if self.config.rotation == 'head' else x
    return {
      'classifier': classifier,
      'contrastive': self.projection.init(rngs[0], features)['params'],
      'rotation': self.rotation.init(rngs[1], source)['params'],
      'inpainting': self.inpainter.init(rngs[2], x, x[..., :1])['params'],
      'bank': jnp.zeros((0, self.config.projection[1])),
    }

  def logits(self, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """[B, classes] of the frozen classifier."""
    return self.classifier.apply({'params': params['classifier']}, x)[0]

  def embed(self, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """[B, width]: unit embeddings of views, as the contrastive loss compares them."""
    features = self.classifier.apply({'params': params['classifier']}, x)[1]
    return self.projection.apply({'params': params['contrastive']}, features)

  def contrastive(self, params: Mapping[str, Any], x: jax.Array, seed_B: jax.Array) -> jax.Array:
    """[B]: how badly an image's views tell each other from the bank; the views are no one's negatives."""
    z_VBZ = self._embedded_views(params, x, seed_B)
    temperature = self.config.temperature
    bank_B1 = jnp.stack([jax.nn.logsumexp(z @ params['bank'].T / temperature, axis=-1) for z in z_VBZ])
    total, pairs = 0.0, 0
    for i in range(self.config.views):
      for j in range(self.config.views):
        if i != j:
          agreement = jnp.sum(z_VBZ[i] * z_VBZ[j], axis=-1) / temperature
          total, pairs = total + jnp.logaddexp(agreement, bank_B1[i]) - agreement, pairs + 1
    return total / pairs

  def contrastive_in_batch(self, params: Mapping[str, Any], x: jax.Array, seed_B: jax.Array) -> jax.Array:
    """[B]: the training loss, whose negatives are all views of the batch's other images and of no one's own."""
    z_VBZ = self._embedded_views(params, x, seed_B)
    V, B, _ = z_VBZ.shape
    scores = jnp.einsum('vbz,ucz->vbuc', z_VBZ, z_VBZ) / self.config.temperature
    same_B1B = jnp.eye(B, dtype=bool)[:, None, :]
    others_VB = jax.nn.logsumexp(jnp.where(same_B1B, -jnp.inf, scores).reshape(V, B, V * B), axis=-1)
    own_VBV = jnp.einsum('vbub->vbu', scores)
    loss_VBV = jnp.logaddexp(own_VBV, others_VB[:, :, None]) - own_VBV
    return jnp.sum(jnp.where(jnp.eye(V, dtype=bool)[:, None, :], 0.0, loss_VBV), axis=(0, 2)) / (V * (V - 1))

  def rotation_loss(self, params: Mapping[str, Any], x: jax.Array, seed_B: jax.Array) -> jax.Array:
    """[B]: cross entropy of the rotation, over all four or one that is drawn."""
    drawn_B = jnp.floor(4 * uniforms(seed_B, (1,))[:, 0]).astype(jnp.int32)
    rotations = range(self.config.rotations)
    turns = [jnp.full_like(drawn_B, k) for k in rotations] if len(rotations) == 4 else [drawn_B]
    logits = self.rotation_logits(params, jnp.concatenate([rotate(x, t) for t in turns]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.concatenate(turns))
    return jnp.mean(losses.reshape(len(turns), -1), axis=0)

  def rotation_logits(self, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """[B, 4] of images as they are."""
    if self.config.rotation == 'head':
      x = self.classifier.apply({'params': params['classifier']}, x)[2][self.config.rotation_stage]
    return self.rotation.apply({'params': params['rotation']}, x)

  def inpainting(self, params: Mapping[str, Any], x: jax.Array, seed_B: jax.Array) -> jax.Array:
    """[B]: mean squared error of the hidden pixels, normalised."""
    shown = mask(seed_B) if self.config.mask == 'patches' else centre_mask(x.shape[0])
    guess = self.inpainter.apply({'params': params['inpainting']}, x, shown)
    error = jnp.square(guess - normalise(x)) * (1 - shown)
    return jnp.sum(error, axis=(1, 2, 3)) / (3 * jnp.sum(1 - shown, axis=(1, 2, 3)))

  def terms(self, params: Mapping[str, Any], names: tuple[str, ...] = NAMES) -> tuple[LossTerm, ...]:
    """The tasks of these names as terms of a repair.

    Raises:
      UserError: there is no such task, or the bank that the contrastive loss needs is empty.
    """
    functions: dict[str, Callable[..., jax.Array]] = {
      'contrastive': self.contrastive,
      'rotation': self.rotation_loss,
      'inpainting': self.inpainting,
    }
    unknown = [name for name in names if name not in functions]
    if unknown:
      raise UserError(f"there is no task '{unknown[0]}'; expected some of {', '.join(NAMES)}")
    if 'contrastive' in names and not params['bank'].shape[0]:
      raise UserError('the bank of negatives is empty; fill it with embeddings of clean images')

    def term(name: str) -> LossTerm:
      return LossTerm(
        name, lambda x, seed_B: functions[name](params, x, seed_B), self.config.weights[name], self._shares[name]
      )

    return tuple(term(name) for name in names)

  def _embedded_views(self, params: Mapping[str, Any], x: jax.Array, seed_B: jax.Array) -> jax.Array:
    views = [view(x, fold(seed_B, v), self.config.view) for v in range(self.config.views)]
    return self.embed(params, jnp.concatenate(views)).reshape(self.config.views, x.shape[0], -1)


def _shares(config: TasksConfig, classifier: ResNetConfig) -> dict[str, float]:
  """What a task's pass costs against one of the classifier, by multiply-adds of convolutions."""
  whole = classifier.multiply_adds()
  if config.rotation == 'head':
    stages = config.rotation_stage + 1
    trunk = ResNetConfig(classifier.widths[:stages], classifier.blocks[:stages], classifier.patch, classifier.group)
    side = 32 // classifier.patch // 2**config.rotation_stage
    rotation = trunk.multiply_adds() + side**2 * 9 * classifier.widths[config.rotation_stage] * config.rotation_width
  else:
    w = config.rotation_width
    rotation = 1024 * (75 * w + 2 * w * w) + 256 * 27 * w * w + 64 * 11 * w * w
  width = config.inpainting_width
  inpainting = 64 * 9 * (64 * width + 2 * config.inpainting_blocks * width * width) + 64 * 48 * width
  return {
    'contrastive': float(config.views),
    'rotation': config.rotations * rotation / whole,
    'inpainting': inpainting / whole,
  }
