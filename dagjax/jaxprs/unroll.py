"""A loop of known length as its steps one after the other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from dagjax.jaxprs.flatten import called, enters, part_of
from dagjax.jaxprs.versions import closed_jaxpr, shape_of


def unrolled(closed: Any) -> Any:
    """The same program with every `scan` written out.

    Args:
        closed: A closed jaxpr.
    """
    run = lambda *args: _evaluate(closed.jaxpr, closed.consts, args)
    return jax.make_jaxpr(run)(*(shape_of(v.aval) for v in closed.jaxpr.invars))


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))
    read = lambda a: a.val if isinstance(a, core.Literal) else env[a]
    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        with jax.named_scope(str(eqn.source_info.name_stack)):
            outputs = _equation(jaxpr, eqn, values)
        env |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(jaxpr: Any, eqn: Any, values: list[Any]) -> list[Any]:
    if eqn.primitive.name == "scan" and eqn.params["length"]:
        return _steps(eqn, values)
    if enters(eqn):
        return _evaluate(*called(eqn), values)
    fresh = [core.Var(jax.typeof(value)) for value in values]
    alone = part_of(jaxpr, [eqn.replace(invars=fresh)], fresh, eqn.outvars)
    return core.jaxpr_as_fun(closed_jaxpr(alone))(*values)


def _steps(eqn: Any, values: list[Any]) -> list[Any]:
    """`carry, y_i = body(consts, carry, x_i)` for i = 0, 1, ..., the ys stacked."""
    inner, inner_consts = called(eqn)
    # Inputs and outputs of a step have an axis less than those of the loop.
    stacked = lambda outer, step: outer.aval.ndim > step.aval.ndim
    xs = sum(map(stacked, eqn.invars, inner.invars))
    carried = len(eqn.outvars) - sum(map(stacked, eqn.outvars, inner.outvars))
    first = len(values) - xs
    held = first - carried
    consts, carry, xs = values[:held], values[held:first], values[first:]
    rows: list[list[Any]] = []
    steps = range(eqn.params["length"])
    for i in reversed(steps) if eqn.params["reverse"] else steps:
        with jax.named_scope(str(i)):
            x = [lax.index_in_dim(leaf, i, keepdims=False) for leaf in xs]
            found = _evaluate(inner, inner_consts, [*consts, *carry, *x])
        carry = found[: len(carry)]
        rows.append(found[len(carry) :])
    rows = rows[::-1] if eqn.params["reverse"] else rows
    return [*carry, *map(jnp.stack, zip(*rows, strict=True))]
