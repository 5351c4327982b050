"""A program cut at its nodes: every piece between them is an arc, a sum or a merge."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Set
from typing import NamedTuple

from jax.extend import core

from dagjax.graph.tracing.flow import Flow, Value
from dagjax.jaxprs.primitives import is_sum
from dagjax.jaxprs.program import Equation
from dagjax.jaxprs.versions import Atom


class Choice(NamedTuple):
    """Which values are nodes, and where branches meet."""

    nodes: Set[Value]  # with the inputs and the outputs
    meets: Set[Value] = frozenset()  # nodes, even if all branches leave one node
    inner: Set[Value] = frozenset()  # that are no nodes, being part of a merge


@dataclasses.dataclass(frozen=True)
class Piece:
    """What becomes an arc: the equations that make `end` of `source`."""

    source: Value  # the node that it reads
    target: Value  # the node that it adds to
    end: Value  # the value that it delivers
    negated: bool = False  # whether the sum subtracts it
    port: int | None = None  # of a merge
    copy: int = 0  # how many pieces of a sum were the same before


class Join(NamedTuple):
    """What becomes a merge: the equations that make a node of its ports."""

    ports: tuple[Value, ...]
    equations: tuple[Equation, ...]


@dataclasses.dataclass(frozen=True)
class Cut:
    """Pieces and merges of a program, in order of their targets."""

    flow: Flow
    choice: Choice
    nodes: list[Value]
    pieces: list[Piece]
    merges: dict[Value, Join]

    def work(self, piece: Piece) -> list[Equation]:
        """The equations of a piece."""
        return self.flow.cone([piece.end], {piece.source})


def cut(flow: Flow, choice: Choice) -> Cut:
    """Cut a program at its nodes.

    A node that is made of one other node is the end of one arc. One that is made of
    several is a sum if it adds them up, and else a merge of the largest parts that are
    made of one node each.
    """
    cutter = _Cutter(flow, choice)
    waiting, done = [*flow.outputs], set()
    while waiting:
        value = waiting.pop()
        if value not in done:
            done.add(value)
            waiting += cutter.add(value)
    order = sorted(done | {*flow.inputs}, key=flow.rank.__getitem__)
    pieces = sorted(cutter.pieces, key=lambda p: flow.rank[p.target])  # ports stay
    merges = {v: cutter.merges[v] for v in order if v in cutter.merges}
    return Cut(flow, choice, order, pieces, merges)


class _Cutter:
    def __init__(self, flow: Flow, choice: Choice):
        self.flow, self.choice = flow, choice
        self.pieces: list[Piece] = []
        self.merges: dict[Value, Join] = {}
        self._sources: dict[Value, frozenset[Value]] = {}
        self._mixed: set[Value] = set()  # in which branches have met already
        for equation, operands in flow.operands.items():
            below = functools.reduce(frozenset.union, map(self._below, operands))
            results = equation.eqn.outvars
            self._sources |= dict.fromkeys(results, below)
            met = len(below) > 1 or any(map(self._is_mixed, operands))
            self._mixed |= {v for v in results if met or v in choice.inner}

    def add(self, value: Value) -> list[Value]:
        """Cut what leads into a node; return the nodes before it."""
        if value in self.flow.inputs:
            return []
        if value not in self._mixed and value not in self.choice.meets:
            (source,) = self._sources[value]
            pieces = [Piece(source, value, value)]
        elif terms := self._terms(value):
            pieces = [
                Piece(self._at(v), value, v, minus, copy=terms[:i].count((v, minus)))
                for i, (v, minus) in enumerate(terms)
            ]
        else:
            self.merges[value] = join = self._join(value)
            ends = enumerate(join.ports)
            pieces = [Piece(self._at(v), value, v, port=i) for i, v in ends]
        self.pieces += pieces
        return [piece.source for piece in pieces]

    def _at(self, value: Value) -> Value:
        """The one node that a value is made of."""
        (source,) = self._below(value)
        return source

    def _below(self, value: Value) -> frozenset[Value]:
        """The nodes that a value is made of, itself if it is one."""
        if value in self.choice.nodes:
            return frozenset((value,))
        return self._sources[value]

    def _is_mixed(self, value: Value) -> bool:
        return value in self._mixed and value not in self.choice.nodes

    def _terms(self, value: Value) -> list[tuple[Value, bool]]:
        """What a sum adds up, and whether with a minus; nothing if it is no sum."""
        terms, waiting = [], [(value, False)]
        while waiting:
            term, minus = waiting.pop()
            if term is not value and not self._is_mixed(term):
                terms.append((term, minus))
                continue
            signs = self._signs(self.flow.maker[term])
            if not signs or (term is not value and len(self.flow.users[term]) > 1):
                return []
            operands = self.flow.maker[term].eqn.invars
            parts = zip(operands, (sign != minus for sign in signs), strict=True)
            waiting += reversed([*parts])
        return terms

    def _signs(self, equation: Equation) -> tuple[bool, ...]:
        """Which operands a sum subtracts; nothing if an equation is no sum of data."""
        if equation.name == "neg":
            return (True,)
        sums = is_sum(equation) and len(self.flow.operands[equation]) == 2
        return (False, equation.name == "sub") if sums else ()

    def _join(self, value: Value) -> Join:
        """The equations of a merge, and what enters them from one node each."""
        region: dict[Equation, None] = {}
        waiting = [value]
        while waiting:
            equation = self.flow.maker[waiting.pop()]
            if equation not in region:
                region[equation] = None
                operands = self.flow.operands[equation]
                waiting += filter(self._is_mixed, operands)
        order = sorted(region, key=self.flow.place.__getitem__)
        entering = dict.fromkeys(
            atom
            for equation in order
            for atom in equation.eqn.invars
            if self._enters(atom)
        )
        every = self.flow.cone([value], {*entering})  # with what no data goes into
        return Join(tuple(entering), tuple(every))

    def _enters(self, atom: Atom) -> bool:
        data = not isinstance(atom, core.Literal) and atom in self.flow.data
        return data and not self._is_mixed(atom)
