"""The bundle on Ray Serve, in a process of its own: two replicas on this machine answer as the scorer does."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import toy_bundle

pytest.importorskip('ray.serve')

from serving import probabilities

from pinfm_jax.errors import UserError
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.ray_app import RaySettings
from pinfm_jax.serve.scorer import Scorer

_DRIVER = """
import json, socket, sys, threading, urllib.error, urllib.request
import ray
from ray import serve
from pinfm_jax.serve.ray_app import application

bundle, documents = sys.argv[1], json.loads(sys.argv[2])
with socket.create_server(('127.0.0.1', 0)) as free:
  port = free.getsockname()[1]
ray.init(num_cpus=2, include_dashboard=False, logging_level='ERROR')
serve.start(http_options={'host': '127.0.0.1', 'port': port})
serve.run(application({'bundle': bundle, 'replicas': '2', 'cpus': '0.5', 'max_batch': '4', 'cache_users': '8'}))
replicas = serve.status().applications['default'].deployments['pinfm'].replica_states
answers = [None] * len(documents)

def ask(i):
  body = documents[i] if isinstance(documents[i], str) else json.dumps(documents[i])
  try:
    with urllib.request.urlopen(f'http://127.0.0.1:{port}/', body.encode(), timeout=120) as response:
      answers[i] = response.status, json.loads(response.read())
  except urllib.error.HTTPError as error:
    answers[i] = error.code, json.loads(error.read())

threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(documents))]
for thread in threads: thread.start()
for thread in threads: thread.join()
serve.shutdown()
ray.shutdown()
print('\\n' + json.dumps([{str(k): v for k, v in replicas.items()}, answers]))
"""


@pytest.mark.slow
def test_replicas_answer_as_the_scorer_does(tmp_path):
  bundle = toy_bundle.make_toy().export(tmp_path / 'toy', storage='float32')
  lengths = [0, 7, 33]
  documents = list(dataset_requests(toy_bundle.ToyDataset(lengths), range(len(lengths)), toy_bundle.LENGTH)) * 4
  expected = list(Scorer.load(bundle).score(documents))
  bad = [documents[1] | {'surface': 'serach'}, '{']
  command = [sys.executable, '-c', _DRIVER, str(bundle), json.dumps([*documents, *bad])]
  # Ray gives a proxy 5 s to start and then kills it: too short where other work holds the cores.
  patience = {'RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S': '300', 'RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S': '300'}
  environment = dict(os.environ) | patience
  done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  replicas, answers = json.loads(done.stdout.splitlines()[-1])
  assert sum(replicas.values()) == 2
  for (status, result), wanted in zip(answers, expected, strict=False):
    assert status == 200, result
    assert result['request_id'] == wanted['request_id']
    np.testing.assert_allclose(probabilities(result), probabilities(wanted), atol=1e-5)
  [(first, surface), (second, text)] = answers[len(documents) :]
  assert (first, second) == (400, 400)
  assert "got the surface 'serach', expected one of feed, search" in surface['error']
  assert 'not valid JSON' in text['error']


def test_arguments():
  assert RaySettings.parse({'bundle': 'b', 'replicas': '3', 'gpus': 0.5}) == RaySettings('b', replicas=3, gpus=0.5)
  for arguments, message in (
    ({}, 'expected bundle=DIR'),
    ({'bundle': 'b', 'replica': 2}, r"got the arguments \['bundle', 'replica'\]"),
    ({'bundle': 'b', 'replicas': 'two'}, "got replicas='two', expected int"),
    ({'bundle': 'b', 'max_batch': 0}, 'got max_batch=0, expected at least 1'),
  ):
    with pytest.raises(UserError, match=message):
      RaySettings.parse(arguments)
