"""The server, driven by Triton's client and by a plain one; its scores are the scorer's own."""

import copy
import gc
import gzip
import json
import shutil
import socket
import threading
import time

import numpy as np
import pytest
import toy_bundle

pytest.importorskip('uvicorn')
pytest.importorskip('starlette')
pytest.importorskip('prometheus_client')

from serving import ask, infer, probabilities, results, running, whole

from pinfm_jax.errors import UserError
from pinfm_jax.serve.batches import Sizes
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.http.app import Limits
from pinfm_jax.serve.http.batching import BatchLimits
from pinfm_jax.serve.scorer import Scorer
from pinfm_jax.serve.server import ServerSettings, open_scorer

LENGTHS = [0, 1, 7, 20, 33]
SIZES = Sizes(cache_users=8, max_users=4, max_rows=16)  # few programs to compile
NAMES = ('click', 'hide', 'utility')
SMALL = Limits(BatchLimits(max_queue=8), timeout_s=120, max_body=200_000, max_candidates=6, max_events=30)


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
  return toy_bundle.make_toy().export(tmp_path_factory.mktemp('bundles') / 'toy', storage='float32')


@pytest.fixture(scope='module')
def documents():
  made = list(dataset_requests(toy_bundle.ToyDataset(LENGTHS), range(len(LENGTHS)), toy_bundle.LENGTH))
  for document in made:
    for i, candidate in enumerate(document['candidates']):
      candidate['campaign'] = str(i)  # the value; a data set knows just its index
  return made


@pytest.fixture(scope='module')
def scorer(bundle):
  return Scorer.load(bundle, sizes=SIZES)


@pytest.fixture(scope='module')
def expected(scorer, documents):
  return list(scorer.score(documents))


@pytest.fixture(scope='module')
def server(scorer):
  with running(lambda: scorer, SMALL) as (port, service):
    yield port, service


@pytest.fixture(scope='module')
def port(server):
  return server[0]


@pytest.fixture(scope='module')
def triton(port):
  client = pytest.importorskip('tritonclient.http').InferenceServerClient(f'127.0.0.1:{port}')
  yield client
  client.close()


def same(got, wanted):
  assert [r['request_id'] for r in got] == [r['request_id'] for r in wanted]
  for a, b in zip(got, wanted, strict=True):
    assert [s['item_id'] for s in a['scores']] == [s['item_id'] for s in b['scores']]
    np.testing.assert_allclose(probabilities(a), probabilities(b), atol=1e-5)


def given(name, array, datatype, binary):
  from tritonclient.http import InferInput

  tensor = InferInput(name, list(array.shape), datatype)
  tensor.set_data_from_numpy(array, binary_data=binary)
  return tensor


def typed(documents):
  """The documents as a tensor a field: (array, datatype) by name."""
  most = max(len(d['history']) for d in documents)
  made = {
    'request_id': (np.array([d['request_id'] for d in documents], object), 'BYTES'),
    'timestamp': (np.array([d['timestamp'] for d in documents]), 'INT64'),
    'history_length': (np.array([len(d['history']) for d in documents], np.int32), 'INT32'),
    'history_events': (np.array([d['history_events'] for d in documents]), 'INT64'),
  }
  bits = {name: 1 << i for i, name in enumerate(toy_bundle.ACTIONS)}
  events = lambda read, empty: [
    [read(e) for e in d['history']] + [empty] * (most - len(d['history'])) for d in documents
  ]
  candidates = lambda name, empty: [[c.get(name, empty) for c in d['candidates']] for d in documents]
  made |= {
    'history_item_id': (np.array(events(lambda e: e['item_id'], ''), object), 'BYTES'),
    'history_timestamp': (np.array(events(lambda e: e['timestamp'], 0)), 'INT64'),
    'history_surface': (np.array(events(lambda e: toy_bundle.SURFACES.index(e['surface']), 0)), 'INT64'),
    'history_actions': (np.array(events(lambda e: sum(bits[a] for a in e['actions']), 0), np.uint32), 'UINT32'),
  }
  for name in ('price', 'rating'):
    made[f'candidate_{name}'] = (np.array(candidates(name, np.nan), np.float32), 'FP32')
  for name in ('item_id', 'surface', 'country', 'campaign'):
    made[f'candidate_{name}'] = (np.array(candidates(name, ''), object), 'BYTES')
  for name in ('picture', 'content'):
    made[f'candidate_{name}'] = (np.array(candidates(name, None), np.float32), 'FP32')
  made['candidate_timestamp'] = (np.array(candidates('timestamp', 0)), 'INT64')
  made['candidate_item_created_at'] = (np.array(candidates('item_created_at', -1)), 'INT64')
  return made


