import gzip
import hashlib
import io
import json
import random
import tarfile
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pinfm_jax.data.download import DATASETS, PublicDataset, RemoteFile, download
from pinfm_jax.data.public.archive import unpack
from pinfm_jax.data.public.transfer import RetryPolicy, fetch, read_published_md5
from pinfm_jax.errors import UserError

FAST = RetryPolicy(attempts=3, backoff_s=0.01, timeout_s=5)
CONTENT = random.Random(0).randbytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Site:
  """What the local server serves, and what it was asked."""

  files: dict[str, bytes]
  etag: str | None = '"v1"'
  ranges: bool = True
  break_after: list[int] = field(default_factory=list)  # bytes sent before the connection is cut, one entry a request
  errors: list[int] = field(default_factory=list)
  asked: list[tuple[str, str | None]] = field(default_factory=list)
  statuses: list[int] = field(default_factory=list)
  url: str = ''


class Handler(BaseHTTPRequestHandler):
  site: Site

  def do_GET(self):
    site, name = self.site, self.path.lstrip('/')
    wanted = self.headers.get('Range')
    site.asked.append((name, wanted))
    if site.errors:
      return self._error(site.errors.pop(0))
    if name not in site.files:
      return self._error(404)
    body, start = site.files[name], 0
    if wanted and site.ranges and self.headers.get('If-Range') == site.etag:
      start = int(wanted.removeprefix('bytes=').rstrip('-'))
      if start >= len(body):
        return self._error(416)
    site.statuses.append(206 if start else 200)
    self.send_response(site.statuses[-1])
    if start:
      self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
    if site.etag:
      self.send_header('ETag', site.etag)
    self.send_header('Content-Length', str(len(body) - start))
    self.end_headers()
    limit = site.break_after.pop(0) if site.break_after else len(body)
    self.wfile.write(body[start : start + limit])
    return None

  def _error(self, code):
    self.site.statuses.append(code)
    self.send_response(code)
    self.send_header('Content-Length', '0')
    self.end_headers()

  def log_message(self, *args):
    pass


@contextmanager
def serve(site: Site):
  server = ThreadingHTTPServer(('127.0.0.1', 0), type('SiteHandler', (Handler,), {'site': site}))
  thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
  thread.start()
  site.url = f'http://127.0.0.1:{server.server_address[1]}'
  try:
    yield site
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def site():
  with serve(Site({'a.bin': CONTENT})) as running:
    yield running


def leftovers(directory: Path) -> set[str]:
  return {p.name for p in directory.iterdir()}


def test_a_whole_file_arrives_under_its_name_with_its_digests(site, tmp_path):
  record = fetch(f'{site.url}/a.bin', tmp_path / 'sub' / 'a.bin', MD5, FAST)
  assert (tmp_path / 'sub' / 'a.bin').read_bytes() == CONTENT
  assert record == {
    'url': f'{site.url}/a.bin',
    'bytes': len(CONTENT),
    'sha256': hashlib.sha256(CONTENT).hexdigest(),
    'md5': MD5,
  }
  assert leftovers(tmp_path / 'sub') == {'a.bin'}


def test_a_cut_connection_goes_on_at_the_byte_where_it_stopped(site, tmp_path):
  site.break_after = [1_200_000, 900_000]
  fetch(f'{site.url}/a.bin', tmp_path / 'a.bin', MD5, FAST)
  assert (tmp_path / 'a.bin').read_bytes() == CONTENT
  assert [wanted for _, wanted in site.asked] == [None, 'bytes=1200000-', 'bytes=2100000-']
  assert site.statuses == [200, 206, 206]


def test_another_process_goes_on_too(site, tmp_path):
  site.break_after = [500_000]
  with pytest.raises(UserError, match='500,000 bytes are kept'):
    fetch(f'{site.url}/a.bin', tmp_path / 'a.bin', MD5, RetryPolicy(1, 0.01, 5))
  assert leftovers(tmp_path) == {'a.bin.part', 'a.bin.part.json'}
  fetch(f'{site.url}/a.bin', tmp_path / 'a.bin', MD5, FAST)
  assert site.asked[-1] == ('a.bin', 'bytes=500000-')
  assert (tmp_path / 'a.bin').read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_starts_again(site, tmp_path):
  site.break_after = [500_000]
  with pytest.raises(UserError):
    fetch(f'{site.url}/a.bin', tmp_path / 'a.bin', None, RetryPolicy(1, 0.01, 5))
  site.files['a.bin'], site.etag = CONTENT[::-1], '"v2"'
  fetch(f'{site.url}/a.bin', tmp_path / 'a.bin', None, FAST)
  assert (tmp_path / 'a.bin').read_bytes() == CONTENT[::-1]
  assert site.statuses[-1] == 200


