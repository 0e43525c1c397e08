import json

import numpy as np
import pytest

from pinfm_jax.serve.cache import SlotCache, Window
from pinfm_jax.serve.memo import Memo, content_key


def window(events):
  item = np.array([[e, e >> 3] for e in events], np.uint32).reshape(len(events), 2)
  return Window.of({'item': item, 'surface': np.array([e % 3 for e in events], np.int32)})


class Device:
  """What the slots hold, if the caller does as it is told."""

  def __init__(self, cache):
    self.cache, self.slots = cache, {}

  def run(self, histories):
    slot_U, whole, appended = self.cache.assign([window(h) for h in histories])
    for place in whole:
      self.slots[slot_U[place]] = list(histories[place])
    for place, held in appended:
      slot = self.slots[slot_U[place]]
      assert len(slot) == held
      slot += histories[place][held:]
    for slot, history in zip(slot_U, histories, strict=True):
      assert self.slots[slot] == list(history)
    return whole, appended


def test_random_streams_read_what_they_asked_for():
  rng = np.random.default_rng(0)
  cache = SlotCache(slots=6, most_appended=4)
  device, users, requests = Device(cache), [[] for _ in range(12)], 0
  for _ in range(400):
    batch = []
    for _ in range(rng.integers(1, 6)):
      user = users[min(rng.geometric(0.2), len(users)) - 1]
      if rng.random() < 0.5:
        user += rng.integers(0, 50, rng.integers(1, 7)).tolist()
      if len(user) > 20:  # the window slides: it starts elsewhere
        del user[:8]
      batch.append(list(user) if rng.random() < 0.8 else user[: rng.integers(0, len(user) + 1)])
    device.run(batch)
    requests += len(batch)
  assert cache.hits + cache.extended + cache.misses == requests
  assert min(cache.hits, cache.extended, cache.misses, cache.evicted) > 50


def test_repeats_and_appended_events():
  device = Device(SlotCache(slots=4, most_appended=3))
  assert device.run([[1, 2], [5]]) == ([0, 1], [])
  assert device.run([[1, 2], [5], [5]]) == ([], [])
  assert device.run([[1, 2, 3]]) == ([], [(0, 2)])
  assert device.run([[1, 2]]) == ([0], [])  # its slot went on with the longer history
  assert device.run([[1, 2, 3, 4, 5, 6, 7]]) == ([0], [])  # too many new events
  assert device.run([[9, 2, 3, 4]]) == ([0], [])  # another start
  cache = device.cache
  assert (cache.hits, cache.extended, cache.misses, cache.evicted) == (3, 1, 5, 1)


def test_a_batch_keeps_what_it_uses():
  device = Device(SlotCache(slots=3, most_appended=3))
  device.run([[1], [2], [3]])
  # [1] is oldest but used by the batch: neither extended for [1, 7] nor given away.
  assert device.run([[1, 7], [4], [1]]) == ([0, 1], [])
  assert device.run([[4], [1], [1, 7]]) == ([], [])
  with pytest.raises(ValueError, match='more different histories than the 3 slots'):
    device.cache.assign([window([i]) for i in range(4)])


def test_equal_histories_share_a_slot_and_the_oldest_goes_first():
  device = Device(SlotCache(slots=2, most_appended=3))
  assert device.run([[1], [1], [2], [1]]) == ([0, 2], [])
  device.run([[1]])
  device.run([[3]])  # takes the place of [2]
  assert device.run([[1], [3]]) == ([], [])
  assert device.run([[2]]) == ([0], [])


def test_the_empty_history_and_clear():
  device = Device(SlotCache(slots=2, most_appended=3))
  assert device.run([[], []]) == ([0], [])
  assert device.run([[]]) == ([], [])
  assert device.run([[4]]) == ([0], [])  # from scratch: the slot of the empty history serves all new users
  device.cache.clear()
  assert device.run([[]]) == ([0], [])


def test_equal_hashes_do_not_mix_histories():
  cache, a, b = SlotCache(slots=4, most_appended=3), window([1, 2, 3]), window([4, 5, 6])
  b = Window(b.columns, a.prefixes)
  longer = Window(window([4, 5, 6, 7]).columns, np.append(a.prefixes, np.uint64(5)))
  for _ in range(2):
    slots = [cache.assign([w]).slot_U[0] for w in (a, b, longer)]
    assert len(set(slots)) == 3 or slots[1] == slots[2]
  assert cache.assign([a, b]).slot_U[0] != cache.assign([a, b]).slot_U[1]


def test_every_column_and_the_order_count():
  base = {'item': np.array([[1, 0], [2, 0]], np.uint32), 'gap': np.array([0, 4], np.int32)}
  other = [
    {**base, 'gap': np.array([0, 5], np.int32)},
    {**base, 'item': base['item'][::-1]},
    {**base, 'item': np.array([[1, 0], [2, 1]], np.uint32)},
  ]
  hashes = {int(Window.of(columns).prefixes[-1]) for columns in (base, *other)}
  assert len(hashes) == 4
  assert not any(Window.of(columns).starts_with(Window.of(base)) for columns in other)


def test_keys_tell_json_values_apart():
  text = '[{"item_id": 1, "actions": ["a", "b"]}, {"item_id": 1, "actions": ["a", "b"]}]'
  value = json.loads(text)
  shared = [value[0], value[0]]
  assert content_key(json.loads(text)) == content_key(value) == content_key(shared)
  for other in ('[{"item_id": 1.0}]', '[{"item_id": true}]', '[{"item_id": 1}]', '[{"item_id": "1"}]', '[]'):
    assert content_key(json.loads(other)) != content_key(value)
  assert len({content_key([x]) for x in (1, 1.0, True, '1', None)}) == 5
  assert content_key([object()]) is None
  deep = []
  for _ in range(5000):
    deep = [deep]
  assert content_key(deep) is None


def test_the_memo_forgets_the_oldest():
  memo = Memo(most_bytes=10)
  for name in (b'a', b'b'):
    memo.put(name, name, 4)
  assert memo.get(b'a') == b'a'
  memo.put(b'c', b'c', 4)
  assert [memo.get(name) for name in (b'a', b'b', b'c')] == [b'a', None, b'c']
  memo.put(b'a', b'new', 6)
  assert memo.get(b'a') == b'new'
  memo.put(b'large', b'', 11)
  assert all(memo.get(name) is None for name in (b'a', b'c', b'large'))