def test_triton_sees_a_healthy_server_and_the_models_tensors(triton):
  assert triton.is_server_live()
  assert triton.is_server_ready()
  assert triton.is_model_ready('toy')
  assert triton.is_model_ready('toy', '1')
  assert not triton.is_model_ready('other')
  assert triton.get_server_metadata()['extensions'] == ['binary_tensor_data', 'model_repository']
  metadata = triton.get_model_metadata('toy')
  assert metadata == triton.get_model_metadata('toy', '1')
  assert (metadata['name'], metadata['versions']) == ('toy', ['1'])
  inputs = {tensor['name']: (tensor['datatype'], tensor['shape']) for tensor in metadata['inputs']}
  assert inputs['request'] == ('BYTES', [-1])
  assert inputs['candidate_picture'] == ('FP32', [-1, -1, 3])
  assert inputs['history_actions'] == ('UINT32', [-1, -1])
  outputs = [(tensor['name'], tensor['datatype'], tensor['shape']) for tensor in metadata['outputs']]
  assert outputs == [('response', 'BYTES', [-1]), *((name, 'FP32', [-1, -1]) for name in NAMES)]


@pytest.mark.parametrize('binary', [False, True])
@pytest.mark.parametrize('compression', [None, 'gzip', 'deflate'])
def test_triton_scores_whole_requests(triton, documents, expected, binary, compression):
  from tritonclient.http import InferRequestedOutput

  request = [given('request', np.array([json.dumps(d) for d in documents], object), 'BYTES', binary)]
  answer = triton.infer('toy', request, request_id='r', request_compression_algorithm=compression)
  same([json.loads(text) for text in answer.as_numpy('response')], expected)
  assert answer.get_response()['id'] == 'r'
  assert answer.get_response()['model_version'] == '1'
  wanted = [InferRequestedOutput(name, binary_data=binary) for name in ('utility', 'click')]
  answer = triton.infer('toy', request, outputs=wanted, request_compression_algorithm=compression)
  assert [output['name'] for output in answer.get_response()['outputs']] == ['utility', 'click']
  for name in ('utility', 'click'):
    assert answer.as_numpy(name).dtype == np.float32
    np.testing.assert_allclose(answer.as_numpy(name), [probabilities(r, [name])[:, 0] for r in expected], atol=1e-5)


@pytest.mark.parametrize('binary', [False, True])
def test_triton_scores_a_tensor_a_field(triton, documents, expected, binary):
  from tritonclient.http import InferRequestedOutput

  inputs = [given(name, array, datatype, binary) for name, (array, datatype) in typed(documents).items()
            if binary or not np.issubdtype(array.dtype, np.floating) or np.isfinite(array).all()]  # fmt: skip
  if not binary:  # JSON has no NaN: the tensors that need it stay binary
    inputs += [given(name, array, datatype, True) for name, (array, datatype) in typed(documents).items()
               if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all()]  # fmt: skip
  answer = triton.infer('toy', inputs)
  assert [output['name'] for output in answer.get_response()['outputs']] == list(NAMES)
  scores = np.stack([answer.as_numpy(name) for name in NAMES], axis=-1)
  np.testing.assert_allclose(scores, [probabilities(r) for r in expected], atol=1e-5)
  assert np.ptp(scores) > 0.1
  answer = triton.infer('toy', inputs, outputs=[InferRequestedOutput('response')])
  same([json.loads(text) for text in answer.as_numpy('response')], expected)


def test_padded_candidates_score_nan(triton, documents, expected):
  counts = np.array([5, 0, 3, 1, 5])
  columns = typed(documents) | {'num_candidates': (counts, 'INT64')}
  answer = triton.infer('toy', [given(name, *column, True) for name, column in columns.items()])
  scores = answer.as_numpy('click')
  assert scores.shape == (5, 5)
  for row, count, result in zip(scores, counts, expected, strict=True):
    np.testing.assert_allclose(row[:count], probabilities(result, ['click'])[:count, 0], atol=1e-5)
    assert np.isnan(row[count:]).all()


