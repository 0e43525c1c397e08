"""Curves over the strength of repair and attack, and a picture of images before, attacked and repaired."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pinfm_jax import plots
from pinfm_jax.robustness.adaptive import bpda, repair_defence
from pinfm_jax.robustness.attacks import classifier_objective, pgd
from pinfm_jax.robustness.defended import ALL
from pinfm_jax.robustness.draws import example_seeds
from pinfm_jax.robustness.evaluation import Evaluation
from pinfm_jax.workdir import read_json, write_json, write_text

REPAIR_255 = (0, 2, 4, 8, 16, 32)  # radii of the repair, in 1/255
ATTACK_255 = (0, 2, 4, 8, 12, 16)  # radii of the attack
_IMAGES, _SCALE = 10, 3  # of the picture


def repair_strength(evaluation: Evaluation, images: int) -> dict[str, list[float]]:
  """Accuracy of the repair by all tasks over its radius: on clean images, and under transferred PGD.

  The step shrinks and grows with the radius.
  """
  c, terms = evaluation.config, evaluation.defended.terms(ALL)
  x, label = jnp.asarray(evaluation.x[:images]), jnp.asarray(evaluation.label[:images])
  index = jnp.arange(len(label))
  objective = classifier_objective(evaluation.defended.logits, label)
  attacked = jax.jit(lambda: pgd(objective, x, c.ball, index, c.steps).x)()
  found: dict[str, list[float]] = {'clean': [], 'PGD (transfer)': []}
  for radius in REPAIR_255:
    factor = radius / 255 / c.repair.ball.radius
    repair = replace(c.repair, ball=replace(c.repair.ball, radius=radius / 255), step_size=c.repair.step_size * factor)
    defend = jax.jit(lambda x, r=repair: repair_defence(terms, r)(x, example_seeds(index, 0)))
    for name, inputs in (('clean', x), ('PGD (transfer)', attacked)):
      found[name].append(_accuracy(evaluation, defend(inputs), label))
  return found


def attack_strength(evaluation: Evaluation, images: int) -> dict[str, list[float]]:
  """Accuracy over the attack's radius: undefended, repaired under the same images (transfer), and under BPDA."""
  c = evaluation.config
  x, label = jnp.asarray(evaluation.x[:images]), jnp.asarray(evaluation.label[:images])
  index = jnp.arange(len(label))
  defence = repair_defence(evaluation.defended.terms(ALL), c.repair)
  defend = jax.jit(lambda x: defence(x, example_seeds(index, 0)))
  found: dict[str, list[float]] = {'none': [], 'all (transfer)': [], 'all (BPDA)': []}
  for radius in ATTACK_255:
    attack = partial(pgd, x=x, ball=replace(c.ball, radius=radius / 255), index_B=index)
    plain = jax.jit(lambda a=attack: a(classifier_objective(evaluation.defended.logits, label), steps=c.steps).x)()
    aware = jax.jit(lambda a=attack: a(bpda(evaluation.defended.logits, defence, label), steps=c.adaptive_steps).x)()
    found['none'].append(_accuracy(evaluation, plain, label))
    found['all (transfer)'].append(_accuracy(evaluation, defend(plain), label))
    found['all (BPDA)'].append(_accuracy(evaluation, defend(aware), label))
  return found


def draw(evaluation: Evaluation, directory: Path, images: int = 128) -> None:
  """Writes repair_strength.svg, attack_strength.svg (their numbers beside them, kept) and images.png."""
  save_picture(evaluation, directory / 'images.png')
  for name, measure, radii in (
    ('repair_strength', repair_strength, REPAIR_255),
    ('attack_strength', attack_strength, ATTACK_255),
  ):
    path = directory / f'{name}.json'
    if not path.exists():
      write_json(path, measure(evaluation, images))
    series = {key: (radii, values) for key, values in read_json(path).items()}
    title, xlabel = name.replace('_', ' ').capitalize(), f'{name.split("_")[0]} radius (1/255)'
    write_text(directory / f'{name}.svg', plots.curves(title, series, 'accuracy', from_zero=True, xlabel=xlabel))


def save_picture(evaluation: Evaluation, path: Path) -> None:
  """Rows: clean, attacked (transferred), repaired; then both changes, around grey and eight times as strong."""
  index = jnp.arange(_IMAGES)
  clean, attacked = evaluation.x[:_IMAGES], evaluation.attacked(evaluation.config.transfer[0])[:_IMAGES]
  defence = evaluation.defended.defence(ALL)
  repaired = np.asarray(jax.jit(lambda x: defence(x, example_seeds(index, 0)))(jnp.asarray(attacked)))
  rows = (clean, attacked, repaired, 0.5 + 8 * (attacked - clean), 0.5 + 8 * (repaired - attacked))
  grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
  pixels = np.clip(np.round(255 * grid), 0, 255).astype(np.uint8)
  Image.fromarray(pixels.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)).save(path)


def _accuracy(evaluation: Evaluation, x: jax.Array, label: jax.Array) -> float:
  return float(jnp.mean(jnp.argmax(evaluation.defended.logits(x), axis=-1) == label))
