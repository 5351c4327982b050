"""Wires: where the indices of an output's axis come from, and the table of the rules.

A rule gives the wiring of an equation. It names every parameter of its primitive: those
that it reads, and those that do not matter to it. An equation with a parameter that its
rule does not name is pinned, so that a new version of JAX cannot change what a rule
means without notice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dagjax.jaxprs.versions import Atom, Eqn

End = tuple[int, int]  # (operand, axis)


class Same(NamedTuple):
    """Index by index the same as in these axes of operands."""

    sources: tuple[End, ...]


class Joined(NamedTuple):
    """Pieces one after the other: `(operand, axis, index)`, or a number of new ones."""

    parts: tuple[tuple[int, int, Any] | int, ...]


class New(NamedTuple):
    """Indices of its own; every slice is the same array (a broadcast)."""


class Pinned(NamedTuple):
    """Indices that mix, or of which nothing is known: never cut."""


Wire = Same | Joined | New | Pinned
NEW, PINNED = New(), Pinned()


class Ref(NamedTuple):
    """An axis: of an operand ("in"), of an output ("out"), or none's ("new")."""

    kind: str
    place: int
    axis: int  # of "new" its size


class Product(NamedTuple):
    """Row-major product: a flat index is gone if one of its factors is."""

    flat: Ref
    factors: tuple[Ref, ...]


@dataclasses.dataclass(frozen=True)
class Wiring:
    """What becomes of the axes of an equation's operands.

    Args:
        outputs: For each output a wire for each axis.
        contracted: Pairs of axes whose products are summed.
        reduced: Axes over which entries are summed, or the largest is taken.
        pinned: Axes that cannot be cut.
        equal: Axes whose indices belong together.
        products: Axes that are products of others.
        known: False for a primitive without a rule.
    """

    outputs: tuple[tuple[Wire, ...], ...]
    contracted: tuple[tuple[End, End], ...] = ()
    reduced: tuple[End, ...] = ()
    pinned: tuple[End, ...] = ()
    equal: tuple[tuple[Ref, Ref], ...] = ()
    products: tuple[Product, ...] = ()
    known: bool = True


Values = Callable[[Atom], "np.ndarray | None"]  # what a constant operand holds


class Rule(NamedTuple):
    """How a primitive is wired.

    Args:
        wiring: Of an equation, and of the values of its constant operands.
        parameters: Those that the rule reads, or knows not to matter.
    """

    wiring: Callable[[Eqn, Values], Wiring]
    parameters: frozenset[str]


RULES: dict[str, Rule] = {}


def rule(names: str, parameters: str = "") -> Callable[[Any], Any]:
    """Enter a function into the table: the wiring of an equation.

    Args:
        names: Primitives, apart by spaces.
        parameters: All parameters that these have and that the function has considered.
    """

    def enter(fn: Callable[[Eqn], Wiring]) -> Callable[[Any], Wiring]:
        made = Rule(lambda eqn, values: fn(eqn), frozenset(parameters.split()))
        RULES.update(dict.fromkeys(names.split(), made))
        return fn

    return enter


def rule_with_values(names: str, parameters: str = "") -> Callable[[Any], Any]:
    """As `rule`, of a function that looks at constant operands too."""

    def enter(fn: Callable[[Eqn, Values], Wiring]) -> Callable[[Any, Values], Wiring]:
        made = Rule(fn, frozenset(parameters.split()))
        RULES.update(dict.fromkeys(names.split(), made))
        return fn

    return enter


def shape_of(eqn: Eqn, operand: int = 0) -> tuple[int, ...]:
    """The shape of an operand."""
    return eqn.invars[operand].aval.shape


def out_shape(eqn: Eqn) -> tuple[int, ...]:
    """The shape of the first result."""
    return eqn.outvars[0].aval.shape


def pinned(eqn: Eqn, known: bool = True) -> Wiring:
    """The wiring of an equation of which nothing can be cut.

    Args:
        eqn: The equation.
        known: False if its primitive has no rule.
    """
    ends = [(i, a) for i, v in enumerate(eqn.invars) for a in range(_rank(v))]
    outputs = tuple((PINNED,) * _rank(v) for v in eqn.outvars)
    return Wiring(outputs, pinned=tuple(ends), known=known)


def elementwise(eqn: Eqn) -> Wiring:
    """Axis by axis the same as in all operands that have it."""
    shape = out_shape(eqn)
    shapes = [(i, v.aval.shape) for i, v in enumerate(eqn.invars)]
    wires = tuple(
        Same(tuple((i, d) for i, s in shapes if len(s) == len(shape) and s[d] == n))
        for d, n in enumerate(shape)
    )
    return Wiring((wires,) * len(eqn.outvars))


def passing(whole: list[bool]) -> tuple[tuple[Wire, ...], tuple[End, ...]]:
    """Wires of axes that are taken whole; all others are pinned."""
    wires = tuple(Same(((0, a),)) if w else PINNED for a, w in enumerate(whole))
    return wires, tuple((0, a) for a, w in enumerate(whole) if not w)


def _rank(var: Atom) -> int:
    return len(getattr(var.aval, "shape", ()))
