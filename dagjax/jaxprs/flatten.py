"""One flat list of equations: calls are entered, their meaning is kept."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jax.extend import core

from dagjax.jaxprs.primitives import primitives_with
from dagjax.jaxprs.versions import closed_jaxpr, open_jaxpr

# Calls whose equations may be taken apart. A custom derivative rule belongs to the
# whole call, and so do the device placements of a jit that names them.
_ENTERED = primitives_with(call="plain")
_REMAT = primitives_with(call="remat")
_UNSPECIFIED = "UnspecifiedValue"


@dataclasses.dataclass(frozen=True, eq=False)
class Remat:
    """One rematerialized call; a jaxpr that is called twice gives two."""

    eqn: Any


class Named:
    """What one asks of something that holds an equation `eqn`."""

    eqn: Any

    @property
    def name(self) -> str:
        """Its primitive."""
        return self.eqn.primitive.name

    @property
    def reads(self) -> list[Any]:
        """The variables that it reads, literals left out."""
        return [v for v in self.eqn.invars if not isinstance(v, core.Literal)]


@dataclasses.dataclass(frozen=True, eq=False)
class Equation(Named):
    """An equation of the flat program.

    Args:
        eqn: The equation; its variables belong to the flat program.
        inside: The rematerialized calls that it came out of, outermost first.
    """

    eqn: Any
    inside: tuple[Remat, ...] = ()

    @property
    def scope(self) -> str:
        """The name scope that it was traced in: `Net/Block_0/Conv_0`."""
        return str(self.eqn.source_info.name_stack)


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """A program without inner calls.

    Args:
        equations: In the order of evaluation.
        invars: The variables of the arguments.
        outvars: Variables or literals.
        consts: `{variable: array that the function closed over}`.
        jaxpr: The one that it was made of, a pattern for others.
    """

    equations: list[Equation]
    invars: list[Any]
    outvars: list[Any]
    consts: dict[Any, Any]
    jaxpr: Any


def flatten(closed: Any) -> Flat:
    """Enter every call that may be entered, with fresh variables.

    Args:
        closed: What `jax.make_jaxpr` gives.
    """
    consts: dict[Any, Any] = dict(
        zip(closed.jaxpr.constvars, closed.consts, strict=True)
    )
    equations: list[Equation] = []
    outvars = _enter(closed.jaxpr, {}, (), equations, consts)
    return Flat(equations, list(closed.jaxpr.invars), outvars, consts, closed.jaxpr)


def _enter(
    jaxpr: Any,
    names: dict[Any, Any],
    inside: tuple[Remat, ...],
    equations: list[Equation],
    consts: dict[Any, Any],
) -> list[Any]:
    """Append the equations of a jaxpr, its variables renamed; return its outputs."""
    here = lambda atom: (
        atom if isinstance(atom, core.Literal) else names.get(atom, atom)
    )
    for eqn in jaxpr.eqns:
        operands = [here(atom) for atom in eqn.invars]
        if not (enters(eqn) or eqn.primitive.name in _REMAT):
            if names or inside:  # the variables of a call may be met again
                fresh = [_fresh(var) for var in eqn.outvars]
                names |= dict(zip(eqn.outvars, fresh, strict=True))
                eqn = eqn.replace(invars=operands, outvars=fresh)
            equations.append(Equation(eqn, inside))
            continue
        inner, held = called(eqn)
        bound = dict(zip(inner.invars, operands, strict=True))
        for var, value in zip(inner.constvars, held, strict=True):
            consts[bound.setdefault(var, _fresh(var))] = value
        deeper = (*inside, Remat(eqn)) if eqn.primitive.name in _REMAT else inside
        results = _enter(inner, bound or {None: None}, deeper, equations, consts)
        names |= dict(zip(eqn.outvars, results, strict=True))
    return [here(atom) for atom in jaxpr.outvars]


def enters(eqn: Any) -> bool:
    """Whether a call may be replaced by its equations."""
    placed = (
        sharding
        for kind in ("in_shardings", "out_shardings")
        for sharding in eqn.params.get(kind, ())
    )
    return eqn.primitive.name in _ENTERED and all(
        type(sharding).__name__ == _UNSPECIFIED for sharding in placed
    )


def called(eqn: Any) -> tuple[Any, Any]:
    """The jaxpr of a call, and its constants."""
    inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params)
    return open_jaxpr(inner)


def _fresh(var: Any) -> Any:
    return core.Var(var.aval)


def program(
    pattern: Any, equations: Sequence[Equation], invars: list[Any], outvars: list[Any]
) -> Any:
    """A closed jaxpr of some equations; the rematerialized ones are so again."""
    eqns = list(_regrouped(equations, outvars, 0))
    jaxpr = part_of(pattern, eqns, invars, outvars)
    return closed_jaxpr(jaxpr)


def part_of(pattern: Any, eqns: list[Any], invars: Any, outvars: Any) -> Any:
    """A jaxpr of some equations of another one."""
    info = pattern.debug_info._replace(arg_names=None, result_paths=None)
    return pattern.replace(
        constvars=[], invars=invars, outvars=outvars, eqns=eqns, debug_info=info
    )


def _regrouped(
    equations: Sequence[Equation], outvars: Iterable[Any], depth: int
) -> Iterator[Any]:
    """Equations that came out of one rematerialized call go back into one."""
    call_at = lambda e: e.inside[depth] if len(e.inside) > depth else None
    runs = [
        (call, list(run)) for call, run in itertools.groupby(equations, key=call_at)
    ]
    needed = _needed_after([run for _, run in runs], outvars)
    for (call, run), after in zip(runs, needed, strict=True):
        if call is None:
            yield from (equation.eqn for equation in run)
            continue
        made = [v for equation in run for v in equation.eqn.outvars]
        own = {*made}
        free = dict.fromkeys(v for e in run for v in e.reads if v not in own)
        kept = [v for v in made if v in after]
        inner = part_of(
            called(call.eqn)[0], list(_regrouped(run, kept, depth + 1)), [*free], kept
        )
        params = {**call.eqn.params, "jaxpr": inner}
        yield call.eqn.replace(invars=[*free], outvars=kept, params=params)


def _needed_after(runs: list[list[Equation]], outvars: Iterable[Any]) -> list[set[Any]]:
    """For each run what the later ones and the outputs read."""
    needed = {v for v in outvars if not isinstance(v, core.Literal)}
    found = []
    for run in reversed(runs):
        found.append(set(needed))
        needed |= {v for equation in run for v in equation.reads}
    return found[::-1]
