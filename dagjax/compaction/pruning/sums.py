"""The sums of a program in which products with parameters meet."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dagjax.compaction.channels.labels import Array
from dagjax.compaction.pruning.features import as_kernel, layout
from dagjax.jaxprs.program import CALLS, Program, is_literal
from dagjax.jaxprs.versions import Atom, Aval, Eqn, Var
from dagjax.types import PyTree

CONTRACTIONS = ("dot_general", "conv_general_dilated")
_SUMS = {"add": 1, "add_any": 1, "sub": -1}  # the sign of the second operand
_SCALES = {"mul": (1, 0), "div": (1,)}  # which operand may be the factor
_MOVES = ("reshape", "transpose", "squeeze", "expand_dims", "convert_element_type")


def reads(eqn: Eqn) -> list[PyTree]:
    """The variables that an equation reads."""
    return [v for v in eqn.invars if not is_literal(v)]


def inlined(body: Program, names: dict[Any, Any], consts: dict[Any, Any]) -> Any:
    """Equations in order, those of calls with derivative rules among them."""
    here = lambda atom: atom if is_literal(atom) else names.get(atom, atom)
    consts |= body.consts
    for step in body.equations:
        operands = [here(atom) for atom in step.eqn.invars]
        if step.name in CALLS:
            inner = step.bodies[0]
            names |= dict(zip(inner.invars, operands, strict=True))
            yield from inlined(inner, names, consts)
            results = [here(atom) for atom in inner.outvars]
            names |= dict(zip(step.eqn.outvars, results, strict=True))
        else:
            yield step.eqn.replace(invars=operands)


class Term(NamedTuple):
    """A product in a sum: `sign * scale * (features @ leaf[where])`.

    Args:
        place: Of its equation.
        side: Which operand is the kernel.
        leaf: The parameter.
        where: `[G, K, M]`, flat places in it.
        sign: 1 or -1.
        factors: Pairs of a value, one number for each column, and its power.
    """

    place: int
    side: int
    leaf: int
    where: Array
    sign: int
    factors: tuple[tuple[Atom, int], ...]


class Sum(NamedTuple):
    """A sum: its products, and vectors that are added.

    Args:
        places: The equations to evaluate again when its parameters have changed.
        terms: Its products; one, or all of one group each.
        rows: The axes of its value along which rows of features lie.
        columns: The others.
        shifts: `(leaf, [columns] places in it, sign, factors)`.
    """

    places: tuple[int, ...]
    terms: tuple[Term, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    shifts: tuple[tuple[int, Array, int, Any], ...]


class Sums:
    """Finds the sums of a program."""

    def __init__(
        self,
        steps: list[Eqn],
        invars: tuple[Var, ...],
        outvars: list[Atom],
        consts: dict[Var, Array],
        trained: int,
    ):
        self.steps, self.trained = steps, trained
        self.leaf = {v: i for i, v in enumerate(invars)}
        self.maker = {v: i for i, e in enumerate(steps) for v in e.outvars}
        self.readers: dict[Any, list[int]] = {}
        for place, eqn in enumerate(steps):
            for atom in eqn.invars:
                if not is_literal(atom):
                    self.readers.setdefault(atom, []).append(place)
        for atom in outvars:
            if not is_literal(atom):
                self.readers.setdefault(atom, []).append(len(steps))
        self.fixed = {*invars, *consts}  # what does not depend on the data
        for eqn in steps:
            if all(v in self.fixed for v in reads(eqn)):
                self.fixed.update(eqn.outvars)

    def all(self) -> dict[int, Sum]:
        """`{place of the last equation: sum}`."""
        found: dict[int, Any] = {}
        for place, eqn in enumerate(self.steps):
            if sides := self.sides(eqn):
                axes = layout(eqn, sides[0])
                found.setdefault(self._end(place, axes[0]), axes)
        return {end: self._sum(end, *axes) for end, axes in found.items()}

    def sides(self, eqn: Eqn) -> list[int]:
        """Which operand of a product is a parameter, if one is."""
        name = eqn.primitive.name
        if name not in CONTRACTIONS:
            return []
        sides = (0, 1) if name == "dot_general" else (1,)
        found = [i for i in sides if self._chain(eqn.invars[i], self.trained)]
        plain = name == "dot_general" or eqn.params["batch_group_count"] == 1
        return found if len(found) == 1 and plain else []

    def _once(self, atom: Atom) -> bool:
        return len(self.readers.get(atom, ())) == 1

    def _end(self, place: int, rows: tuple[int, ...]) -> int:
        """Where the sum ends that a product is in."""
        var = self.steps[place].outvars[0]
        while self._once(var) and (after := self.readers[var][0]) < len(self.steps):
            eqn = self.steps[after]
            adds = eqn.primitive.name in _SUMS
            factor = self._factor(eqn, rows)
            if eqn.outvars[0].aval != var.aval or not (adds or factor is not None):
                break
            place, var = after, eqn.outvars[0]
        return place

    def _factor(self, eqn: Eqn, rows: tuple[int, ...]) -> int | None:
        """Which operand is one number for each column, that depends on no data."""
        for side in _SCALES.get(eqn.primitive.name, ()):
            atom = eqn.invars[side]
            shape = atom.aval.shape
            alike = not shape or all(shape[d] == 1 for d in rows)
            if alike and (is_literal(atom) or atom in self.fixed):
                return side
        return None

    def _chain(self, atom: Atom, count: int, more: tuple[str, ...] = ()) -> PyTree:
        """`(leaf, places)` if an operand is a leaf that is moved and read once."""
        places: list[int] = []
        while not is_literal(atom) and self._once(atom):
            if atom in self.leaf:
                return (self.leaf[atom], places) if self.leaf[atom] < count else None
            place = self.maker.get(atom)
            if place is None or self.steps[place].primitive.name not in _MOVES + more:
                return None
            places.insert(0, place)
            atom = self.steps[place].invars[0]
        return None

    def _where(self, leaf: Aval, places: list[int]) -> Array:
        """For each entry of the operand its flat place in the leaf."""
        found = np.arange(leaf.size).reshape(leaf.shape)
        for eqn in (self.steps[place] for place in places):
            if eqn.primitive.name == "transpose":
                found = found.transpose(eqn.params["permutation"])
            elif eqn.primitive.name == "broadcast_in_dim":
                axes = eqn.params["broadcast_dimensions"]
                shape = [1] * len(eqn.params["shape"])
                for axis, size in zip(axes, found.shape, strict=True):
                    shape[axis] = size
                found = np.broadcast_to(found.reshape(shape), eqn.params["shape"])
            else:
                found = found.reshape(eqn.outvars[0].aval.shape)
        return found

    def _sum(self, end: int, rows: tuple[int, ...], columns: PyTree) -> Sum:
        """The sum that ends here: from its end back through additions."""
        var = self.steps[end].outvars[0]
        places, terms, shifts, open_ = [], [], [], [(var, 1, ())]
        while open_:
            atom, sign, factors = open_.pop()
            place = None if is_literal(atom) else self.maker.get(atom)
            inner = atom is var or (self._once(atom) and atom.aval == var.aval)
            if place is not None and inner:
                eqn = self.steps[place]
                more = self._operands(eqn, sign, factors, rows)
                if more or self.sides(eqn):
                    places.append(place)
                    open_ += more
                    terms += [] if more else [(place, sign, factors)]
                    continue
            chain = self._chain(atom, len(self.leaf), ("broadcast_in_dim",))
            if chain is not None:
                shifts.append((*chain, sign, factors))
        kept, moved = self._terms(sorted(terms, key=lambda t: t[0]), rows, columns)
        added, more = self._shifts(shifts, var.aval.shape, rows, columns)
        whole = tuple(sorted({*places, *moved, *more}))
        return Sum(whole, kept, rows, columns, added)

    def _operands(
        self,
        eqn: Eqn,
        sign: int,
        factors: tuple[tuple[Atom, int], ...],
        rows: tuple[int, ...],
    ) -> list[PyTree]:
        """The summands of an addition, or what is scaled."""
        if (second := _SUMS.get(eqn.primitive.name)) is not None:
            one, two = eqn.invars
            return [(one, sign, factors), (two, sign * second, factors)]
        side = self._factor(eqn, rows)
        if side is None:
            return []
        power = 1 if eqn.primitive.name == "mul" else -1
        return [(eqn.invars[1 - side], sign, (*factors, (eqn.invars[side], power)))]

    def _terms(
        self, terms: PyTree, rows: tuple[int, ...], columns: PyTree
    ) -> tuple[Any, set[int]]:
        """The products of one layout; one with several groups stands alone."""
        found, places = [], set()
        for place, sign, factors in terms:
            eqn = self.steps[place]
            (side,) = self.sides(eqn)
            leaf, moved = self._chain(eqn.invars[side], self.trained)
            kernel = as_kernel(eqn, side, self._where(self._aval(leaf), moved))
            alone = len(kernel) > 1
            if layout(eqn, side) == (rows, columns) and not (alone and found):
                found.append(Term(place, side, leaf, kernel, sign, factors))
                places.update(moved)
                if alone:
                    break
        return (*found,), places

    def _shifts(
        self, shifts: PyTree, shape: tuple[int, ...], rows: PyTree, columns: PyTree
    ) -> PyTree:
        """The vectors that are added, the last one first, and what makes them."""
        found, places = [], set()
        for leaf, moved, sign, factors in sorted(shifts, key=lambda s: len(s[3])):
            where = np.broadcast_to(self._where(self._aval(leaf), moved), shape)
            where = where.transpose(rows + columns)
            thin = zip(where.strides, where.shape, rows, strict=False)
            if all(stride == 0 or size == 1 for stride, size, _ in thin):
                vector = where[(0,) * len(rows)].ravel()
                found.append((leaf, vector, sign, factors))
                places.update(moved)
        return (*found,), places

    def _aval(self, leaf: int) -> Aval:
        return [*self.leaf][leaf].aval
