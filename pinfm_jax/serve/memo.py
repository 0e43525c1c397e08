"""Remembers what was made of a list of JSON values, so that a repeat costs a hash; bounded, for several threads."""

import hashlib
import marshal
from collections import OrderedDict
from threading import Lock
from typing import Any


def content_key(values: Any) -> bytes | None:
  """A key that equal JSON values share and different ones do not; None for what is no plain JSON.

  Types are told apart (1, 1.0 and True differ), and so is the order of an object's fields.
  """
  try:
    # Version 2 writes no references, which would tell an object that occurs twice from two equal ones.
    # SHA-256: processors have instructions for it, so it takes half the time of BLAKE2b.
    return hashlib.sha256(marshal.dumps(values, 2)).digest()
  except ValueError:
    return None


class Memo:
  """Values by key, those unused for longest forgotten first."""

  def __init__(self, most_bytes: int):
    """An empty memo that holds values of `most_bytes` in all."""
    self._most, self._bytes, self._lock = most_bytes, 0, Lock()
    self._values: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()

  def get(self, key: bytes) -> Any:
    """The value, or None."""
    with self._lock:
      found = self._values.get(key)
      if found is None:
        return None
      self._values.move_to_end(key)
      return found[0]

  def put(self, key: bytes, value: Any, size: int) -> None:
    """Remembers a value of `size` bytes."""
    with self._lock:
      if key in self._values:
        self._bytes -= self._values.pop(key)[1]
      self._values[key] = (value, size)
      self._bytes += size
      while self._bytes > self._most:
        self._bytes -= self._values.popitem(last=False)[1][1]
