"""Which values depend on the inputs, what makes them and what uses them."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Any

from jax.extend import core

from dagjax.jaxprs.program import Equation, Program

Value = Any  # a variable of the program


class Flow:
    """The data that flows through a program.

    The inputs are variables that hold data, the leaves those of parameters, state,
    keys and constants, the outputs those of the result without the new state. `rank`
    numbers all variables in the order in which they are made.
    """

    def __init__(
        self,
        program: Program,
        inputs: Iterable[Value],
        leaves: Iterable[Value],
        outputs: Iterable[Value],
    ):
        self.program, self.inputs = program, tuple(inputs)
        self.leaves, self._outputs = frozenset(leaves), tuple(outputs)
        self.maker: dict[Value, Equation] = {}
        self.place: dict[Equation, int] = {}
        self.operands: dict[Equation, tuple[Value, ...]] = {}
        data = set(self.inputs)
        self.rank: dict[Value, int] = {v: i for i, v in enumerate(program.invars)}
        self.tainted = set(self.leaves)  # made of parameters, but not of data
        for place, equation in enumerate(program.equations):
            self.place[equation] = place
            reads = equation.reads
            operands = tuple(dict.fromkeys(v for v in reads if v in data))
            for var in equation.eqn.outvars:
                self.maker[var] = equation
                self.rank[var] = len(self.rank)
            if operands:
                self.operands[equation] = operands
                data.update(equation.eqn.outvars)
            elif any(v in self.tainted for v in reads):
                self.tainted.update(equation.eqn.outvars)
        self.data = data

    @functools.cached_property
    def users(self) -> dict[Value, list[Equation]]:
        """`{value: equations that read it}`, of data alone."""
        users: dict[Value, list[Equation]] = {v: [] for v in self.inputs}
        for equation, operands in self.operands.items():
            for value in operands:
                users.setdefault(value, []).append(equation)
        return users

    @functools.cached_property
    def outputs(self) -> tuple[Value, ...]:
        """The distinct outputs that are data."""
        atoms = [a for a in self._outputs if not isinstance(a, core.Literal)]
        return tuple(dict.fromkeys(v for v in atoms if v in self.data))

    def reads_parameter(self, equation: Equation) -> bool:
        """Whether it reads parameters or state beside the data."""
        return any(v in self.tainted for v in equation.reads)

    def cone(self, ends: Iterable[Value], stops: Collection[Value]) -> list[Equation]:
        """All equations that `ends` need, back to `stops`, in order."""
        needed: set[Equation] = set()
        waiting = [v for v in ends if v not in stops]
        while waiting:
            equation = self.maker.get(waiting.pop())
            if equation is not None and equation not in needed:
                needed.add(equation)
                waiting += [v for v in equation.reads if v not in stops]
        return sorted(needed, key=self.place.__getitem__)
