"""ONNX and SavedModel forms: their runtimes give the scores of the training path and of the bundle."""

import json
import shutil
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import toy_bundle

from pinfm_jax.cli import main
from pinfm_jax.config import TowerConfig
from pinfm_jax.errors import UserError
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.inspect import damaged_files, inspect
from pinfm_jax.serve.manifest import MANIFEST
from pinfm_jax.serve.portable.export import PortableManifest, export_portable
from pinfm_jax.serve.portable.inputs import StackedInputs
from pinfm_jax.serve.scorer import Scorer

LENGTHS = [0, 1, 7, 20, 21, 33]
PLAIN = toy_bundle.MODEL
INPUTS = replace(PLAIN, tower=replace(PLAIN.tower, time_gap_buckets=12), content=True, content_width=2, id_mask=0.3)
HSTU = replace(PLAIN, tower=replace(PLAIN.tower, backbone='hstu'))
DEEP = replace(PLAIN, tower=replace(PLAIN.tower, layers=4, max_positions=toy_bundle.LENGTH + 2))
TOKENS = {'learnable_token': True, 'candidate_content': True, 'similarity_width': 4}
MODELS = {
  'plain': ('pinfm', PLAIN, {}),
  'inputs': ('pinfm', INPUTS, {}),
  'hstu': ('pinfm', HSTU, {}),
  'tokens': ('pinfm', DEEP, TOKENS),
  'none': ('none', PLAIN, {}),
}


class Onnx:
  """A client: a session of ONNX Runtime for each program."""

  def __init__(self, path):
    self.portable = PortableManifest.read(path)
    ort = pytest.importorskip('onnxruntime')
    models = {name: str(path / 'models' / name / '1' / 'model.onnx') for name in self.portable.programs}
    self._sessions = {name: ort.InferenceSession(model) for name, model in models.items()}

  def __call__(self, name, inputs):
    session = self._sessions[name]
    outputs = [output.name for output in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, {i.name: inputs[i.name] for i in session.get_inputs()}), strict=True))


class SavedModel:
  """The same with TensorFlow."""

  def __init__(self, path):
    self.portable = PortableManifest.read(path)
    tf = pytest.importorskip('tensorflow')
    self._loaded, self._constant = tf.saved_model.load(str(path / 'models' / 'pinfm' / '1')), tf.constant

  def __call__(self, name, inputs):
    signature = self._loaded.signatures[name]
    names = signature.structured_input_signature[1]
    return {k: v.numpy() for k, v in signature(**{n: self._constant(inputs[n]) for n in names}).items()}


@pytest.fixture(scope='module')
def dataset():
  return toy_bundle.ToyDataset(LENGTHS)


@pytest.fixture
def documents(dataset):
  return list(dataset_requests(dataset, range(len(LENGTHS)), toy_bundle.LENGTH))


def make(kind):
  sequence, model, options = MODELS[kind]
  return toy_bundle.make_toy(sequence, model, **options)


def scores(client, path, documents, **sizes):
  inputs = StackedInputs.load(path)
  requests = [inputs.parse(document) for document in documents]
  given = inputs.candidates(requests, sizes.get('count'))
  if client.portable.bundle.tables:
    given |= client('context', inputs.context(requests, sizes.get('length')))
  return client('crossing', given)['probabilities']


@pytest.fixture(scope='module', params=MODELS)
def onnx(request, tmp_path_factory):
  pytest.importorskip('onnx')
  toy = make(request.param)
  path = tmp_path_factory.mktemp('onnx') / request.param
  return request.param, toy, export_portable(path, toy.trained(), 'onnx', storage='float32')


def test_onnx_scores_equal_the_training_path(onnx, dataset, documents):
  name, toy, path = onnx
  client, expected = Onnx(path), dataset.expected(toy)
  assert np.ptp(expected, axis=(0, 1)).min() > 0.1  # the comparison can fail
  np.testing.assert_allclose(scores(client, path, documents), expected, atol=1e-5)
  padded = scores(client, path, documents, length=20, count=9)[:, :5]
  np.testing.assert_allclose(padded, expected, atol=1e-5)
  inputs = StackedInputs.load(path)
  for length in (1, 21):
    with pytest.raises(ValueError, match=f'got length {length}, expected 20 .the longest window. to 20 events'):
      inputs.context([inputs.parse(document) for document in documents], length)
  for i in (0, 2):  # one user at a time, as many events and candidates as there are
    one = scores(client, path, [documents[i] | {'candidates': documents[i]['candidates'][:2]}])
    np.testing.assert_allclose(one[0], expected[i, :2], atol=1e-5)


