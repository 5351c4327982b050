"""Parameters and operations of a network as functions of what is cut out of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from dagjax.compaction.channels.coupling import Channels
from dagjax.compaction.channels.labels import Array
from dagjax.jaxprs.primitives import primitives_with
from dagjax.jaxprs.program import Equation, Program
from dagjax.types import PyTree

CONTRACTIONS = primitives_with(kind="contraction")


@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """A sum of products of kept counts: `sum_t coefficient_t prod_d kept(t, d)`.

    Args:
        coefficients: `[terms]`.
        dims: `[terms, factors]`, which axis each factor counts; -1 for none.
        axes: The classes of the indices of each axis.
        steps: The step that each term belongs to, None for a parameter.
    """

    coefficients: Array
    dims: Array
    axes: list[Array]
    steps: list[PyTree]

    def kept(self, gone: Array) -> Array:
        """`[axes]`: how many indices are left, and a 1 for the factor -1."""
        counts = [len(of) - int(gone[of].sum()) for of in self.axes]
        return np.array([*counts, 1], float)

    def values(self, gone: Array) -> Array:
        """`[terms]` when the classes `gone` are cut out."""
        return self.coefficients * self.kept(gone)[self.dims].prod(1)

    def whole(self) -> Array:
        """`[terms]` when nothing is cut out."""
        sizes = np.array([*map(len, self.axes), 1], float)
        return self.coefficients * sizes[self.dims].prod(1)

    def saved_by(self, closure: Any, gone: Array) -> Array:
        """`[units]`: what each unit saves when it alone is cut out besides.

        Args:
            closure: `[units, classes]`, a sparse matrix: what goes with each.
            gone: `[classes]`, what is cut anyway, and goes with none of them.
        """
        saved, counts = np.zeros(closure.shape[0]), self._counts(closure)
        columns = np.split(counts.indices, counts.indptr[1:-1])
        cut = np.split(counts.data, counts.indptr[1:-1])
        sizes, whole = self.kept(gone), self.values(gone)
        for value, dims in zip(whole, self.dims, strict=True):
            axes = [axis for axis in dims if axis >= 0]
            touched = _united([columns[axis] for axis in axes])
            left = np.ones(len(touched))
            for axis in axes:
                rows = np.searchsorted(touched, columns[axis])
                left[rows] *= 1 - cut[axis] / sizes[axis]
            saved[touched] += value * (1 - left)
        return np.round(saved)

    def _counts(self, closure: Any) -> Any:
        """`[units, axes]`, by column: how many indices of each axis go with a unit."""
        from scipy import sparse

        of = np.concatenate([np.zeros(0, int), *self.axes])
        axis = np.repeat(np.arange(len(self.axes)), [len(a) for a in self.axes])
        ones = np.ones(len(of))
        shape = (closure.shape[1], len(self.axes))
        return (closure @ sparse.csr_matrix((ones, (of, axis)), shape)).tocsc()


def _united(sets: list[Array]) -> Array:
    return functools.reduce(np.union1d, sets, np.zeros(0, int))


class _Collector:
    """Terms, with equal axes met once."""

    def __init__(self, channels: Channels):
        self.channels, self.places = channels, {}
        self.axes: list[Array] = []
        self.rows: list[tuple[float, list[int], Any]] = []

    def add(
        self, coefficient: float, ends: list[tuple[Any, int]], step: Equation | None
    ) -> None:
        """One product: `coefficient` times the lengths of some axes of values."""
        dims = []
        for var, axis in ends:
            of = self.channels.classes.of[self.channels.at[var][axis]]
            if (of == self.channels.classes.pinned).all():
                coefficient *= len(of)
                continue
            key = of.tobytes()
            if key not in self.places:
                self.places[key] = len(self.axes)
                self.axes.append(of)
            dims.append(self.places[key])
        self.rows.append((coefficient, dims, step))

    def terms(self) -> Terms:
        width = max((len(dims) for _, dims, _ in self.rows), default=0)
        padded = [[*dims, *[-1] * (width - len(dims))] for _, dims, _ in self.rows]
        table = np.array(padded, int).reshape(len(self.rows), width)
        coefficients = np.array([c for c, _, _ in self.rows], float)
        return Terms(coefficients, table, self.axes, [s for *_, s in self.rows])


def parameters(channels: Channels, count: int) -> Terms:
    """The entries of the first `count` leaves."""
    found = _Collector(channels)
    for var in channels.body.invars[:count]:
        found.add(1, [(var, d) for d in range(len(var.aval.shape))], None)
    return found.terms()


def operations(channels: Channels) -> Terms:
    """Floating-point operations of products and convolutions, a multiply-add as two.

    Of a condition those of the branch that costs most, of a `while` those of one pass.
    """
    collector = _Collector(channels)
    for equation, times in _contractions(channels.body, 1):
        (out,) = equation.eqn.outvars
        ends = [(out, d) for d in range(out.aval.ndim)] + _summed(equation)
        collector.add(2.0 * times, ends, equation)
    return collector.terms()


def flops_of(program: Program) -> float:
    """The same of a whole program; NaN where it is not known (`while`, a file)."""
    total = 0.0
    for equation in program.equations:
        inner = [flops_of(body) for body in equation.bodies]
        if equation.name in CONTRACTIONS:
            ends = _summed(equation)
            sizes = [v.aval.shape[a] for v, a in ends]
            total += (
                2.0 * math.prod(equation.eqn.outvars[0].aval.shape) * math.prod(sizes)
            )
        elif equation.name == "bcsr_dot_general":
            entries, columns = (
                equation.eqn.invars[0],
                equation.eqn.invars[-1].aval.shape,
            )
            total += 2.0 * entries.aval.size * math.prod(columns[1:])
        elif equation.name == "call_exported":
            total += math.nan
        elif equation.name == "while":
            total += math.nan if any(inner) else 0.0
        else:
            total += _passes(equation) * max(inner, default=0.0)
    return total


def _passes(equation: Equation) -> int:
    return equation.eqn.params["length"] if equation.name == "scan" else 1


def _summed(equation: Equation) -> list[tuple[Any, int]]:
    """The axes that are summed for one entry of the output."""
    eqn, params = equation.eqn, equation.eqn.params
    if equation.name == "conv_general_dilated":
        _, *rest = params["dimension_numbers"].rhs_spec
        return [(eqn.invars[1], a) for a in rest]
    if equation.name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    else:
        numbers = params["dimension_numbers"]
    (left, _), _ = numbers
    return [(eqn.invars[0], a) for a in left]


def _contractions(body: Program, times: int) -> Iterator[tuple[Equation, int]]:
    for equation in body.equations:
        if equation.name in CONTRACTIONS:
            yield equation, times
        bodies = equation.bodies
        if equation.name == "cond":
            bodies = (max(bodies, key=flops_of),)
        for inner in bodies:
            yield from _contractions(inner, times * _passes(equation))
