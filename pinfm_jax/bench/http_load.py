"""An open-loop load generator over HTTP/1.1 with kept connections, in asyncio and without further packages.

Open loop: requests leave when a Poisson process says so, whether or not earlier ones are answered, and a latency counts
from that moment. A generator that waits for answers would slow down with the server and hide its queue.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Answer:
  """What came of one request.

  Attributes:
    body: its number among the bodies.
    at_s: when it was due, after the start.
    late_s: how much later it left: the generator's own delay, which `seconds` includes.
    seconds: from when it was due to the end of the answer.
    status: HTTP status; 0 = none came.
    headers: lower-case names.
    content: the answer's body.
  """

  body: int
  at_s: float
  late_s: float
  seconds: float
  status: int
  headers: dict[str, str] = field(repr=False)
  content: bytes = field(repr=False)


class Client:
  """Posts bodies to one URL; as many connections as requests are on their way."""

  def __init__(self, host: str, port: int, path: str):
    """Connects when first needed."""
    self._host, self._port = host, port
    self._head = f'POST {path} HTTP/1.1\r\nHost: {host}:{port}'
    self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

  async def post(self, body: bytes, headers: str = '') -> tuple[int, dict[str, str], bytes]:
    """Posts a body.

    Args:
      body: of the request.
      headers: more of them, each line begun by CR LF.

    Returns:
      Status (0: the connection could not be made or broke), headers and content.
    """
    message = f'{self._head}{headers}\r\nContent-Length: {len(body)}\r\n\r\n'.encode() + body
    while self._idle:
      connection = self._idle.pop()
      try:
        return await self._exchange(connection, message)
      except asyncio.IncompleteReadError as error:
        connection[1].close()
        if error.partial:
          return 0, {}, b''
      except OSError:
        connection[1].close()
      # The server had closed the connection while it was idle, and has not read the request: another one.
    try:
      connection = await asyncio.open_connection(self._host, self._port)
    except OSError:
      return 0, {}, b''
    try:
      return await self._exchange(connection, message)
    except (asyncio.IncompleteReadError, OSError):
      connection[1].close()
      return 0, {}, b''

  async def close(self) -> None:
    """Closes the connections."""
    for _, writer in self._idle:
      writer.close()
      await asyncio.wait([asyncio.ensure_future(writer.wait_closed())])
    self._idle.clear()

  async def _exchange(self, connection: tuple, message: bytes) -> tuple[int, dict[str, str], bytes]:
    reader, writer = connection
    writer.write(message)
    head = (await reader.readuntil(b'\r\n\r\n')).decode('latin-1').split('\r\n')
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(':') for line in head[1:] if line)}
    content = await reader.readexactly(int(headers.get('content-length', 0)))
    if headers.get('connection', '').lower() == 'close':
      writer.close()
    else:
      self._idle.append(connection)
    return int(head[0].split()[1]), headers, content


async def open_loop(
  client: Client, bodies: Sequence[tuple[bytes, str]], rate: float, seconds: float, seed: int = 0
) -> list[Answer]:
  """Posts bodies at random times.

  Args:
    client: where to.
    bodies: each with its headers, see `Client.post`; taken in turn.
    rate: of the Poisson process, requests a second.
    seconds: how long it lasts; then the answers are waited for.
    seed: of the times.

  Returns:
    An answer for every request.
  """
  rng, loop = np.random.default_rng(seed), asyncio.get_running_loop()
  times = np.cumsum(rng.exponential(1 / rate, int(rate * seconds * 2) + 20))
  start = loop.time()

  async def one(number: int, at: float) -> Answer:
    which, late = number % len(bodies), loop.time() - start - at
    status, headers, content = await client.post(*bodies[which])
    return Answer(which, at, late, loop.time() - start - at, status, headers, content)

  tasks = []
  for number, at in enumerate(times[times < seconds].tolist()):
    await asyncio.sleep(start + at - loop.time())  # also when late: others must get their turn
    tasks.append(asyncio.create_task(one(number, at)))
  return list(await asyncio.gather(*tasks))


async def closed_loop(
  client: Client, bodies: Sequence[tuple[bytes, str]], callers: int, seconds: float
) -> list[Answer]:
  """Posts bodies by `callers` that each wait for their answer: the most that the server does, at any latency."""
  loop, answers = asyncio.get_running_loop(), []
  start = loop.time()

  async def caller(first: int) -> None:
    number = first
    while loop.time() < start + seconds:
      at, which = loop.time() - start, number % len(bodies)
      status, headers, content = await client.post(*bodies[which])
      answers.append(Answer(which, at, 0.0, loop.time() - start - at, status, headers, content))
      number += callers

  await asyncio.gather(*(caller(i) for i in range(callers)))
  return answers
