"""The derivative rule of a call as a program: what it makes of cotangents.

A rule need not be the derivative of what the call computes (straight-through
estimators, clipped or averaged gradients): it may read operands that the call ignores,
and mix indices that the call keeps apart. Whoever asks what a call reads asks both.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dagjax.jaxprs.interpret import bind_whole
from dagjax.jaxprs.primitives import primitives_with
from dagjax.jaxprs.program import (
    CALLS,
    PLAIN,
    Equation,
    Program,
    is_literal,
    program_of,
)
from dagjax.jaxprs.versions import Atom, Var, shape_of

_CUSTOM = primitives_with(call="custom")
# Rules that are the derivative, up to the tolerance of a solver that mixes all indices.
_DERIVATIVES = frozenset({"jax.experimental.ode"})


class Pullback(NamedTuple):
    """The rule of a call.

    Args:
        program: Of the operands and the cotangents of the results that have one; it
            gives the cotangents of the operands that have one. Calls are entered.
        operands: Which operands have a cotangent that is asked for.
        results: Which results have one.
    """

    program: Program
    operands: tuple[int, ...]
    results: tuple[int, ...]


def has_rule(equation: Equation) -> bool:
    """Whether a call may have another derivative than what it computes."""
    rule = equation.eqn.params.get("bwd")
    module = getattr(getattr(rule, "f", rule), "__module__", "")
    return equation.name in _CUSTOM and module not in _DERIVATIVES


class Pullbacks:
    """The rules of the calls of one program; those of equal calls are traced once."""

    def __init__(self) -> None:
        self._traced: dict[Any, Any] = {}

    def of(self, equation: Equation, constant: Collection[Var]) -> Pullback | None:
        """The rule of a call, None if it cannot be traced.

        Args:
            equation: A call with a derivative rule of its own.
            constant: Values without a cotangent, as they depend on no argument.
        """
        eqn = equation.eqn
        depends = lambda i: not is_literal(a := eqn.invars[i]) and a not in constant
        operands = tuple(filter(depends, moving(eqn.invars)))
        results = moving(eqn.outvars)
        shapes = [shape_of(v.aval) for v in eqn.invars]
        shapes += [shape_of(eqn.outvars[i].aval) for i in results]
        rule = map(id, eqn.params.values())  # the equation keeps them alive
        key = (operands, *shapes, *rule)
        if key not in self._traced:
            run = functools.partial(pull, eqn, operands, results)
            try:
                self._traced[key] = jax.make_jaxpr(run)(*shapes)
            except Exception:  # the rule is the user's own code: there is none
                self._traced[key] = None
        if (closed := self._traced[key]) is None:
            return None
        return Pullback(program_of(closed, PLAIN | CALLS), operands, results)


def pull(eqn: Any, operands: Sequence[int], results: Sequence[int], *args: Any) -> Any:
    """The cotangents of some operands of a call.

    Args:
        eqn: The call.
        operands: Which.
        results: Which results the cotangents given are of.
        *args: All operands, then the cotangents.
    """
    primals, cotangents = [*args[: len(eqn.invars)]], args[len(eqn.invars) :]

    def call(*moved: Any) -> Any:
        given = dict(zip(operands, moved, strict=True))
        made = bind_whole(eqn, *(given.get(i, x) for i, x in enumerate(primals)))
        return [made[i] for i in results]

    return jax.vjp(call, *(primals[i] for i in operands))[1]([*cotangents])


def moving(atoms: Sequence[Atom]) -> tuple[int, ...]:
    """Which values have tangents and cotangents: those of floats."""
    return tuple(
        i for i, v in enumerate(atoms) if jnp.issubdtype(v.aval.dtype, jnp.inexact)
    )
