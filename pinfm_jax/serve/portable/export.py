"""Directories for runtimes that are not JAX: an ONNX model for each program, or one TensorFlow SavedModel.

manifest.json                 `PortableManifest`: form, programs with their inputs and outputs, the bundle's manifest
models/NAME/1/model.onnx      a program (`serve.portable.programs`), parameters inside; as in Triton's model repository
models/pinfm/1/               or the SavedModel with a signature for each program; the layout of TensorFlow Serving
tables.bin, checksums.bin, items/   as in a bundle (`serve.bundle`): a client looks rows up (`serve.portable.inputs`)
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.files import complete_directory
from pinfm_jax.serve import checksums
from pinfm_jax.serve.arrays import plain_arrays
from pinfm_jax.serve.bundle import (
  STATS,
  Content,
  TrainedRanker,
  manifest_of,
  table_layout,
  write_items_of,
  write_tables,
)
from pinfm_jax.serve.manifest import MANIFEST, Manifest, document_checksum, parse_manifest

FORMS = ('onnx', 'savedmodel')
VERSION = 1
_NEEDS = {'onnx': ('onnx', 'onnx'), 'savedmodel': ('tensorflow', 'tensorflow')}  # module, package


@dataclass(frozen=True)
class PortableManifest:
  """What `manifest.json` says.

  Attributes:
    form: 'onnx' or 'savedmodel'.
    programs: by name, {'inputs': {name: {'type', 'shape'}}, 'outputs': likewise}; sizes that vary have names.
    bundle: what a bundle of the same model would say: vocabularies, features, tables, configuration. Its `files` are
      all files of this directory.
  """

  form: str
  programs: Mapping[str, Any]
  bundle: Manifest

  def write(self, directory: Path) -> None:
    """Writes `manifest.json`."""
    document = {'format': f'pinfm-{self.form}', 'format_version': VERSION}
    document |= {'programs': self.programs, 'bundle': asdict(self.bundle)}
    document['checksum'] = document_checksum(document)
    (directory / MANIFEST).write_text(json.dumps(document, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')

  @classmethod
  def read(cls, directory: str | Path) -> 'PortableManifest':
    """Reads and checks `manifest.json`.

    Raises:
      UserError: no such directory, a damaged manifest, or one of another version.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
      raise UserError(f'{directory} has no {MANIFEST}; make it with `pinfm export --format onnx`')
    try:
      document = json.loads(path.read_text(encoding='utf-8'))
      form, version, checksum = document['format'], document['format_version'], document.pop('checksum')
    except (ValueError, KeyError, TypeError):
      raise UserError(f'{path} is damaged; copy it again or export it again') from None
    if form not in [f'pinfm-{name}' for name in FORMS]:
      raise UserError(
        f'{path} is a {form}, expected one of {", ".join(FORMS)}; make it with `pinfm export --format onnx`'
      )
    if version != VERSION:
      raise UserError(f'{path} has format version {version}, this program reads {VERSION}: export it again')
    if checksum != document_checksum(document):
      raise UserError(f'{path} is damaged (its checksum does not fit); copy it again or export it again')
    return cls(form.removeprefix('pinfm-'), document['programs'], parse_manifest(document['bundle'], path))


def export_portable(
  out: str | Path, ranker: TrainedRanker, form: str, storage: str = 'int4', overwrite: bool = False
) -> Path:
  """Writes a ranker for other runtimes; `out` appears only when it is complete.

  Args:
    out: directory to make.
    ranker: what to write.
    form: 'onnx' or 'savedmodel'.
    storage: of the tables: 'int4', 'int8' or 'float32'.
    overwrite: replace such a directory.

  Returns:
    The directory.

  Raises:
    UserError: the package that writes the form is not installed, a tower alone, or see `export_bundle`.
  """
  if not ranker.schema.labels:
    raise UserError(f'--format {form} is for rankers, and this is a tower alone: export it as a bundle')
  write_programs = _writer(form)
  # Here, so that reading a manifest loads neither Flax nor the model's source.
  from flax.core import meta

  from pinfm_jax.serve.portable.programs import PortableModel

  layout = table_layout(ranker, storage)
  model = PortableModel(ranker.model_config, ranker.ranker_config, ranker.spec, layout)
  stats = {name: np.asarray(getattr(ranker.stats, name)) for name in STATS}
  weights = {'params': plain_arrays(meta.unbox(ranker.params)), 'stats': stats}
  with complete_directory(Path(out), overwrite, kind=f'export as {form}') as directory:
    programs = write_programs(directory / 'models', model, weights, ranker.schema.history_length)
    files = [path for path in (directory / 'models').rglob('*') if path.is_file()]
    names = [path.relative_to(directory).as_posix() for path in sorted(files)]
    content = Content(layout, weights, {}, ranker.items, ranker.model_config, ranker.catalogue, ranker.card)
    names += write_items_of(directory, content)
    tables = write_tables(directory, ranker.rows_GE, layout)
    entries = (*tables, *(checksums.describe(directory, name)[0] for name in names))
    bundle = replace(manifest_of(ranker, layout, entries), platforms=())
    PortableManifest(form, programs, bundle).write(directory)
  return Path(out)


def _writer(form: str) -> Any:
  """The function that writes the programs: (directory, model, weights, history length) -> what they take and give."""
  module, package = _NEEDS[form]
  try:
    if form == 'onnx':
      return _onnx_writer()
    from pinfm_jax.serve.portable.savedmodel import write_saved_model
  except ModuleNotFoundError as error:
    if error.name is None or error.name.partition('.')[0] != module:
      raise
    raise UserError(f"--format {form} needs {package}: pip install 'pinfm_jax[{form}]'") from None
  return lambda directory, *rest: write_saved_model(directory / 'pinfm' / '1', *rest)


def _onnx_writer() -> Any:
  from pinfm_jax.serve.portable.onnx.convert import described_model, to_onnx, write_model

  def write(directory: Path, model: Any, weights: Any, history_length: int) -> dict[str, Any]:
    programs, described = model.programs(), {}
    for name, inputs in model.inputs(history_length).items():
      converted = to_onnx(programs[name], weights, inputs, name)
      described[name] = described_model(converted)
      write_model(directory / name / '1' / 'model.onnx', converted)
    return described

  return write
