"""Public data sets by name: where they are, what they may be used for, and how to get them whole."""

import json
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pinfm_jax.data.public.archive import check_gzip, is_archive, unpack
from pinfm_jax.data.public.transfer import RetryPolicy, fetch, read_published_md5
from pinfm_jax.errors import UserError

RECORD = 'downloads.json'

_GROUPLENS = 'https://files.grouplens.org/datasets/movielens'
_GROUPLENS_TERMS = 'GroupLens terms: research use, no redistribution, no commercial use without permission'
_ZENODO_KUAIRAND = 'https://zenodo.org/records/10439422/files'
_SNAP_AMAZON = 'https://snap.stanford.edu/data/amazon/productGraph/categoryFiles'
_S3REC = 'https://raw.githubusercontent.com/RUCAIBox/CIKM2020-S3Rec/master/data'
_AMAZON_TERMS = 'no licence stated by the source: research use'


@dataclass(frozen=True)
class RemoteFile:
  """One file to download.

  Attributes:
    name: its path below the base address; the last part names it on disk.
    md5: what the source publishes; None where it publishes none, then length and archive are what is checked.
    md5_beside: the source keeps `<name>.md5` beside the file, which is read instead.
  """

  name: str
  md5: str | None = None
  md5_beside: bool = False


@dataclass(frozen=True)
class PublicDataset:
  """A data set that `pinfm download` knows.

  Attributes:
    name: what to ask for.
    source: the name `pinfm prepare --source` takes for it.
    base_url: the address of the files; empty where people must get it by hand.
    files: what to get.
    terms: one line.
    page: where a human reads more.
  """

  name: str
  source: str
  base_url: str
  files: tuple[RemoteFile, ...]
  terms: str
  page: str


def _movielens(size: str, md5: str | None) -> PublicDataset:
  file = RemoteFile(f'ml-{size}.zip', md5, md5_beside=md5 is None)
  page = f'https://grouplens.org/datasets/movielens/{size}/'
  return PublicDataset(f'movielens-{size}', 'movielens', _GROUPLENS, (file,), _GROUPLENS_TERMS, page)


def _kuairand(size: str, md5: str) -> PublicDataset:
  file = RemoteFile(f'KuaiRand-{size}.tar.gz', md5)
  terms = 'CC BY-SA 4.0'
  return PublicDataset(
    f'kuairand-{size.lower()}', 'kuairand', _ZENODO_KUAIRAND, (file,), terms, 'https://kuairand.com/'
  )


def _amazon(name: str, category: str) -> tuple[PublicDataset, PublicDataset]:
  reviews, sequences = RemoteFile(f'reviews_{category}_5.json.gz'), RemoteFile(f'{category}.txt')
  return (
    PublicDataset(
      f'amazon-{name}-reviews',
      'amazon',
      _SNAP_AMAZON,
      (reviews,),
      _AMAZON_TERMS,
      'https://jmcauley.ucsd.edu/data/amazon/',
    ),
    PublicDataset(
      f'amazon-{name}', 'amazon', _S3REC, (sequences,), _AMAZON_TERMS, 'https://github.com/RUCAIBox/CIKM2020-S3Rec'
    ),
  )


DATASETS: tuple[PublicDataset, ...] = (
  _kuairand('Pure', '0820331067a3784d9691136f772b35a7'),
  _kuairand('1K', '6b0b9c8222d67fcd4c676218edca3f1f'),
  _kuairand('27K', '3e3c799a24e2d23a4d2c757fbf9adf59'),
  _movielens('100k', '0e33842e24a9c977be4e0107933c0723'),
  _movielens('1m', 'c4d9eecfca2ab87c1945afe126590906'),
  _movielens('20m', 'cd245b17a1ae2cc31bb14903e1204af3'),
  _movielens('25m', '6b51fb2759a8657d3bfcbfc42b592ada'),
  _movielens('32m', None),
  *_amazon('beauty', 'Beauty'),
  *_amazon('sports', 'Sports_and_Outdoors'),
  *_amazon('toys', 'Toys_and_Games'),
  PublicDataset(
    'globo',
    'globo',
    '',
    (),
    'academic use, non-commercial',
    'https://www.kaggle.com/datasets/gspmoreira/news-portal-user-interactions-by-globocom',
  ),
)


def download(
  name: str,
  directory: str | Path,
  base_url: str | None = None,
  retry: RetryPolicy | None = None,
  datasets: tuple[PublicDataset, ...] = DATASETS,
) -> Path:
  """Downloads a public data set, checks it and unpacks it.

  An interrupted download goes on where it stopped. What was fetched from where, with its checksums, is written to
  `downloads.json`; files already recorded there are not fetched again. Archives are deleted once unpacked.

  Args:
    name: a name of `datasets`.
    directory: where to put the files.
    base_url: a mirror that has the files under the same names.
    retry: when to give up.
    datasets: what is known.

  Returns:
    The directory, which `prepare_source` takes.

  Raises:
    UserError: an unknown name, a set that needs a login, or a download that fails.
  """
  dataset = _find(name, datasets)
  directory = Path(directory)
  base = (base_url or dataset.base_url).rstrip('/')
  if not dataset.files:
    raise UserError(
      f'{name} wants a login: get it by hand from {dataset.page}, unpack it, then run pinfm prepare on its folder'
    )
  print(f'{name}: {dataset.terms} ({dataset.page})', file=sys.stderr)
  for file in dataset.files:
    _get(file, f'{base}/{file.name}', directory, retry)
  return directory


def _find(name: str, datasets: tuple[PublicDataset, ...]) -> PublicDataset:
  for dataset in datasets:
    if dataset.name == name:
      return dataset
  raise UserError(f'no data set {name!r} to download; known: {", ".join(d.name for d in datasets)}')


def _get(file: RemoteFile, url: str, directory: Path, retry: RetryPolicy | None) -> None:
  """One file, its checks, and its line in the record."""
  target = directory / Path(file.name).name
  records = _read_records(directory)
  known = records.get(target.name)
  if known and all((directory / entry).exists() for entry in known['entries']):
    print(f'{target.name}: already here, {known["bytes"]:,} bytes', file=sys.stderr)
    return
  if file.md5_beside:
    file = replace(file, md5=read_published_md5(f'{url}.md5'))
  record = fetch(url, target, file.md5, retry)
  record['verified'] = 'md5' if file.md5 else 'length and compression only, the source publishes no checksum'
  print(f'{target.name}: sha256 {record["sha256"]}; checked: {record["verified"]}', file=sys.stderr)
  record['entries'] = [target.name]
  if is_archive(target.name):
    record['entries'] = unpack(target, directory)
    target.unlink()
  elif target.suffix == '.gz':
    check_gzip(target)
  record['time'] = datetime.now(UTC).isoformat(timespec='seconds')
  _write_records(directory, records | {target.name: record})


def _read_records(directory: Path) -> dict[str, dict]:
  path = directory / RECORD
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error}); delete it to download again') from None


def _write_records(directory: Path, records: dict[str, dict]) -> None:
  path = directory / RECORD
  scratch = path.with_suffix('.tmp')
  scratch.write_text(json.dumps(records, indent=1, sort_keys=True) + '\n')
  scratch.replace(path)
