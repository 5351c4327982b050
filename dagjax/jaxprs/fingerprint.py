"""A program as a short text: equal for two traces of one function."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from dagjax.jaxprs.canonical import canonical
from dagjax.jaxprs.program import Program
from dagjax.jaxprs.versions import Jaxpr
from dagjax.types import PyTree


def fingerprint(program: Program) -> str:
    """A hash of equations, shapes and parameters of primitives.

    What a primitive holds of Python functions (the rules of custom derivatives) is left
    out: `rules` and the function that was traced stand for them.

    Args:
        program: The program.
    """
    numbers: dict[Any, int] = {}
    number = lambda v: numbers.setdefault(v, len(numbers))
    for var in (*program.invars, *program.consts):
        number(var)
    lines = [f"{[str(v.aval) for v in numbers]}"]
    for equation in program.equations:
        inside = [number(call) for call in equation.inside]
        lines.append(f"{inside}{_equation(equation.eqn, number)}")
    lines.append(str([_atom(a, number) for a in program.outvars]))
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def rules(program: Program) -> tuple[Hashable, ...]:
    """The backward rules of custom derivatives, in the order of the equations.

    Args:
        program: The program.
    """
    found, waiting = [], [equation.eqn for equation in program.equations]
    for eqn in waiting:
        waiting += [e for j in core.jaxprs_in_params(eqn.params) for e in j.eqns]
        if "bwd" in eqn.params:
            found.append(eqn.params["bwd"])
    return tuple(canonical(getattr(rule, "f", rule)) for rule in found)


def pattern_of(closed: Any) -> str:
    """A hash of a closed jaxpr.

    Args:
        closed: The jaxpr.
    """
    text = _inner(closed.jaxpr, closed.consts)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _equation(eqn: Any, number: Any) -> str:
    reads = [_atom(atom, number) for atom in eqn.invars]
    makes = [f"{number(v)}:{v.aval}" for v in eqn.outvars]
    params = [f"{k}={t}" for k in sorted(eqn.params) for t in _text(eqn.params[k])]
    return f"{makes}={eqn.primitive.name}{params}{reads}"


def _atom(atom: Any, number: Any) -> str:
    if isinstance(atom, core.Literal):
        return f"{np.asarray(atom.val).tolist()!r}:{atom.aval}"
    return str(number(atom))


def _text(value: PyTree) -> Iterator[str]:
    """A parameter of a primitive, without addresses of objects."""
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        yield _inner(getattr(value, "jaxpr", value), getattr(value, "consts", ()))
    elif isinstance(value, np.ndarray | jax.Array):
        yield hashlib.blake2b(np.asarray(value).tobytes()).hexdigest()
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _text(item)
        yield ";"
    elif isinstance(value, set | frozenset):
        yield str(sorted(map(str, value)))
    elif callable(value) and not isinstance(value, type | np.dtype):
        yield getattr(value, "__qualname__", type(value).__qualname__)
    else:
        yield str(value).split(" at 0x")[0]


def _inner(jaxpr: Jaxpr, consts: PyTree) -> str:
    numbers: dict[Any, int] = {}
    number = lambda v: numbers.setdefault(v, len(numbers))
    for var in (*jaxpr.constvars, *jaxpr.invars):
        number(var)
    lines = [str([str(v.aval) for v in numbers])]
    lines += [text for const in consts for text in _text(np.asarray(const))]
    lines += [_equation(eqn, number) for eqn in jaxpr.eqns]
    return "\n".join([*lines, str([_atom(a, number) for a in jaxpr.outvars])])
