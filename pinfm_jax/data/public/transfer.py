"""One file over HTTP: resumed where it stopped, checked, and renamed into place when whole."""

import hashlib
import http.client
import json
import re
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

from pinfm_jax.errors import UserError
from pinfm_jax.progress import Progress

_CHUNK_BYTES = 1 << 20
_TRANSIENT = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class RetryPolicy:
  """When to give up.

  Attributes:
    attempts: failures in a row, none of which brought a byte, that are one too many.
    backoff_s: the wait after the first of them; it doubles each time.
    timeout_s: silence after which a connection counts as lost.
  """

  attempts: int = 5
  backoff_s: float = 1.0
  timeout_s: float = 30.0


@dataclass(frozen=True)
class _Partial:
  """What is known of an unfinished file; beside it on disk, so that another process can go on."""

  url: str
  validator: str | None
  total: int | None


class _ShortError(ConnectionError):
  """The connection closed before the end of the file."""


def fetch(url: str, target: Path, md5: str | None = None, retry: RetryPolicy | None = None) -> dict:
  """Downloads `url` to `target` and checks it.

  The bytes go to `<target>.part`; a later call goes on there if the server still has the same file (If-Range with its
  ETag or date) and starts again if it does not. A file whose checksum is wrong is kept as `<target>.corrupt`.

  Args:
    url: http or https.
    target: the file to write. Its directory is made.
    md5: what the source publishes, or None: then only the length is checked.
    retry: when to give up.

  Returns:
    {'url', 'bytes', 'sha256', 'md5'} of the file.

  Raises:
    UserError: not found, no answer, no space, or a wrong checksum.
  """
  if not url.startswith(('http://', 'https://')):
    raise UserError(f'got the address {url!r}; only http:// and https:// can be downloaded')
  retry = retry or RetryPolicy()
  part = _beside(target, '.part')
  target.parent.mkdir(parents=True, exist_ok=True)
  failures = 0
  while True:
    before = _size(part)
    try:
      _transfer_once(url, part, retry.timeout_s)
      break
    except _TRANSIENT as error:
      _give_up_if_permanent(url, error)
      if getattr(error, 'code', None) == 416:
        part.unlink(missing_ok=True)  # the server's file is shorter than what is here
      failures = 1 if _size(part) > before else failures + 1
      if failures >= retry.attempts:
        raise UserError(
          f'{url}: no luck after {failures} attempts ({_reason(error)}); {_size(part):,} bytes are kept, run the same '
          'command again when the network is back'
        ) from None
      time.sleep(retry.backoff_s * 2 ** (failures - 1))
  return _accept(url, part, target, md5)


def digest(path: Path) -> tuple[str, str]:
  """SHA-256 and MD5 of a file, hexadecimal; one reading."""
  sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
  with path.open('rb') as file:
    while block := file.read(_CHUNK_BYTES):
      sha256.update(block)
      md5.update(block)
  return sha256.hexdigest(), md5.hexdigest()


def read_published_md5(url: str) -> str:
  """The checksum in a `.md5` file beside a download, whatever its layout (BSD, GNU or bare).

  Raises:
    UserError: it cannot be read or holds no MD5.
  """
  try:
    with urllib.request.urlopen(_request(url), timeout=30) as response:
      text = response.read(4096).decode('ascii', 'replace')
  except _TRANSIENT as error:
    raise UserError(f'{url}: the published checksum cannot be read ({_reason(error)}); try again later') from None
  found = re.search(r'\b[0-9a-fA-F]{32}\b', text)
  if not found:
    raise UserError(f'{url}: expected an MD5 checksum, got {text[:60]!r}; the address may have changed')
  return found.group().lower()


def _transfer_once(url: str, part: Path, timeout_s: float) -> None:
  """One connection: appends to `part` if the server agrees, else starts it anew; raises unless it ends up whole."""
  have, known = _size(part), _read_partial(part)
  # Without a validator nobody knows whether the rest belongs to the same file.
  resume = have > 0 and known is not None and known.url == url and known.validator is not None
  if resume and have == known.total:
    return
  headers = {'Range': f'bytes={have}-', 'If-Range': known.validator} if resume else {}
  with urllib.request.urlopen(_request(url, headers), timeout=timeout_s) as response:
    resumed = resume and response.status == 206 and _range_start(response) == have
    if response.status == 206 and not resumed:
      part.unlink(missing_ok=True)
      raise _ShortError('the server answered another range than the one asked for')
    have = have if resumed else 0
    length = response.headers.get('Content-Length')
    total = have + int(length) if length else None
    _check_space(part, (total or 0) - have)
    _write_partial(part, _Partial(url, _validator(response), total))
    progress = Progress(f'downloading {part.stem}', total, 'bytes')
    progress.start_at(have)
    with part.open('ab' if resumed else 'wb') as file:
      while block := response.read(_CHUNK_BYTES):
        file.write(block)
        have += len(block)
        progress.update(have)
  if total is not None and have < total:
    raise _ShortError(f'the connection closed at {have:,} of {total:,} bytes')
  progress.close()


def _accept(url: str, part: Path, target: Path, md5: str | None) -> dict:
  sha256, actual = digest(part)
  _beside(part, '.json').unlink(missing_ok=True)
  if md5 is not None and actual != md5.lower():
    aside = _beside(target, '.corrupt')
    part.replace(aside)
    raise UserError(
      f'{url}: MD5 is {actual}, expected {md5.lower()}; the file was put aside as {aside}: run the command again, and '
      'if that does not help, the file at the source has changed'
    )
  record = {'url': url, 'bytes': _size(part), 'sha256': sha256, 'md5': actual}
  part.replace(target)
  return record


def _give_up_if_permanent(url: str, error: Exception) -> None:
  if not isinstance(error, urllib.error.HTTPError):
    return
  error.close()
  if error.code in (404, 410):
    raise UserError(f'{url}: not found (HTTP {error.code}); the source may have moved: give another address') from None
  if error.code < 500 and error.code not in (408, 416, 425, 429):
    raise UserError(f'{url}: refused (HTTP {error.code} {error.reason}); the source may want a login') from None


def _request(url: str, headers: dict[str, str] | None = None) -> urllib.request.Request:
  # A compressed answer would make its length and the range meaningless.
  return urllib.request.Request(
    url, headers={'User-Agent': 'pinfm_jax', 'Accept-Encoding': 'identity', **(headers or {})}
  )


def _validator(response: http.client.HTTPResponse) -> str | None:
  """What If-Range may hold: a strong ETag, else the date."""
  etag = response.headers.get('ETag')
  return etag if etag and not etag.startswith('W/') else response.headers.get('Last-Modified')


def _range_start(response: http.client.HTTPResponse) -> int | None:
  found = re.match(r'bytes (\d+)-', response.headers.get('Content-Range', ''))
  return int(found.group(1)) if found else None


def _check_space(part: Path, needed: int) -> None:
  free = shutil.disk_usage(part.parent).free
  if needed > free:
    raise UserError(f'{part.parent}: {needed:,} bytes are needed and {free:,} are free; choose another directory')


def _read_partial(part: Path) -> _Partial | None:
  try:
    return _Partial(**json.loads(_beside(part, '.json').read_text()))
  except (OSError, ValueError, TypeError):
    return None


def _write_partial(part: Path, partial: _Partial) -> None:
  _beside(part, '.json').write_text(json.dumps(asdict(partial)))


def _beside(path: Path, suffix: str) -> Path:
  return path.with_name(path.name + suffix)


def _size(path: Path) -> int:
  return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
  return str(getattr(error, 'reason', None) or error or type(error).__name__)
