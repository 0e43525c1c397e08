"""Made tests/golden/bundle_v1.tar.xz with the code of format 1; it is kept to say what the archive holds.

A program that writes a later format cannot make it again: check out 81fc35b, put this file into tests/golden and run

  PYTHONPATH=.:tests JAX_PLATFORMS=cpu python tests/golden/make_bundle_v1.py

The archive holds two bundles of the toy model with int4 tables, `plain` and `inputs` (time gaps, content, hidden ids),
a ranker without PinFM, `none`, and for each of them NAME.requests.jsonl and NAME.scores.jsonl, as `pinfm score` reads
and writes them.
"""

import json
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import toy_bundle

from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.scorer import score_file

LENGTHS = (0, 1, 7, 20, 21, 33)
PLAIN = toy_bundle.MODEL
INPUTS = replace(PLAIN, tower=replace(PLAIN.tower, time_gap_buckets=12), content=True, content_width=2, id_mask=0.3)


def main() -> None:
  dataset = toy_bundle.ToyDataset(list(LENGTHS))
  documents = list(dataset_requests(dataset, range(len(LENGTHS)), toy_bundle.LENGTH))
  with tempfile.TemporaryDirectory() as scratch:
    directory = Path(scratch) / 'bundle_v1'
    directory.mkdir()
    for name, sequence, model in (('plain', 'pinfm', PLAIN), ('inputs', 'pinfm', INPUTS), ('none', 'none', PLAIN)):
      bundle = toy_bundle.make_toy(sequence, model).export(directory / name)
      requests = directory / f'{name}.requests.jsonl'
      requests.write_text(''.join(json.dumps(document) + '\n' for document in documents))
      score_file(bundle, requests, directory / f'{name}.scores.jsonl')
    with tarfile.open(Path(__file__).with_name('bundle_v1.tar.xz'), 'w:xz', preset=9) as archive:
      archive.add(directory, arcname='bundle_v1', filter=_nobody)


def _nobody(info: tarfile.TarInfo) -> tarfile.TarInfo:
  info.uid = info.gid = info.mtime = 0
  info.uname = info.gname = ''
  return info


if __name__ == '__main__':
  main()
