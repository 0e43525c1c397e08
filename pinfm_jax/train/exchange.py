"""Item tables over a mesh: every device owns a range of rows, and rows travel by all-to-all of deduplicated ids.

Rows lie over the table axes (all mesh axes, or those inside a node with replicas across nodes). A device removes the
duplicates of its own ids, asks each owner for the rows it needs, and later sends their gradients back; the owner adds
the gradients of a row that several devices used and updates it once.

A round moves at most `capacity` rows between two devices, so shapes are static. Rows are split among rounds by where
they lie in their owner's range: a row is then in the same round for every device, and its gradients meet there. With
uniform ids one round is enough; with skewed ones the range is halved until every part fits, and nothing is dropped.
The number of rounds changes no row's sum, only the order in which the squares of all rows are added for the norm.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pinfm_jax.config import TableConfig
from pinfm_jax.model.tables import (
  AdamStep,
  RowPlan,
  Tables,
  adam_rows,
  add_rows,
  as_float32,
  gather_rows,
  item_vectors,
  plan_rows,
  sum_duplicates,
  update_rows,
)
from pinfm_jax.train.sharding import AXES, BATCH_AXES

Array = jax.Array


class ExchangePlan(NamedTuple):
  """Which rows each of D devices needs of which owner.

  Attributes:
    rows: every device's `RowPlan`, one behind the other.
    rounds: int32 scalar, rounds until every device has its rows.
  """

  rows: RowPlan
  rounds: Array


class SummedGradients(NamedTuple):
  """The gradients of the first round's rows at their owners, duplicates added; `squares` is of all rounds."""

  row_K: Array
  grad_KE: Array
  squares: Array


