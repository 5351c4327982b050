"""Facts about slices `x[..., i, ...]` of values: what they are, whatever the data.

A fact is the number of an entry in a table. UNKNOWN: the slice depends on the data. A
number: it equals this number everywhere. Fixed: it is some array that does not depend
on the data. An expression: it depends on the data, but is the same array for all slices
that have this fact (behind a normalization removed channels all hold minus the mean).

What may be frozen depends on where a fact comes from, so it is part of it:

- `trained`: UNTRAINED, made of constants of the program and of masked entries alone
  (MASKED: of masked entries only); LEAVES, made of parameters too, all of which are
  removed with their unit, or of state; STAYS, made of a parameter that stays, which
  training may still change.
- `silenced`: a masked zero has cut the data off. Only where this holds is it the mask
  that has made a slice constant; a product of two learned matrices was one before, and
  so was what reads a zero that the program itself holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dagjax.jaxprs.program import Equation
from dagjax.types import PyTree

Array = np.ndarray
MASKED, UNTRAINED, LEAVES, STAYS = -1, 0, 1, 2
UNKNOWN, ZERO = 0, 1
ITSELF = -1  # an operand that has no such axis is its own slice
_EXACT = 2**53  # larger integers are no float64


class UnknownSliceError(Exception):
    """A removed slice is read of which nothing is known."""


class Fact(NamedTuple):
    """Of one value: for each axis the facts of its slices (None: all unknown).

    `whole` is the fact of the whole array.
    """

    axes: tuple[Array | None, ...]
    whole: int = UNKNOWN


class Entry(NamedTuple):
    """What a fact says: the number (NaN: another array), and where it comes from."""

    value: float
    trained: int = UNTRAINED
    silenced: bool = False


class Expression(NamedTuple):
    """How the common slice of an axis is made: by an equation, of operands' facts."""

    equation: Equation
    axis: int
    operands: tuple[int, ...]


