"""Reads batches ahead and copies them to the devices while a step runs."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any


class Prefetch:
  """An iterator whose items are made by one background thread, in order, a bounded number ahead.

  What the thread raises is raised where the item would have been returned. `close` ends the thread; it is called
  however the consumer ends.
  """

  def __init__(self, source: Iterator[Any], place: Callable[[Any], Any], ahead: int = 2):
    """Starts the thread.

    Args:
      source: batches on the host.
      place: copies one to the devices. JAX only begins the copy here, so it overlaps with the step that runs.
      ahead: how many placed batches wait at most; one more may be in the thread's hand.
    """
    self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(ahead)
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._fill, args=(source, place), name='pinfm-prefetch', daemon=True)
    self._thread.start()

  def __iter__(self) -> 'Prefetch':
    return self

  def __next__(self) -> Any:
    item, error = self._queue.get()
    if error is not None:
      self._queue.put((None, error))  # an iterator that has ended stays ended
      raise error
    return item

  def close(self, wait_s: float = 10.0) -> None:
    """Ends the thread; it may be inside a read that nobody can interrupt, so the wait is bounded."""
    self._stop.set()
    while self._thread.is_alive() and wait_s > 0:
      with suppress(queue.Empty):
        self._queue.get_nowait()  # room for an item that the thread may be trying to put
      self._thread.join(0.02)
      wait_s -= 0.02

  def _fill(self, source: Iterator[Any], place: Callable[[Any], Any]) -> None:
    try:
      for item in source:
        self._queue.put((place(item), None))
        if self._stop.is_set():
          return
      self._queue.put((None, StopIteration()))
    except BaseException as error:  # noqa: BLE001 (whatever it is, it belongs to the thread that trains)
      self._queue.put((None, error))