def test_the_manifest_says_what_the_models_take(onnx):
  name, toy, path = onnx
  client = Onnx(path)
  programs = ['crossing'] if name == 'none' else ['context', 'crossing', 'items', 'pairs']
  assert sorted(client.portable.programs) == programs
  for program, about in client.portable.programs.items():
    for side, tensors in (('inputs', 'get_inputs'), ('outputs', 'get_outputs')):
      found = {t.name: t.shape for t in getattr(client._sessions[program], tensors)()}
      assert found == {n: t['shape'] for n, t in about[side].items()}
  assert damaged_files(path, inspect(path).files) == {}
  text = inspect(path).text(path)
  assert text.startswith(f'{path}: onnx\n')
  if name == 'plain':
    context = client.portable.programs['context']
    assert context['inputs']['rows'] == {'type': 'uint8', 'shape': ['U', 'L', 2, 32]}
    assert context['outputs']['key'] == {'type': 'float32', 'shape': [2, 'U', 'L', 2, 8]}
    assert 'surface int32[U, L]' in text


@pytest.mark.parametrize('storage', ['int4', pytest.param('int8', marks=pytest.mark.slow)])
def test_onnx_equals_the_bundle_with_packed_tables(storage, dataset, documents, tmp_path):
  """Rows are unpacked inside the model: no tolerance for the quantisation is needed."""
  pytest.importorskip('onnx')
  toy = make('plain')
  bundle = toy.export(tmp_path / 'bundle', storage)
  assert main(['export', str(bundle), '--format', 'onnx', '--out', str(tmp_path / 'onnx')]) == 0
  found = scores(Onnx(tmp_path / 'onnx'), tmp_path / 'onnx', documents)
  assert np.abs(found - dataset.expected(toy)).max() > 1e-5  # the tables are rounded
  for result, scores_CT in zip(Scorer.load(bundle).score(documents), found, strict=True):
    expected = np.array([[s['click'], s['hide']] for s in result['scores']])
    np.testing.assert_allclose(scores_CT, expected, atol=1e-5)


def test_items_and_pairs_equal_the_module(dataset, documents, tmp_path):
  pytest.importorskip('onnx')
  toy = make('inputs')
  path = export_portable(tmp_path / 'onnx', toy.trained(), 'onnx', storage='float32')
  client, inputs = Onnx(path), StackedInputs.load(path)
  requests = [inputs.parse(document) for document in documents]
  given = inputs.candidates(requests) | client('context', inputs.context(requests))
  examples = [(dataset.history(i), dataset.request(i), None) for i in range(len(LENGTHS))]
  examples = [(h, r, toy_bundle.content_of(r.item)) for h, r, _ in examples]
  batch = toy_bundle.ranking_batch(examples, toy.tokens)
  vectors_ULV, vectors_UCV = toy_bundle.vectors(toy.rows_GE, batch)
  apply = lambda method, *given: jax.jit(partial(toy.module.apply, method=method))({'params': toy.params}, *given)
  kept = apply('context', vectors_ULV, batch.events)
  np.testing.assert_allclose(
    client('pairs', given)['output'], apply('pairs', vectors_UCV, kept, batch.candidates), atol=1e-5
  )
  columns = {name: given[name].reshape(-1, *given[name].shape[2:]) for name in ('rows', 'content', 'new')}
  found = client('items', columns)
  content, hidden = batch.candidates.content_UCW, batch.candidates.hidden_id_UC
  target, vector = apply('item_vectors', vectors_UCV, content, hidden)
  np.testing.assert_allclose(found['target'], np.reshape(target, found['target'].shape), atol=1e-5)
  np.testing.assert_allclose(found['vector'], np.reshape(vector, found['vector'].shape), atol=1e-5)


