"""`pinfm bench repair`: figures follow from the times, and the passes beside the repair are its own."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.bench import repair as bench
from pinfm_jax.cli import main
from pinfm_jax.errors import UserError
from pinfm_jax.robustness.draws import example_seeds
from pinfm_jax.robustness.repair import RepairConfig, repair
from pinfm_jax.workdir import read_json


def test_figures_follow_from_the_times(tmp_path, monkeypatch):
  times = {'repair': (2.4, 1.0), 'passes': (2.0, 1.0)}
  monkeypatch.setattr(bench, 'interleave', lambda runs, rounds, warmup: {name: times[name] for name in runs})
  figures = {f.name: f for f in bench.bench_repair(tmp_path, replace(bench.QUICK, quick=False)).figures}
  assert figures['repair'].value == pytest.approx(3.4)
  assert figures['over passes'].value == pytest.approx(1.1)
  assert (figures['over passes'].least, figures['over passes'].greatest) == (1.0, pytest.approx(1.2))
  assert figures['over passes'].met
  times['repair'] = (2.6, 1.3)
  assert bench.bench_repair(tmp_path, replace(bench.QUICK, quick=False)).figures[0].met is False


def test_passes_are_those_of_the_steps():
  """As many values and gradients as the repair makes, each of one term, at the round's own images."""
  terms, config = bench._terms(bench.QUICK), RepairConfig(steps=3)
  made = bench._passes(terms, config, bench.QUICK)(1)
  assert len(made) == 3 * len(terms)
  x, index_B = bench._images(bench.QUICK, 1)
  np.testing.assert_array_equal(index_B, np.arange(8, 16))
  value, gradient = made[2 * len(terms) + 1]  # of the last step, the second term
  expected = jax.grad(lambda x: jnp.sum(terms[1].loss(x, example_seeds(index_B, 2))))(x)
  np.testing.assert_allclose(value, jnp.sum(terms[1].loss(x, example_seeds(index_B, 2))), rtol=1e-4)
  np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_repair_is_the_repair_of_the_images_and_nothing_is_compiled_again():
  terms, config = bench._terms(bench.QUICK), RepairConfig(steps=2)
  runs = [make(terms, config, bench.QUICK) for make in (bench._repair, bench._passes)]
  x, index_B = bench._images(bench.QUICK, 0)
  np.testing.assert_allclose(runs[0](0), repair(terms, x, config, index_B).x, atol=1e-5)
  runs[1](0)
  with jax.no_tracing():
    for run in runs:
      run(1)


def test_command_writes_its_results(tmp_path):
  assert main(['bench', 'repair', '--quick', '--out', str(tmp_path)]) == 0
  found = read_json(tmp_path / 'results.json')['figures']
  assert found['over passes']['value'] > 0
  assert (tmp_path / 'repair.png').exists()


def test_batches_must_fill_the_images(tmp_path):
  with pytest.raises(UserError, match='whole batches'):
    bench.bench_repair(tmp_path, replace(bench.QUICK, images=15))
