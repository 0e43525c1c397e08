"""What row servers and their clients say to each other, over HTTP/1.1 with kept connections.

GET  /v1/layout  -> JSON: what the server has (`ServedRows`)
POST /v1/rows    row numbers, uint32 little-endian, one after another; the header X-PinFM-Tables has the SHA-256 of the
                 client's tables.bin -> the packed rows (`serve.quantize`), one after another, in the same order
GET  /health     -> 200 while the server takes requests

A refusal is one line of text: 400 malformed, or a row that the server has not; 409 other tables; 413 more rows than
`most_rows`; 408 the body did not come in time; 503 too many requests at once.
"""

import json
from dataclasses import asdict, dataclass

from pinfm_jax.serve.manifest import TableLayout

LAYOUT, ROWS, HEALTH = '/v1/layout', '/v1/rows', '/health'
TABLES_HEADER = 'X-PinFM-Tables'


@dataclass(frozen=True)
class ServedRows:
  """What a row server has.

  Attributes:
    tables: how the rows are laid out.
    sha256: of the tables.bin that they are of.
    first: number of its first row.
    last: of the row behind its last.
    most_rows: of one request.
  """

  tables: TableLayout
  sha256: str
  first: int
  last: int
  most_rows: int

  def text(self) -> str:
    """As JSON."""
    return json.dumps(asdict(self))

  @classmethod
  def parse(cls, text: bytes) -> 'ServedRows':
    """Reads what `text` made.

    Raises:
      ValueError: it is something else.
    """
    try:
      fields = json.loads(text)
      served = cls(**{**fields, 'tables': TableLayout(**fields['tables'])})
    except (KeyError, TypeError) as error:
      raise ValueError(f'no description of rows ({error})') from None
    numbers = (served.first, served.last, served.most_rows)
    if not all(isinstance(number, int) for number in numbers) or not 0 <= served.first < served.last:
      raise ValueError('no description of rows (numbers that cannot be)')
    if served.most_rows < 1:
      raise ValueError('no description of rows (most_rows below 1)')
    return served