def test_a_bfloat16_tower_computes_in_float32(dataset, documents, tmp_path):
  pytest.importorskip('onnx')
  toy = make('plain')
  model = replace(toy.model, tower=replace(toy.model.tower, dtype='bfloat16'))
  path = export_portable(tmp_path / 'onnx', toy.trained(model_config=model), 'onnx', storage='float32')
  np.testing.assert_allclose(scores(Onnx(path), path, documents), dataset.expected(toy), atol=1e-5)


def test_damage_and_other_versions_are_refused(onnx, tmp_path):
  name, _, path = onnx
  if name != 'none':
    pytest.skip('the smallest one is enough')
  copy = shutil.copytree(path, tmp_path / 'copy')
  text = (copy / MANIFEST).read_text()
  for before, after, message in (
    ('"click"', '"clack"', 'its checksum does not fit'),
    ('"format_version": 1', '"format_version": 9', 'format version 9, this program reads 1'),
    ('pinfm-onnx', 'pinfm-x', 'is a pinfm-x, expected one of onnx, savedmodel'),
    ('{', '', 'is damaged'),
  ):
    (copy / MANIFEST).write_text(text.replace(before, after, 1))
    with pytest.raises(UserError, match=message):
      PortableManifest.read(copy)
  (copy / MANIFEST).write_text(text)
  model = copy / 'models' / 'crossing' / '1' / 'model.onnx'
  octets = bytearray(model.read_bytes())
  octets[len(octets) // 2] ^= 1
  model.write_bytes(octets)
  with pytest.raises(UserError, match=r'model.onnx is damaged'):
    StackedInputs.load(copy)
  assert list(damaged_files(copy, inspect(copy).files)) == ['models/crossing/1/model.onnx']
  (copy / MANIFEST).unlink()
  with pytest.raises(UserError, match='has no manifest.json; make it with'):
    PortableManifest.read(copy)


@pytest.mark.parametrize(('form', 'module'), [('onnx', 'onnx'), ('savedmodel', 'tensorflow')])
def test_without_the_package_one_line_says_what_to_install(form, module, tmp_path, monkeypatch, capsys):
  import sys

  bundle = tmp_path / 'bundle'
  monkeypatch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: {})
  make('none').export(bundle)
  for name in [
    n for n in sys.modules if n.startswith(('pinfm_jax.serve.portable.onnx', 'pinfm_jax.serve.portable.savedmodel'))
  ]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, module, None)
  assert main(['export', str(bundle), '--format', form, '--out', str(tmp_path / 'out')]) == 2
  error = capsys.readouterr().err
  assert error == f"pinfm: error: --format {form} needs {module}: pip install 'pinfm_jax[{form}]'\n"
  assert not (tmp_path / 'out').exists()


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # TensorFlow's own
@pytest.mark.parametrize('kind', ['tokens', 'none'])
def test_savedmodel_scores_equal_the_training_path(kind, dataset, documents, tmp_path):
  pytest.importorskip('tensorflow')
  toy = make(kind)
  path = export_portable(tmp_path / 'saved', toy.trained(), 'savedmodel', storage='float32')
  client = SavedModel(path)
  np.testing.assert_allclose(scores(client, path, documents, length=20), dataset.expected(toy), atol=1e-5)
  np.testing.assert_allclose(scores(client, path, documents[1:2], count=3)[0], dataset.expected(toy)[1, :3], atol=1e-5)
  text = inspect(path).text(path)
  assert text.startswith(f'{path}: savedmodel\n')
  assert json.dumps(client.portable.programs)


def test_symbolic_sizes_do_not_enter_the_weights():
  """The 20 B configuration is described without a table or a parameter in memory."""
  from pinfm_jax.serve.manifest import TableLayout
  from pinfm_jax.serve.portable.programs import PortableModel

  model = replace(PLAIN, tower=TowerConfig(), tables=replace(PLAIN.tables, sub_tables=8, rows=80_000_000, width=32))
  layout = TableLayout('int4', 8, 80_000_000, 32, 20, 0)
  inputs = PortableModel(model, make('plain').ranker, toy_bundle.SPEC, layout).inputs(256)
  assert str(inputs['crossing']['key'].shape) == '(12, U, places, 8, 64)'
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(inputs))
