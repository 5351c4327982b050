"""Constant propagation: values that a program computes of constants alone."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from dagjax.jaxprs.interpret import bind
from dagjax.jaxprs.primitives import primitive_of
from dagjax.jaxprs.program import Atom, Equation, is_literal
from dagjax.jaxprs.versions import Var, evaluating
from dagjax.types import Array

_LARGEST = 1 << 16  # entries of a value that is computed
_KINDS = ("elementwise", "structural")


class Constants:
    """Integers and flags that do not depend on the arguments of a program."""

    def __init__(self) -> None:
        self._makers: dict[Var, Equation] = {}
        self._values: dict[Var, np.ndarray | None] = {}

    def hold(self, var: Var, array: Array) -> None:
        """An array that the program holds."""
        self._values[var] = np.asarray(array) if _is_small(var) else None

    def note(self, equation: Equation) -> None:
        """What makes values that may be constant."""
        if primitive_of(equation.eqn).kind in _KINDS and len(equation.eqn.outvars) == 1:
            self._makers[equation.eqn.outvars[0]] = equation

    def of(self, atom: Atom) -> np.ndarray | None:
        """A value if it is constant, small and whole-numbered, else None."""
        if is_literal(atom):
            return np.asarray(atom.val)
        if atom not in self._values:
            self._values[atom] = self._computed(atom)
        return self._values[atom]

    def _computed(self, var: Var) -> np.ndarray | None:
        equation = self._makers.get(var)
        if equation is None or not _is_small(var):
            return None
        operands = [self.of(atom) for atom in equation.eqn.invars]
        if any(x is None for x in operands):
            return None
        avals = [atom.aval for atom in equation.eqn.invars]
        with evaluating():
            rows = zip(operands, avals, strict=True)
            (value,) = bind(equation.eqn, [jnp.asarray(x, a.dtype) for x, a in rows])
        return np.asarray(value)


def _is_small(var: Var) -> bool:
    whole = jnp.issubdtype(var.aval.dtype, jnp.integer) or var.aval.dtype == bool
    return whole and math.prod(var.aval.shape) <= _LARGEST