class Table:
    """The entries of all facts, numbered; the first is UNKNOWN, the second ZERO."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._numbers: dict[Any, int] = {}
        self.expressions: dict[int, Expression] = {}
        self._columns: list[Array] = []
        self._number("unknown", Entry(math.nan))
        self.entry(0.0)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, fact: int) -> Entry:
        return self._entries[fact]

    def entry(
        self, value: float, trained: int = UNTRAINED, silenced: bool = False
    ) -> int:
        """The fact that a slice is a number, or with NaN an array, of this origin."""
        value = float(value)
        key = (None if math.isnan(value) else value, trained, silenced)
        return self._number(key, Entry(value, trained, silenced))

    def entries(
        self, values: Array, trained: Any = UNTRAINED, silenced: Any = False
    ) -> Array:
        """The facts of slices, one by one."""
        array = np.isnan(values)  # NaN is not equal to itself
        rows = (np.where(array, 0.0, values), trained, silenced, array)
        table = np.stack(np.broadcast_arrays(*rows), 1)
        kinds, back = np.unique(table, axis=0, return_inverse=True)
        facts = [
            self.entry(math.nan if unlike else value, int(origin), bool(cut_off))
            for value, origin, cut_off, unlike in kinds.tolist()
        ]
        return np.array(facts, int)[back.reshape(-1)]

    def expression(self, made: Expression, entry: Entry) -> int:
        """The fact that a slice is what an equation makes of facts."""
        number = self._number(made, entry)
        self.expressions[number] = made
        return number

    def _number(self, key: Any, entry: Entry) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self._entries)
            self._entries.append(entry)
        return self._numbers[key]

    # --- what facts say, of many at once ---------------------------------------------

    @property
    def columns(self) -> list[Array]:
        """Of all facts: values, origins, whether silenced, whether fixed."""
        if not self._columns or len(self._columns[0]) != len(self._entries):
            columns = [np.array(c) for c in zip(*self._entries, strict=True)]
            fixed = np.ones(len(self._entries), bool)
            fixed[[UNKNOWN, *self.expressions]] = False
            self._columns = [*columns, fixed]
        return self._columns

    def values(self, facts: Any) -> Any:
        """The numbers that slices equal, NaN where there is none."""
        return self.columns[0][facts]

    def is_zero(self, facts: Any) -> Any:
        """Zero for good: by a mask or the program, not by what is trained."""
        return (self.columns[0][facts] == 0) & (self.columns[1][facts] <= UNTRAINED)

    def is_number(self, facts: Any) -> Any:
        """Whether slices equal numbers."""
        return ~np.isnan(self.columns[0][facts])

    def is_fixed(self, facts: Any) -> Any:
        """Whether slices do not depend on the data."""
        return self.columns[3][facts]

    def may_freeze(self, *facts: PyTree) -> Array:
        """Whether what is made of such slices may be kept as it is now.

        Untrained things may. Of trained ones only what goes with a unit that the mask
        has cut off from the data: the constant that is left of the unit.
        """
        trained = np.maximum.reduce([self.columns[1][f] for f in facts])
        silenced = np.logical_or.reduce([self.columns[2][f] for f in facts])
        return (trained <= UNTRAINED) | ((trained == LEAVES) & silenced)

    def is_constant(self, facts: Any) -> Array:
        """Whether slices are numbers that may be frozen."""
        return self.is_number(facts) & self.may_freeze(facts)

    def origin(self, facts: Iterable[int]) -> tuple[int, bool]:
        """Where a function of several slices comes from."""
        rows = [self._entries[f] for f in facts if f >= 0]
        return max((r.trained for r in rows), default=UNTRAINED), any(
            r.silenced for r in rows
        )

    def mixed(self, facts: PyTree) -> int:
        """One fact for slices side by side; UNKNOWN if unlike and not fixed."""
        kinds = np.unique(facts)
        if len(kinds) == 1:
            return int(kinds[0])
        if not len(kinds) or not self.is_fixed(kinds).all():
            return UNKNOWN
        values, trained, silenced, _ = (column[kinds] for column in self.columns)
        alike = (values == values[0]).all()
        value = float(values[0]) if alike else math.nan
        return self.entry(value, int(trained.max()), bool(silenced.all()))

    def met(self, one: Array, two: Array) -> Array:
        """What holds of slices put together of two, or that are one or the other."""
        if (one == two).all():
            return one
        pairs, back = np.unique(np.stack([one, two], 1), axis=0, return_inverse=True)
        return np.array([self.mixed(p) for p in pairs], int)[back.reshape(-1)]

    def numbers(self, facts: Any) -> Any:
        """Facts that are numbers, all others forgotten."""
        return np.where(self.is_number(facts), facts, UNKNOWN)

    def still(self, facts: Any) -> Any:
        """Facts without expressions: those belong to the value that they are of."""
        if facts is None or not self.expressions:
            return facts
        return np.where(self.is_fixed(facts), facts, UNKNOWN)


def fact_of(table: Table, array: Array) -> Fact:
    """The facts of an array that the program holds: what its slices equal.

    Args:
        table: Where the facts are entered.
        array: A constant of the program, of any type.
    """
    if not jnp.issubdtype(array.dtype, jnp.number) or not np.size(array):
        return Fact((None,) * np.ndim(array), table.entry(math.nan))
    x = np.asarray(array)
    x = x.astype(np.float32) if x.dtype.kind == "V" else x  # bfloat16 and its kin
    axes = []
    for axis, n in enumerate(x.shape):
        others = tuple(d for d in range(x.ndim) if d != axis)
        axes.append(_uniform(table, x, others) if n > 1 else None)
    return Fact(tuple(axes), int(_uniform(table, x, None)))


def _uniform(table: Table, x: Array, axes: Any) -> Any:
    """Of slices that equal one number this number."""
    low, high = (x, x) if axes == () else (x.min(axes), x.max(axes))
    if x.dtype.kind == "c":
        return np.where(
            low == high, table.entries(_zero_or_nan(low)), table.entry(np.nan)
        )
    return table.entries(np.atleast_1d(_numbers(low, high))).reshape(np.shape(low))


def _numbers(low: Array, high: Array) -> Array:
    return np.where((low == high) & _is_exact(low), low, np.nan).astype(np.float64)


def _is_exact(x: Array) -> Array:
    """Whether numbers are float64 too."""
    return np.abs(x.astype(np.float64)) < _EXACT if x.dtype.kind in "iu" else x == x


def _zero_or_nan(x: Array) -> Array:
    return np.where(np.atleast_1d(x) == 0, 0.0, np.nan)


def literal_fact(table: Table, atom: Any) -> Fact:
    """The fact of a number written into the program."""
    x = np.asarray(atom.val)
    if x.dtype == jnp.bfloat16:
        x = x.astype(np.float32)
    if x.ndim or x.dtype.kind not in "biuf" or not _is_exact(x):
        return Fact((None,) * x.ndim, table.entry(math.nan))
    return Fact((), table.entry(float(x)))


def equal(one: Fact, two: Fact) -> bool:
    """Whether two facts say the same."""
    return one.whole == two.whole and same_axes(one.axes, two.axes)


def same_axes(one: Sequence[Array | None], two: Sequence[Array | None]) -> bool:
    """Whether the same is said of all axes; None says nothing."""
    return all(
        a is b or (a is not None and b is not None and np.array_equal(a, b))
        for a, b in zip(one, two, strict=True)
    )


def kinds_of(columns: Sequence[Array], count: int) -> tuple[list[tuple[int, ...]], Any]:
    """The different columns of facts below `count`, and where each of them stands."""
    if not columns[0].size:
        return [], columns[0].astype(int)
    code = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        code = code * (count + 1) + column + 1
    if (code == code[0]).all():
        first, back = np.zeros(1, int), np.zeros(len(code), int)
    else:
        _, first, back = np.unique(code, return_index=True, return_inverse=True)
    return [*zip(*(c[first].tolist() for c in columns), strict=True)], back
