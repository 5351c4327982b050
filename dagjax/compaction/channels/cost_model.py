"""Parameters and operations of a network as functions of what is cut out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from dagjax.compaction.channels.coupling import Channels
from dagjax.compaction.channels.labels import Array
from dagjax.jaxprs.program import Equation, Program


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
    steps: list[Any]

    def kept(self, gone: Array) -> Array:
        """`[axes]`: how many indices are left, and a 1 for the factor -1."""
        counts = [len(of) - int(gone[of].sum()) for of in self.axes]
        return np.array([*counts, 1], float)

    def values(self, gone: Array) -> Array:
        """`[terms]` when the classes `gone` are cut out."""
        return self.coefficients * self.kept(gone)[self.dims].prod(1)

    def saved(self, gone: Array) -> Array:
        """`[classes]`: what one more of a class saves, to first order."""
        found, counts = np.zeros(len(gone)), self.kept(gone)[self.dims]
        for place in range(self.dims.shape[1]):
            others = np.delete(counts, place, axis=1).prod(1) * self.coefficients
            each = np.zeros(len(self.axes) + 1)
            np.add.at(each, self.dims[:, place], others)
            for of, weight in zip(self.axes, each, strict=False):
                np.add.at(found, of, weight)
        return found


class _Collector:
    """Terms, with equal axes met once."""

    def __init__(self, channels: Channels):
        self.channels, self.places = channels, {}
        self.axes: list[Array] = []
        self.rows: list[tuple[float, list[int], Any]] = []

    def add(self, coefficient: float, ends: list[tuple[Any, int]], step: Any) -> None:
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
    """Floating-point operations of products and convolutions, a multiply-add as two."""
    found = _Collector(channels)
    for step, times in _contractions(channels.body, 1):
        ends = [(step.eqn.outvars[0], d) for d in range(_rank(step.eqn.outvars[0]))]
        ends += _summed(channels, step)
        found.add(2.0 * times, ends, step)
    return found.terms()


def _rank(var: Any) -> int:
    return len(var.aval.shape)


def _summed(channels: Channels, step: Equation) -> list[tuple[Any, int]]:
    """The axes that are summed for one entry of the output."""
    if step.name == "dot_general":
        pairs = channels.wires[step].contracted
        return [(step.eqn.invars[i], a) for (i, a), _ in pairs]
    out, *rest = step.eqn.params["dimension_numbers"].rhs_spec
    del out
    return [(step.eqn.invars[1], a) for a in rest]


def _contractions(body: Program, times: int) -> Iterator[tuple[Equation, int]]:
    for step in body.equations:
        if step.name in ("dot_general", "conv_general_dilated"):
            yield step, times
        length = step.eqn.params.get("length", 1) if step.name == "scan" else 1
        for inner in step.bodies:
            yield from _contractions(inner, times * length)
