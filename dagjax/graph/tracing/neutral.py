"""What the ports of a traced merge read as when nothing arrives at them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.extend import core

from dagjax.graph.core.merges import Port, any_on, highest, is_on, lowest
from dagjax.graph.tracing.cut import Join
from dagjax.graph.tracing.flow import Value
from dagjax.jaxprs.program import Equation

_LOWEST = frozenset(("max", "reduce_max"))
_HIGHEST = frozenset(("min", "reduce_min"))
_FACTORS = frozenset(("mul", "div", "and", "pow"))


@dataclasses.dataclass(frozen=True)
class Role:
    """What a port is to its merge.

    With nothing there a factor reads 1, a maximum less than all others, a case of a
    selection the other case, everything else 0; without its keys attention is 0.
    """

    kind: Literal["zero", "factor", "low", "high", "case", "key"]
    other: int = 0  # the port of the other case

    def filled(self, port: Port, ports: Sequence[Port]) -> jax.Array:
        """What the equations read at the port."""
        value, presence = port
        if self.kind == "factor" and value.dtype == bool:
            return value | ~is_on(port)
        if self.kind == "factor":
            return value + (1 - presence).astype(value.dtype)
        if self.kind in ("low", "high"):
            least = lowest if self.kind == "low" else highest
            return jnp.where(is_on(port), value, least(value.dtype))
        if self.kind == "case":
            return jnp.where(is_on(port), value, ports[self.other].value)
        return value


def settled(roles: Sequence[Role], ports: Sequence[Port], y: jax.Array) -> jax.Array:
    """A maximum of nothing, and attention to nothing, is 0."""
    needed = [
        port for role, port in zip(roles, ports, strict=True)
        if role.kind in ("low", "high", "key")
    ]  # fmt: skip
    return jnp.where(any_on(tuple(needed)), y, jnp.zeros_like(y)) if needed else y


def roles(join: Join) -> tuple[Role, ...]:
    """The role of each port of a merge, by the equation that reads it first."""
    keys = {*_keys(join)}
    return tuple(
        Role("key") if port in keys else _role(port, join) for port in join.ports
    )


def _role(port: Value, join: Join) -> Role:
    equation = next(e for e in join.equations if port in e.reads)
    name, operands = equation.name, equation.eqn.invars
    if name == "select_n" and len(operands) == 3 and port in operands[1:]:
        other = operands[2] if operands[1] is port else operands[1]
        known = not isinstance(other, core.Literal) and other in join.ports
        return Role("case", join.ports.index(other)) if known else Role("zero")
    if name in _LOWEST:
        return Role("low")
    if name in _HIGHEST:
        return Role("high")
    return Role("factor" if name in _FACTORS else "zero")


def _keys(join: Join) -> Iterable[Value]:
    """Of attention `softmax(q k) v` the ports that are keys.

    The softmax sums over the positions of the keys: that axis of the logits, followed
    back to the product, is an axis of one of its operands.
    """
    maker = {v: e for e in join.equations for v in e.eqn.outvars}
    total = [e for e in join.equations if e.name == "reduce_sum"]
    if not total or not any(e.name == "exp" for e in join.equations):
        return
    (axis, *rest), value = total[-1].eqn.params["axes"], total[-1].eqn.invars[0]
    while not rest and value in maker:
        equation = maker[value]
        if equation.name == "dot_general":
            yield from _behind(equation, axis, maker, join)
            return
        if equation.name == "transpose":
            axis = equation.eqn.params["permutation"][axis]
        alike = [v for v in equation.reads if v.aval.shape == _before(equation)]
        if not alike:
            return
        value = max(alike, key=lambda v: v in maker)


def _before(equation: Equation) -> tuple[int, ...]:
    """The shape of what a step of a softmax keeps the axes of."""
    shape = equation.eqn.outvars[0].aval.shape
    if equation.name != "transpose":
        return shape
    order = equation.eqn.params["permutation"]
    return tuple(shape[order.index(i)] for i in range(len(order)))


def _behind(
    product: Equation, axis: int, maker: dict[Value, Equation], join: Join
) -> Iterable[Value]:
    """The ports behind the operand of a product that has an axis of the result."""
    (contracted, _), (batch, _) = product.eqn.params["dimension_numbers"]
    left, right = product.eqn.invars
    free = left.aval.ndim - len(contracted) - len(batch)
    waiting = [left if axis < len(batch) + free else right]
    for value in waiting:
        if value in join.ports:
            yield value
        elif value in maker:
            waiting += maker[value].reads
