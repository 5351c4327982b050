"""A loop of known length as its steps one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dagjax.jaxprs.interpret import Env, Evaluation, bind_whole, scan_parts
from dagjax.jaxprs.program import Equation, program_of
from dagjax.jaxprs.versions import shape_of
from dagjax.types import Array


def unrolled(closed: Any) -> Any:
    """The same program with every `scan` written out.

    Args:
        closed: A closed jaxpr.
    """
    program = program_of(closed)
    run = lambda *args: _Unrolling().run(program, args)
    return jax.make_jaxpr(run)(*(shape_of(v.aval) for v in program.invars))


class _Unrolling(Evaluation):
    """Evaluates scans pass by pass, everything else as it is, in its name scope.

    Layers that are stacked to be scanned are read where they came from, so that each
    pass has axes of its own: `rows` keeps `{id of a stack: (the stack, its rows)}`.
    """

    def __init__(self) -> None:
        self.rows: dict[int, tuple[Any, list[Any]]] = {}

    def equation(self, equation: Equation, values: list[Any]) -> Sequence[Any]:
        """The primitive; of a stack its rows are kept."""
        results = super().equation(equation, values)
        first = equation.eqn.params.get("dimension", equation.eqn.params.get("axis"))
        if equation.name == "stack" and first == 0:
            self.rows[id(results[0])] = results[0], values
        if equation.name == "concatenate" and first == 0:
            if all(x.shape[0] == 1 for x in values):
                rows = [lax.squeeze(x, (0,)) for x in values]
                self.rows[id(results[0])] = results[0], rows
        return results

    def row(self, leaf: Array, i: int) -> Any:
        """What a pass reads of what is scanned."""
        if id(leaf) in self.rows:
            return self.rows[id(leaf)][1][i]
        return lax.index_in_dim(leaf, i, keepdims=False)

    def visit(self, equation: Equation, env: Env) -> Sequence[Any]:
        """What an equation makes, in its name scope."""
        with jax.named_scope(equation.scope):
            return super().visit(equation, env)

    def call(self, equation: Equation, values: list[Any]) -> Sequence[Any]:
        """A call with a rule of its own stays one."""
        return bind_whole(equation.eqn, *values)

    def cond(self, equation: Equation, values: list[Any]) -> Sequence[Any]:
        """A condition stays one."""
        return bind_whole(equation.eqn, *values)

    def loop(self, equation: Equation, values: list[Any]) -> Sequence[Any]:
        """A loop of unknown length stays one."""
        return bind_whole(equation.eqn, *values)

    def scan(self, equation: Equation, values: list[Any]) -> Sequence[Any]:
        """`carry, y_i = body(held, carry, x_i)` for i = 0, 1, ..., the ys stacked."""
        length, back = (equation.eqn.params[k] for k in ("length", "reverse"))
        if not length:
            return bind_whole(equation.eqn, *values)
        held, carry, xs = scan_parts(equation).of(values)
        rows: list[list[Any]] = []
        for i in reversed(range(length)) if back else range(length):
            with jax.named_scope(str(i)):
                x = [self.row(leaf, i) for leaf in xs]
                results = self.run(equation.bodies[0], [*held, *carry, *x])
            carry = results[: len(carry)]
            rows.append(results[len(carry) :])
        rows = rows[::-1] if back else rows
        return [*carry, *map(jnp.stack, zip(*rows, strict=True))]
