"""The program of a network: one list of steps, with programs inside calls and loops."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jax.extend import core

from dagjax.jaxprs.flatten import Named, called, enters
from dagjax.jaxprs.messages import line_of

# Calls that keep a meaning of their own (a derivative rule, rematerialization).
CALLS = frozenset(
    """
    custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr remat remat2 checkpoint
    """.split()
)


@dataclasses.dataclass(frozen=True, eq=False)
class Step(Named):
    """An equation whose variables belong to one program alone.

    Args:
        eqn: The equation.
        bodies: The programs inside it: of a call or a loop one, of a condition several.
    """

    eqn: Any
    bodies: tuple[Body, ...] = ()

    @property
    def where(self) -> str:
        """What a message says of its place: its arc or scope, and the user's line."""
        scope = str(self.eqn.source_info.name_stack)
        return (f" in {scope!r}" if scope else "") + line_of(self.eqn)


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """A program: steps in the order of evaluation, every variable made once.

    Args:
        steps: Those that the outputs need.
        invars: The variables of the arguments.
        outvars: Variables or literals.
        consts: `{variable: array}`.
    """

    steps: tuple[Step, ...]
    invars: tuple[Any, ...]
    outvars: tuple[Any, ...]
    consts: dict[Any, Any]

    def walk(self) -> Iterator[Step]:
        """All steps, those of inner programs after the one that holds them."""
        for step in self.steps:
            yield step
            for body in step.bodies:
                yield from body.walk()


def is_literal(atom: Any) -> bool:
    """Whether an operand is a number written into the program."""
    return isinstance(atom, core.Literal)


def body_of(jaxpr: Any, consts: Any = ()) -> Body:
    """A jaxpr as a program with variables of its own, plain calls entered.

    Args:
        jaxpr: An open jaxpr.
        consts: The values of its constants.
    """
    names: dict[Any, Any] = {v: _fresh(v) for v in [*jaxpr.constvars, *jaxpr.invars]}
    held = {names[v]: c for v, c in zip(jaxpr.constvars, consts, strict=True)}
    invars = tuple(names[v] for v in jaxpr.invars)
    steps: list[Step] = []
    outvars = _enter(jaxpr, names, steps, held)
    return Body(_needed(steps, outvars), invars, tuple(outvars), held)


def _enter(
    jaxpr: Any, names: dict[Any, Any], steps: list[Step], consts: dict[Any, Any]
) -> list[Any]:
    """Append the steps of a jaxpr; return its outputs."""
    here = lambda atom: atom if is_literal(atom) else names[atom]
    for eqn in jaxpr.eqns:
        operands = [here(atom) for atom in eqn.invars]
        if enters(eqn):
            inner, held = called(eqn)
            deeper = dict(zip(inner.invars, operands, strict=True))
            for var, value in zip(inner.constvars, held, strict=True):
                consts[deeper.setdefault(var, _fresh(var))] = value
            results = _enter(inner, deeper, steps, consts)
        else:
            results = [_fresh(var) for var in eqn.outvars]
            inside = tuple(body_of(*part) for part in _parts(eqn))
            steps.append(Step(eqn.replace(invars=operands, outvars=results), inside))
        names |= dict(zip(eqn.outvars, results, strict=True))
    return [here(atom) for atom in jaxpr.outvars]


def _parts(eqn: Any) -> list[tuple[Any, Any]]:
    """The jaxprs of a call, a loop or a condition, with their constants."""
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        return [called(eqn)]
    kept = {
        "scan": lambda: [params["jaxpr"]],
        "while": lambda: [params["cond_jaxpr"], params["body_jaxpr"]],
        "cond": lambda: params["branches"],
    }.get(name, list)()
    return [(closed.jaxpr, closed.consts) for closed in kept]


def _needed(steps: list[Step], outvars: list[Any]) -> tuple[Step, ...]:
    """The steps that the outputs depend on."""
    wanted = {v for v in outvars if not is_literal(v)}
    kept = []
    for step in reversed(steps):
        if wanted.intersection(step.eqn.outvars):
            wanted.update(step.reads)
            kept.append(step)
    return tuple(reversed(kept))


def _fresh(var: Any) -> Any:
    return core.Var(var.aval)