@dataclass(frozen=True)
class Exchange:
  """Lookup and update of a table whose rows lie over the mesh of the context (`jax.set_mesh`).

  Attributes:
    tables: sizes.
    rows: G, rows of the stored array (`table_rows`), a multiple of the devices of the table axes.
    axes: mesh axes over which the rows lie; over the others they are replicated.
    capacity: rows that one device may ask of another in a round; 0 = its share if no id came twice, and a tenth.
  """

  tables: TableConfig
  rows: int
  axes: tuple[str, ...] = AXES
  capacity: int = 0

  def plan(self, ids: tuple[Array, ...]) -> ExchangePlan:
    """Finds the distinct rows of ids.

    Args:
      ids: uint32 arrays [A, B, 2], A over the data and fsdp axes as batches are.
    """

    def local(*parts: Array) -> ExchangePlan:
      rows = plan_rows(jnp.concatenate([part.reshape(-1, 2) for part in parts]), self.tables)
      return ExchangePlan(rows, self._rounds(rows.unique_K))

    padded = tuple(_pad(part) for part in ids)
    return _shard_map(local, (_SPLIT,) * len(ids), ExchangePlan(RowPlan(P(AXES), P(AXES)), P()))(*padded)

  def largest_request(self, ids: tuple[Array, ...]) -> Array:
    """The most rows that any device needs of one owner, int32: what `capacity` must be for a single round."""

    def local(*parts: Array) -> Array:
      rows = plan_rows(jnp.concatenate([part.reshape(-1, 2) for part in parts]), self.tables)
      return self._fullest(rows.unique_K, jnp.int32(1))

    return _shard_map(local, (_SPLIT,) * len(ids), P())(*(_pad(part) for part in ids))

  def lookup(self, rows_GE: Array, plan: ExchangePlan) -> Array:
    """The rows of the plan in float32, [D * K, E]: the array with respect to which gradients are taken."""
    return _shard_map(self._fetch, (P(self.axes), P(AXES), P()), P(AXES))(rows_GE, plan.rows.unique_K, plan.rounds)

  def vectors(self, gathered_KE: Array, plan: ExchangePlan, ids: tuple[Array, ...]) -> tuple[Array, ...]:
    """The ids' vectors (PinFM section 2: S rows concatenated), [A, B, S * E] for each array of ids."""
    shapes = [_pad(part).shape[:2] for part in ids]
    shards = tuple((a // _axis_size(BATCH_AXES), b // _axis_size(('model',))) for a, b in shapes)

    def local(gathered_KE: Array, inverse_MS: Array) -> tuple[Array, ...]:
      vectors_MV = item_vectors(gathered_KE, inverse_MS)
      ends = [sum(math.prod(shape) for shape in shards[: i + 1]) for i in range(len(shards))]
      parts = jnp.split(vectors_MV, ends[:-1])
      return tuple(part.reshape(*shape, -1) for part, shape in zip(parts, shards, strict=True))

    vectors = _shard_map(local, (P(AXES), P(AXES)), (_SPLIT,) * len(ids))(gathered_KE, plan.rows.inverse_MS)
    return tuple(v[: part.shape[0], : part.shape[1]] for v, part in zip(vectors, ids, strict=True))

  def sum_gradients(self, plan: ExchangePlan, grad_KE: Array) -> SummedGradients:
    """Brings gradients to the rows' owners and adds those of equal rows.

    The sum of squares over all rows is known before any row moves, which clipping by the global norm needs. Only the
    last round's sums are kept (rounds run backwards here, so it is the first): one round is all there is when ids are
    uniform, and then nothing is sent twice.
    """

    def local(unique_K: Array, grad_KE: Array, rounds: Array) -> SummedGradients:
      def one(number: Array, squares: Array) -> SummedGradients:
        row_K, sums_KE = self._collect(unique_K, grad_KE, number, rounds)
        return SummedGradients(row_K, sums_KE, squares + jnp.sum(jnp.square(sums_KE)))

      summed = one(rounds - 1, jnp.float32(0))
      if not self._alone:
        _, summed = jax.lax.while_loop(
          lambda state: state[0] >= 0,
          lambda state: (state[0] - 1, one(state[0], state[1].squares)),
          (rounds - 2, summed),
        )
      return summed._replace(squares=jax.lax.psum(summed.squares, self.axes))

    specs = SummedGradients(P(AXES), P(AXES), P())
    return _shard_map(local, (P(AXES), P(AXES), P()), specs)(plan.rows.unique_K, grad_KE, plan.rounds)

  def update(
    self, tables: Tables, plan: ExchangePlan, grad_KE: Array, summed: SummedGradients, clip: Array,
    learning_rate: Array, salt: Array, adam: AdamStep | None = None,
  ) -> Tables:  # fmt: skip
    """Updates the rows at their owners (`model.tables.update_rows`), in place when the tables are donated.

    With `adam`, the gradients of all rounds are first added in an array of the table's size; then all rows move.

    Args:
      tables: rows and accumulators.
      plan: from `plan`.
      grad_KE: gradient with respect to `lookup`'s result.
      summed: from `sum_gradients`.
      clip: factor of all gradients.
      learning_rate: step size.
      salt: uint32 scalar, see `update_rows`.
      adam: see `adam_rows`; None = the other rules.
    """

    def local(
      tables: Tables, unique_K: Array, grad_KE: Array, rounds: Array, first: SummedGradients, clip: Array,
      learning_rate: Array, salt: Array, adam: AdamStep | None,
    ) -> Tables:  # fmt: skip
      first_row = jax.lax.axis_index(self.axes) * self._own_rows

      def take(held: Any, row_K: Array, sums_KE: Array) -> Any:
        if adam is not None:
          return add_rows(held, row_K, sums_KE * clip)
        return update_rows(held, row_K, sums_KE * clip, learning_rate, salt, first_row)

      def one(state: tuple[Array, Any]) -> tuple[Array, Any]:
        number, held = state
        return number + 1, take(held, *self._collect(unique_K, grad_KE, number, rounds))

      held = take(tables if adam is None else jnp.zeros_like(tables.rows_GE), first.row_K, first.grad_KE)
      if not self._alone:
        # The first sums are of round 0 (see `sum_gradients`).
        held = jax.lax.while_loop(lambda state: state[0] < rounds, one, (jnp.int32(1), held))[1]
      return held if adam is None else adam_rows(tables, held, learning_rate, adam)

    own = jax.tree.map(lambda _: P(self.axes), tables)
    scalars = jax.tree.map(lambda _: P(), (clip, learning_rate, salt, adam))
    specs = (own, P(AXES), P(AXES), P(), SummedGradients(P(AXES), P(AXES), P()), *scalars)
    arguments = (tables, plan.rows.unique_K, grad_KE, plan.rounds, summed, clip, learning_rate, salt, adam)
    return _shard_map(local, specs, own)(*arguments)

  def traffic(self, plan: ExchangePlan) -> dict[str, Array]:
    """What the plan costs: rounds, and over all devices the rows needed and the places for them in the rounds."""
    devices, unique = jax.sharding.get_abstract_mesh().size, plan.rows.unique_K
    places = self._capacity(unique.size // devices) * self._owners * devices * plan.rounds.astype(jnp.float32)
    return {'exchange/rounds': plan.rounds, 'exchange/rows': jnp.sum(unique < self.rows), 'exchange/places': places}

  @property
  def _owners(self) -> int:
    return _axis_size(self.axes)

  @property
  def _own_rows(self) -> int:
    return self.rows // self._owners

  @property
  def _replica_axes(self) -> tuple[str, ...]:
    return tuple(axis for axis in AXES if axis not in self.axes and _axis_size((axis,)) > 1)

  @property
  def _alone(self) -> bool:
    """Whether nothing has to travel: one owner, one replica."""
    return self._owners == 1 and not self._replica_axes

  def _capacity(self, needed: int) -> int:
    return min(needed, self.capacity or math.ceil(1.1 * needed / self._owners))

  def _rounds(self, unique_K: Array) -> Array:
    """Halves the owners' ranges until each part is asked for at most `capacity` rows by any device."""
    if self._owners == 1:
      return jnp.int32(1)

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
      rounds = state[0] * 2
      return rounds, self._fullest(unique_K, rounds)

    state = (jnp.int32(1), self._fullest(unique_K, jnp.int32(1)))
    return jax.lax.while_loop(lambda state: state[1] > self._capacity(unique_K.size), halve, state)[0]

  def _fullest(self, unique_K: Array, rounds: Array) -> Array:
    """The most rows that any device needs of one part of one owner's range."""
    place_K = jnp.arange(unique_K.size, dtype=jnp.int32)
    part_K = unique_K // self._own_rows * rounds + unique_K % self._own_rows // self._width(rounds)
    new_K = jnp.concatenate([jnp.ones(1, bool), part_K[1:] != part_K[:-1]])
    begin_K = jax.lax.cummax(jnp.where(new_K, place_K, 0))
    count = jnp.max(jnp.where(unique_K < self.rows, place_K - begin_K + 1, 0))
    return jax.lax.pmax(count, AXES)

  def _width(self, rounds: Array) -> Array:
    return -(-self._own_rows // rounds)

  def _window(self, unique_K: Array, number: Array, rounds: Array) -> tuple[Array, Array]:
    """Of each owner n and place c of a round: which of the own rows it is, and its number at the owner.

    Unused places lie beyond the own rows (each another one, since scatters are told that places are distinct), and
    ask for a row beyond the owner's.
    """
    owner_n = jnp.arange(self._owners, dtype=jnp.int32) * self._own_rows
    inside = jnp.minimum(jnp.stack([number, number + 1]) * self._width(rounds), self._own_rows)
    begin_n, end_n = (jnp.searchsorted(unique_K, owner_n + edge).astype(jnp.int32) for edge in inside)
    place_nC = begin_n[:, None] + jnp.arange(self._capacity(unique_K.size), dtype=jnp.int32)
    used_nC = place_nC < end_n[:, None]
    row_nC = unique_K.at[place_nC].get(mode='clip') - owner_n[:, None]
    unused_nC = unique_K.size + jnp.arange(place_nC.size, dtype=jnp.int32).reshape(place_nC.shape)
    return jnp.where(used_nC, place_nC, unused_nC), jnp.where(used_nC, row_nC, self._own_rows)

  def _all_to_all(self, x: Array) -> Array:
    return jax.lax.all_to_all(x, self.axes, 0, 0, tiled=True)

  def _fetch(self, rows_GE: Array, unique_K: Array, rounds: Array) -> Array:
    """One device's side of `lookup`. Rows travel as they are stored."""
    if self._owners == 1:
      return as_float32(gather_rows(rows_GE, unique_K))

    def one(state: tuple[Array, Array]) -> tuple[Array, Array]:
      number, gathered_KE = state
      place_nC, row_nC = self._window(unique_K, number, rounds)
      asked_nC = self._all_to_all(row_nC)
      answers_nCE = self._all_to_all(rows_GE.at[asked_nC].get(mode='fill', fill_value=0))
      return number + 1, gathered_KE.at[place_nC].set(answers_nCE, mode='drop', unique_indices=True)

    gathered_KE = jnp.zeros((unique_K.size, rows_GE.shape[1]), rows_GE.dtype)
    gathered_KE = jax.lax.while_loop(lambda state: state[0] < rounds, one, (jnp.int32(0), gathered_KE))[1]
    return as_float32(gathered_KE)

  def _collect(self, unique_K: Array, grad_KE: Array, number: Array, rounds: Array) -> tuple[Array, Array]:
    """One round's rows and gradients at this owner, as distinct local rows and sums over devices and replicas."""
    if self._alone:
      return unique_K, grad_KE
    row_K, sent_KE = unique_K, grad_KE
    if self._owners > 1:
      place_nC, row_nC = self._window(unique_K, number, rounds)
      row_K = self._all_to_all(row_nC).reshape(-1)
      sent_KE = self._all_to_all(grad_KE.at[place_nC].get(mode='fill', fill_value=0)).reshape(row_K.size, -1)
    row_K, sums_KE = sum_duplicates(row_K, sent_KE)
    if not self._replica_axes:
      return row_K, sums_KE
    gathered = (jax.lax.all_gather(x, self._replica_axes, axis=0, tiled=True) for x in (row_K, sums_KE))
    return sum_duplicates(*gathered)


def fitted_capacity(tables: TableConfig, rows: int, axes: tuple[str, ...], ids: tuple[Array, ...]) -> int:
  """A capacity that serves ids like these in a single round: the largest request and a sixteenth, rounded up."""
  largest = int(jax.jit(Exchange(tables, rows, axes).largest_request)(ids))
  return -(-largest * 17 // 256) * 16


def read_vectors(
  rows_GE: Array, ids: tuple[Array, ...], tables: TableConfig, axes: tuple[str, ...] = AXES
) -> tuple[Array, ...]:
  """The ids' vectors outside training: [A, B, S * E] for each array of ids [A, B, 2] (see `Exchange`)."""
  exchange = Exchange(tables, rows_GE.shape[0], axes)
  plan = exchange.plan(ids)
  return exchange.vectors(exchange.lookup(rows_GE, plan), plan, ids)


# A batch array [A, B, ..]: examples over the batch axes, and the model axis, which would repeat them, splits B.
_SPLIT = P(BATCH_AXES, 'model')


def _axis_size(axes: tuple[str, ...]) -> int:
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in axes)


def _pad(ids: Array) -> Array:
  """Rounds [A, B, 2] up to what the mesh divides; the ids added are 0 and their vectors are never used."""
  short = [-size % _axis_size(axes) for size, axes in zip(ids.shape[:2], (BATCH_AXES, ('model',)), strict=True)]
  return ids if not any(short) else jnp.pad(ids, ((0, short[0]), (0, short[1]), (0, 0)))


def _shard_map(function, in_specs, out_specs):
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
