"""A server in this process for the tests, on a thread of its own."""

import http.client
import json
import threading
import time
from contextlib import contextmanager

import numpy as np

from pinfm_jax.serve.http.app import Limits, Service
from pinfm_jax.serve.http.metrics import Metrics
from pinfm_jax.serve.http.models import Models
from pinfm_jax.serve.http.run import Server, bind

LIMITS = Limits(timeout_s=120)  # compiling on a busy machine takes its time


@contextmanager
def running(load, limits=LIMITS, name='toy'):
  """Serves what `load` opens; yields the port, and the service."""
  metrics = Metrics()
  service = Service(name, Models(load, metrics), limits, metrics)
  server = Server(service)
  bound = bind('127.0.0.1', 0)
  thread = threading.Thread(target=server.run, kwargs={'sockets': [bound]})
  thread.start()
  while not server.started:
    time.sleep(0.005)
    assert thread.is_alive()
  try:
    yield bound.getsockname()[1], service
  finally:
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def ask(port, method, path, body=None, headers=None):
  """One plain HTTP exchange; returns status, headers and content."""
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=120)
  try:
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    return response.status, dict(response.getheaders()), response.read()
  finally:
    connection.close()


def infer(port, document, headers=None, path='/v2/models/toy/infer'):
  """Posts an inference request in JSON; returns status, headers and the decoded answer."""
  status, headers, content = ask(port, 'POST', path, json.dumps(document), headers)
  return status, headers, json.loads(content)


def whole(documents, **rest):
  """The inference request of whole ranking requests."""
  data = [document if isinstance(document, str) else json.dumps(document) for document in documents]
  return {'inputs': [{'name': 'request', 'shape': [len(data)], 'datatype': 'BYTES', 'data': data}], **rest}


def results(answer):
  """The ranking results in an answer of `response`."""
  return [json.loads(text) for text in answer['outputs'][0]['data']]


def probabilities(result, names=('click', 'hide', 'utility')):
  return np.array([[score[name] for name in names] for score in result['scores']])