def test_errors_reach_triton(triton, documents):
  from tritonclient.utils import InferenceServerException

  good = given('request', np.array([json.dumps(documents[0])], object), 'BYTES', True)
  with pytest.raises(InferenceServerException, match="there is no model 'other'") as error:
    triton.infer('other', [good])
  assert error.value.status() == '404'
  with pytest.raises(InferenceServerException, match="no version '9' of 'toy'; version '1'"):
    triton.infer('toy', [good], model_version='9')
  bad = given('request', np.array([json.dumps(documents[0]), '{"request_id": 1}'], object), 'BYTES', True)
  with pytest.raises(InferenceServerException, match='request 1: got history None, expected a list') as error:
    triton.infer('toy', [bad])
  assert error.value.status() == '400'


def test_plain_json(port, documents, expected):
  status, headers, answer = infer(port, whole(documents[:2], id='a'))
  assert status == 200
  assert headers['content-type'] == 'application/json'
  assert (answer['model_name'], answer['id']) == ('toy', 'a')
  same(results(answer), expected[:2])
  path = '/v2/models/toy/versions/1/infer'
  assert infer(port, whole(documents[:1]), path=path)[0] == 200
  assert results(infer(port, whole([]))[2]) == []
  nothing = infer(port, whole([], outputs=[{'name': 'click'}]))[2]['outputs'][0]
  assert (nothing['shape'], nothing['data']) == ([0, 0], [])


def test_slow_clients_hold_no_seats(port, documents, expected):
  """More clients than seats have begun to send; who sends all is answered."""
  head = b'POST /v2/models/toy/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{'
  slow = [socket.create_connection(('127.0.0.1', port)) for _ in range(2 * SMALL.batch.max_queue)]
  try:
    for connection in slow:
      connection.sendall(head)
    time.sleep(0.5)  # their heads are read
    same(results(infer(port, whole(documents[:1]))[2]), expected[:1])
  finally:
    for connection in slow:
      connection.close()


def test_what_is_malformed_or_too_large_is_refused(port, documents):
  document = documents[2]
  nothing_of_many = [
    {'name': name, 'datatype': 'BYTES', 'shape': [2**31 - 1, 0], 'data': []}
    for name in ('history_item_id', 'candidate_item_id')
  ]
  for body, status, message in (
    (b'{', 400, 'not valid JSON'),
    (json.dumps({'inputs': []}), 400, "expected the input 'request'"),
    (json.dumps(whole(['[1]'])), 400, r'request 0: got [1], expected a request'),
    (json.dumps(whole([document], outputs=[{'name': 'score'}])), 400, "got the output 'score'"),
    (json.dumps(whole([document, document | {'candidates': []}], outputs=[{'name': 'click'}])), 400, 'equally many'),
    (json.dumps(whole([document | {'candidates': document['candidates'] * 2}])), 413, 'got 10 candidates, at most 6'),
    (
      json.dumps(whole([document | {'history': document['history'] * 9}])),
      413,
      'got 63 events in',
    ),
    (json.dumps(whole([{'request_id': 1, 'history': [], 'candidates': []}] * 9)), 413, 'got 9 requests at once'),
    (b' ' * 200_001, 413, 'more than 200000 bytes'),
    (json.dumps({'inputs': nothing_of_many}), 413, f'got {2**31 - 1} requests at once'),
  ):
    got, _, content = ask(port, 'POST', '/v2/models/toy/infer', body)
    assert (got, message in json.loads(content)['error']) == (status, True), content
  for packed, headers, status in (
    (gzip.compress(b' ' * 200_001), {'Content-Encoding': 'gzip'}, 413),
    (b'junk', {'Content-Encoding': 'gzip'}, 400),
    (b'junk', {'Content-Encoding': 'br'}, 415),
    (b'{}', {'Inference-Header-Content-Length': '9'}, 400),
    (b'{}', {'Inference-Header-Content-Length': '9' * 5000}, 400),
  ):
    assert ask(port, 'POST', '/v2/models/toy/infer', packed, headers)[0] == status
  chunks = (b' ' * 50_000 for _ in range(5))  # without Content-Length
  assert ask(port, 'POST', '/v2/models/toy/infer', chunks)[0] == 413
  for method, path, status in (('GET', '/v2/nothing', 404), ('GET', '/v2/models/toy/infer', 405), ('POST', '/v2', 405)):
    got, _, content = ask(port, method, path)
    assert got == status
    assert set(json.loads(content)) == {'error'}
  assert infer(port, whole([document]))[0] == 200  # and the server goes on


