"""The load benchmark: every answer is checked, and its figures follow from the answers."""

import json
import math

import numpy as np
import pytest

pytest.importorskip('uvicorn')
pytest.importorskip('starlette')
pytest.importorskip('prometheus_client')

from pinfm_jax.bench.http_load import Answer
from pinfm_jax.bench.random_bundle import random_documents
from pinfm_jax.bench.serving_load import QUICK_LOAD, _body, _run, measure_load
from pinfm_jax.serve.http.protocol import decode_request


def answer(status, seconds=0.01, scores=(0.5, 0.25), at_s=0.0):
  head = b'{}'
  text = json.dumps(
    {'request_id': 1, 'scores': [{'item_id': 7, 'a': scores[0], 'b': scores[1], 'utility': 3}]}
  ).encode()
  return Answer(0, at_s, 0.002, seconds, status, {'inference-header-content-length': '2'}, head + bytes(4) + text)


def test_answers_are_counted_by_what_became_of_them():
  answers = [
    answer(200, 0.01),
    answer(200, 0.03),
    answer(200, scores=(0.5, 0.3)),
    answer(429, 0.001),
    answer(503, 0.001),
  ]
  answers += [answer(504), answer(0), answer(500), answer(200, 0.01, at_s=1.995)]
  run = _run(answers, 2.0, [np.array([[0.5, 0.25]])])
  assert run.counts == {'scored': 3, 'refused': 3, 'wrong': 1, 'lost': 2}
  assert run.answered == 1.0  # two right answers came within 2 s
  assert run.p50_ms == pytest.approx(10)
  assert run.late_p99_ms == pytest.approx(2)
  assert run.refusal_p99_ms == pytest.approx(10, rel=0.05)
  assert math.isnan(_run([answer(0)], 1, [np.zeros((1, 2))]).p50_ms)


def test_bodies_are_what_the_server_takes():
  [document] = random_documents(1, 3, 2)
  body, header = _body(document)
  request = decode_request(body, header.split(': ')[1])
  assert json.loads(request.inputs['request'].array[0]) == document
  assert request.outputs == {'response': True}
  assert document == random_documents(1, 3, 2)[0] != random_documents(1, 3, 2, seed=1)[0]


@pytest.mark.slow
def test_a_server_is_loaded_and_nothing_is_lost(tmp_path):
  figures = {figure.name: figure for figure in measure_load(tmp_path, QUICK_LOAD)}
  for share in (50, 200):
    for kind in ('lost', 'wrong'):
      assert figures[f'load/{share}/{kind}'].value == 0
      assert figures[f'load/{share}/{kind}'].met
  assert figures['load/50/scored'].value > 0
  assert figures['load/50/p50'].value <= figures['load/50/p99'].value
  assert {path.name for path in tmp_path.iterdir()} == {
    'load_bundle', 'serving_load.png', 'serving_load_answered.png',
  }  # fmt: skip