@pytest.mark.parametrize('changes', [{'ranges': False}, {'etag': None}, {'etag': 'W/"weak"'}])
def test_without_ranges_or_a_strong_validator_it_starts_again(site, tmp_path, changes):
  for name, value in changes.items():
    setattr(site, name, value)
  site.break_after = [1_000_000]
  fetch(f'{site.url}/a.bin', tmp_path / 'a.bin', MD5, FAST)
  assert (tmp_path / 'a.bin').read_bytes() == CONTENT
  assert 206 not in site.statuses


def test_a_part_longer_than_the_file_is_thrown_away(site, tmp_path):
  (tmp_path / 'a.bin.part').write_bytes(CONTENT + b'more')
  known = {'url': f'{site.url}/a.bin', 'validator': '"v1"', 'total': None}
  (tmp_path / 'a.bin.part.json').write_text(json.dumps(known))
  fetch(f'{site.url}/a.bin', tmp_path / 'a.bin', MD5, FAST)
  assert site.statuses == [416, 200]
  assert (tmp_path / 'a.bin').read_bytes() == CONTENT


def test_wrong_content_is_put_aside_and_never_gets_the_name(site, tmp_path):
  site.files['a.bin'] = CONTENT[:-1] + b'?'
  with pytest.raises(UserError, match=f'expected {MD5}'):
    fetch(f'{site.url}/a.bin', tmp_path / 'a.bin', MD5, FAST)
  assert leftovers(tmp_path) == {'a.bin.corrupt'}
  site.files['a.bin'] = CONTENT
  fetch(f'{site.url}/a.bin', tmp_path / 'a.bin', MD5, FAST)
  assert (tmp_path / 'a.bin').read_bytes() == CONTENT


def test_busy_servers_are_asked_again_and_dead_ones_given_up(site, tmp_path):
  site.errors = [503, 429]
  fetch(f'{site.url}/a.bin', tmp_path / 'a.bin', MD5, FAST)
  site.errors = [503] * 9
  with pytest.raises(UserError, match='after 3 attempts'):
    fetch(f'{site.url}/a.bin', tmp_path / 'b.bin', MD5, FAST)
  assert len(site.errors) == 6


def test_what_cannot_work_fails_at_once_in_one_line(site, tmp_path):
  for code, words in ((404, 'not found'), (403, 'login')):
    site.errors, before = [code], len(site.asked)
    with pytest.raises(UserError, match=words) as error:
      fetch(f'{site.url}/a.bin', tmp_path / 'a.bin', None, FAST)
    assert '\n' not in str(error.value)
    assert len(site.asked) == before + 1
  with pytest.raises(UserError, match='only http'):
    fetch('file:///etc/hostname', tmp_path / 'a.bin', None, FAST)
  assert not leftovers(tmp_path)


def test_no_network_is_said_so(tmp_path):
  with serve(Site({})) as site:
    pass  # the port is closed again
  with pytest.raises(UserError, match='when the network is back'):
    fetch(f'{site.url}/a.bin', tmp_path / 'a.bin', None, FAST)


@pytest.mark.parametrize('text', [f'MD5 (ml.zip) = {MD5}\n', f'{MD5}  ml.zip\n', MD5.upper()])
def test_published_checksums_are_read_in_every_layout(site, text):
  site.files['x.md5'] = text.encode()
  assert read_published_md5(f'{site.url}/x.md5') == MD5
  site.files['x.md5'] = b'<html>moved</html>'
  with pytest.raises(UserError, match='expected an MD5'):
    read_published_md5(f'{site.url}/x.md5')


def zip_of(members: dict[str, bytes]) -> bytes:
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as bundle:
    for name, content in members.items():
      bundle.writestr(name, content)
  return out.getvalue()


def tar_of(members: dict[str, bytes], link: str | None = None) -> bytes:
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w:gz') as bundle:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      bundle.addfile(info, io.BytesIO(content))
    if link:
      info = tarfile.TarInfo('link')
      info.type, info.linkname = tarfile.SYMTYPE, link
      bundle.addfile(info)
  return out.getvalue()