def test_one_bad_request_of_a_batch_harms_no_other(port, documents, expected):
  bad = copy.deepcopy(documents[2])
  bad['candidates'][1]['price'] = 'dear'
  answers = {}

  def send(i):
    answers[i] = infer(port, whole([bad if i % 3 == 1 else documents[2]]))

  for batch in range(3):
    threads = [threading.Thread(target=send, args=(batch * 6 + i,)) for i in range(6)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  for i, (status, _, answer) in answers.items():
    if i % 3 == 1:
      assert status == 400
      assert answer['error'].startswith("request 0: candidate 1: got price 'dear'")
    else:
      assert status == 200
      same(results(answer), expected[2:3])
  assert len(answers) == 18


class Slow:
  """A scorer that takes its time, and fails when told to."""

  def __init__(self, scorer, seconds):
    self._scorer, self.seconds, self.bundle, self.parse = scorer, seconds, scorer.bundle, scorer.parse
    self.broken = None

  def probabilities(self, requests):
    time.sleep(self.seconds)
    if self.broken:
      raise self.broken
    return [np.zeros((len(r.item_ids), 2), np.float32) for r in requests]

  def warm_up(self):
    return 3


def test_overload_is_refused_with_a_time_and_deadlines_are_kept(scorer, documents):
  slow = Slow(scorer, 0.2)
  limits = Limits(BatchLimits(max_batch=1, max_queue=3), timeout_s=60)
  with running(lambda: slow, limits) as (port, service):
    answers = []
    send = lambda **rest: answers.append(infer(port, whole(documents[:1], **rest)))
    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    codes = sorted(status for status, *_ in answers)
    assert codes == [200] * 3 + [429] * 5
    refused = next(answer for answer in answers if answer[0] == 429)
    assert int(refused[1]['retry-after']) >= 1
    assert 'the queue is full' in refused[2]['error']
    answers.clear()
    first = threading.Thread(target=send)
    first.start()
    time.sleep(0.05)
    begin = time.monotonic()
    send(parameters={'timeout': 50_000})
    assert time.monotonic() - begin < 0.15
    first.join()
    assert [status for status, *_ in answers] == [504, 200]
    text = ask(port, 'GET', '/metrics')[2].decode()
    for line in (
      'pinfm_http_requests_total{code="200",route="infer"} 4.0',
      'pinfm_http_requests_total{code="429",route="infer"} 5.0',
      'pinfm_http_requests_total{code="504",route="infer"} 1.0',
      'pinfm_ranking_requests_total 4.0',
      'pinfm_candidates_total 20.0',
      'pinfm_batch_requests_bucket{le="1.0"} 4.0',
      'pinfm_seconds_count{part="total"} 4.0',
      'pinfm_queue_requests 0.0',
      'pinfm_programs_warmed 3.0',
      'pinfm_model_version 1.0',
    ):
      assert line in text
    assert 'pinfm_user_cache' not in text  # the scorer has none
    slow.broken = UserError('row servers are gone')
    status, headers, answer = infer(port, whole(documents[:1]))
    assert (status, headers['retry-after']) == (503, '1')
    assert answer['error'] == 'scoring failed: row servers are gone'
    slow.broken = ValueError('secret')
    status, _, answer = infer(port, whole(documents[:1]))
    assert status == 500
    assert 'secret' not in answer['error']
    slow.broken = None
    assert infer(port, whole(documents[:1]))[0] == 200


def test_bodies_that_are_held_are_bounded(scorer, documents):
  limits = Limits(max_buffered=1000, max_body=100_000)
  with running(lambda: Slow(scorer, 0), limits) as (port, service):
    status, headers, _ = infer(port, whole(documents[:1]))
    assert (status, 'retry-after' in headers) == (429, True)
    assert results(infer(port, whole(['{"request_id": 1, "history": [], "candidates": []}']))[2]) == [
      {'request_id': 1, 'scores': []}
    ]
    assert service._buffered == 0
    assert service.batcher.pending == 0


def test_a_draining_server_is_not_ready_and_takes_in_nothing(scorer, documents):
  with running(lambda: Slow(scorer, 0)) as (port, service):
    service.draining = True
    assert ask(port, 'GET', '/v2/health/live')[0] == 200
    assert ask(port, 'GET', '/v2/health/ready')[0] == 503
    assert ask(port, 'GET', '/v2/models/toy/ready')[0] == 503
    status, headers, _ = infer(port, whole(documents[:1]))
    assert (status, headers['retry-after']) == (503, '1')


def test_the_cache_is_shown(scorer):
  class Cache:
    hits, extended, misses, evicted = 5, 6, 7, 8

  slow = Slow(scorer, 0)
  slow.cache = Cache()
  with running(lambda: slow) as (port, service):
    text = ask(port, 'GET', '/metrics')[2].decode()
  for name, count in (('hits', 5), ('extended', 6), ('misses', 7), ('evicted', 8)):
    assert f'pinfm_user_cache_total{{event="{name}"}} {count}.0' in text


def test_reload_under_traffic_loses_nothing_and_mixes_nothing(bundle, documents, expected, tmp_path):
  """Every answer is the old bundle's or the new one's, as its version says."""
  place = tmp_path / 'served'
  shutil.copytree(bundle, place)
  toy = toy_bundle.make_toy()
  other = toy.export(tmp_path / 'other', storage='float32', rows_GE=toy.rows_GE[::-1].copy())
  wanted = {'1': expected, '2': list(Scorer.load(other, sizes=SIZES).score(documents))}
  assert np.abs(probabilities(wanted['2'][2]) - probabilities(expected[2])).max() > 1e-3
  with running(lambda: Scorer.load(place, sizes=SIZES)) as (port, service):
    infer(port, whole(documents))  # compiled
    stop, answers = threading.Event(), []

    def traffic():
      while not stop.is_set():
        answers.append(infer(port, whole(documents)))

    threads = [threading.Thread(target=traffic) for _ in range(3)]
    for thread in threads:
      thread.start()
    shutil.rmtree(place)
    shutil.copytree(other, place)
    status, _, content = ask(port, 'POST', '/v2/repository/models/toy/load', '{}')
    assert (status, content) == (200, b'')
    infer(port, whole(documents))
    time.sleep(0.1)
    (place / 'parameters.npz').write_bytes(b'damaged')
    status, _, content = ask(port, 'POST', '/v2/repository/models/toy/load')
    assert status == 400
    assert 'parameters.npz' in json.loads(content)['error']
    time.sleep(0.1)
    stop.set()
    for thread in threads:
      thread.join()
    assert {answer['model_version'] for _, _, answer in answers} == {'1', '2'}
    for status, _, answer in answers:
      assert status == 200
      same(results(answer), wanted[answer['model_version']])
    assert json.loads(ask(port, 'POST', '/v2/repository/index')[2]) == [
      {'name': 'toy', 'version': '2', 'state': 'READY'}
    ]
    assert ask(port, 'GET', '/v2/models/toy/versions/1')[0] == 404
    assert ask(port, 'POST', '/v2/repository/models/other/load')[0] == 404
    text = ask(port, 'GET', '/metrics')[2].decode()
    assert 'pinfm_reloads_total{result="loaded"} 2.0' in text
    assert 'pinfm_reloads_total{result="refused"} 1.0' in text


def test_triton_reloads(triton, server):
  before = int(server[1].models.current.version)
  triton.load_model('toy')
  assert triton.get_model_repository_index()[0]['version'] == str(before + 1)


def test_two_reloads_at_once(scorer):
  opened = []

  def load():
    if opened:
      time.sleep(0.3)
    opened.append(1)
    return Slow(scorer, 0)

  with running(load) as (port, service):
    codes = []
    reload = lambda: codes.append(ask(port, 'POST', '/v2/repository/models/toy/load')[0])
    threads = [threading.Thread(target=reload) for _ in range(2)]
    for thread in threads:
      thread.start()
      time.sleep(0.05)
    for thread in threads:
      thread.join()
    assert sorted(codes) == [200, 409]
    assert service.models.current.version == '2'


def test_rows_of_row_servers(bundle, documents, expected, tmp_path):
  """The bundle has no tables here; its connections go with the scorer; without a server it does not open."""
  from row_servers import Running

  place = tmp_path / 'toy'
  shutil.copytree(bundle, place)
  (place / 'tables.bin').unlink()
  servers = Running(bundle)
  settings = ServerSettings(rows=servers.url, max_batch=1, cache_users=2)
  remote = open_scorer(place, settings)
  parsed = [remote.parse(document) for document in documents]
  same(remote.results(parsed), expected)
  rows = remote.bundle.rows
  assert not rows._closed.is_set()
  del remote
  gc.collect()
  assert rows._closed.is_set()
  servers.stop()
  with pytest.raises(UserError):
    open_scorer(place, settings)