@pytest.mark.parametrize('path', ['../evil', '/tmp/evil', 'a/../../evil', 'C:\\evil', '..\\evil'])
@pytest.mark.parametrize('kind', ['zip', 'tar.gz'])
def test_archives_cannot_write_outside(tmp_path, path, kind):
  members = {'good': b'1', path: b'2'}
  archive = tmp_path / f'x.{kind}'
  archive.write_bytes(zip_of(members) if kind == 'zip' else tar_of(members))
  with pytest.raises(UserError, match='not safe'):
    unpack(archive, tmp_path / 'out')
  assert not leftovers(tmp_path / 'out')


def test_unpacking_keeps_files_leaves_links_and_replaces_what_was_there(tmp_path):
  archive = tmp_path / 'x.tar.gz'
  archive.write_bytes(tar_of({'top/data/a.csv': b'1', 'note': b'2'}, link='/etc/passwd'))
  (tmp_path / 'out' / 'top').mkdir(parents=True)
  (tmp_path / 'out' / 'top' / 'old').write_text('old')
  assert unpack(archive, tmp_path / 'out') == ['note', 'top']
  found = {str(p.relative_to(tmp_path / 'out')) for p in (tmp_path / 'out').rglob('*') if p.is_file()}
  assert found == {'top/data/a.csv', 'note'}


@pytest.mark.parametrize('kind', ['zip', 'tar.gz'])
def test_damaged_archives_leave_nothing(tmp_path, kind):
  whole = zip_of({'a': CONTENT}) if kind == 'zip' else tar_of({'a': CONTENT})
  archive = tmp_path / f'x.{kind}'
  archive.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError, match='damaged'):
    unpack(archive, tmp_path / 'out')
  assert not leftovers(tmp_path / 'out')


def test_download_checks_unpacks_records_and_does_not_fetch_twice(site, tmp_path, capsys):
  bundle = zip_of({'ml-x/ratings.csv': b'userId,movieId\n'})
  site.files |= {'ml-x.zip': bundle, 'ml-x.zip.md5': hashlib.md5(bundle).hexdigest().encode()}
  site.files['r.json.gz'] = gzip.compress(b'{}\n')
  known = PublicDataset(
    'x',
    'movielens',
    'http://gone.invalid',
    (RemoteFile('ml-x.zip', None, True), RemoteFile('r.json.gz')),
    'terms',
    'page',
  )
  assert download('x', tmp_path, site.url + '/', FAST, (known,)) == tmp_path
  assert (tmp_path / 'ml-x' / 'ratings.csv').read_bytes() == b'userId,movieId\n'
  assert leftovers(tmp_path) == {'ml-x', 'r.json.gz', 'downloads.json'}
  record = json.loads((tmp_path / 'downloads.json').read_text())
  assert record['ml-x.zip']['verified'] == 'md5'
  assert 'no checksum' in record['r.json.gz']['verified']
  assert record['r.json.gz']['sha256'] == hashlib.sha256(site.files['r.json.gz']).hexdigest()
  assert 'terms' in capsys.readouterr().err
  before = len(site.asked)
  download('x', tmp_path, site.url, FAST, (known,))
  assert len(site.asked) == before
  (tmp_path / 'r.json.gz').unlink()
  download('x', tmp_path, site.url, FAST, (known,))
  assert [name for name, _ in site.asked[before:]] == ['r.json.gz']


def test_a_cut_gzip_without_a_checksum_is_noticed(site, tmp_path):
  site.files['r.json.gz'] = gzip.compress(CONTENT)[:-100]
  known = PublicDataset('x', 'amazon', site.url, (RemoteFile('r.json.gz'),), 'terms', 'page')
  with pytest.raises(UserError, match='damaged'):
    download('x', tmp_path, None, FAST, (known,))
  assert not (tmp_path / 'downloads.json').exists()


def test_unknown_sets_and_sets_behind_a_login_say_what_to_do(tmp_path):
  with pytest.raises(UserError, match='known: kuairand-pure'):
    download('kuairandom', tmp_path)
  with pytest.raises(UserError, match='by hand from https://www.kaggle.com'):
    download('globo', tmp_path)


def test_the_registry_is_well_formed():
  names = [d.name for d in DATASETS]
  assert len(set(names)) == len(names)
  for dataset in DATASETS:
    assert dataset.terms
    assert dataset.page.startswith('https://')
    assert not dataset.files or dataset.base_url.startswith('https://')
    for file in dataset.files:
      assert file.md5 is None or (len(file.md5) == 32 and int(file.md5, 16))
