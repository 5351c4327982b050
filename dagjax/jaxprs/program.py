"""The program of a function: its equations in order, with calls entered.

Every variable is made once, also those of the programs inside loops and conditions, so
one dictionary can hold what a transformation finds out about all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeGuard

from dagjax.jaxprs.messages import line_of
from dagjax.jaxprs.primitives import primitives_with
from dagjax.jaxprs.versions import Literal, Var, closed_jaxpr, open_jaxpr

Atom = Any  # a variable or a literal
# A custom derivative rule belongs to the whole call, and so do the device placements
# of a jit that names them; all other calls are replaced by their equations.
PLAIN = primitives_with(call="plain")
REMAT = primitives_with(call="remat")
CALLS = primitives_with(call="custom") | REMAT
_UNSPECIFIED = "UnspecifiedValue"


@dataclasses.dataclass(frozen=True, eq=False)
class Remat:
    """One rematerialized call; a jaxpr that is called twice gives two."""

    eqn: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """An equation whose variables belong to one program alone.

    Args:
        eqn: The equation.
        inside: The rematerialized calls that it came out of, outermost first.
    """

    eqn: Any
    inside: tuple[Remat, ...] = ()

    @property
    def name(self) -> str:
        """Its primitive."""
        return self.eqn.primitive.name

    @property
    def reads(self) -> list[Var]:
        """The variables that it reads, literals left out."""
        return [v for v in self.eqn.invars if not is_literal(v)]

    @property
    def scope(self) -> str:
        """The name scope that it was traced in: `Net/Block_0/Conv_0`."""
        return str(self.eqn.source_info.name_stack)

    @property
    def where(self) -> str:
        """Its place in a message: its scope, and the user's line."""
        return (f" in {self.scope!r}" if self.scope else "") + line_of(self.eqn)

    @functools.cached_property
    def bodies(self) -> tuple[Program, ...]:
        """The programs inside: of a call or a scan one, of a condition several."""
        return tuple(program_of(part) for part in _parts(self.eqn))


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Equations in the order of evaluation.

    Args:
        equations: Those that the outputs need.
        invars: The variables of the arguments.
        outvars: Variables or literals.
        consts: `{variable: array that the function closed over}`.
        jaxpr: The one that it was made of, a pattern for others.
    """

    equations: tuple[Equation, ...]
    invars: tuple[Var, ...]
    outvars: tuple[Atom, ...]
    consts: dict[Var, Any]
    jaxpr: Any

    def walk(self) -> Iterator[Equation]:
        """All equations, those of inner programs after the one that holds them."""
        for equation in self.equations:
            yield equation
            for body in equation.bodies:
                yield from body.walk()


def program_of(closed: Any, entered: frozenset[str] = PLAIN) -> Program:
    """A jaxpr as a program: variables of its own, calls entered.

    Args:
        closed: A closed jaxpr, as `jax.make_jaxpr` gives it.
        entered: Which calls are replaced by their equations; those of rematerialized
            ones remember the call.
    """
    jaxpr, values = open_jaxpr(closed)
    names = {v: Var(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars)}
    consts = {names[v]: c for v, c in zip(jaxpr.constvars, values, strict=True)}
    builder = _Builder(entered, consts)
    outvars = builder.enter(jaxpr, names, ())
    needed = backward_slice(builder.equations, outvars)
    invars = tuple(names[v] for v in jaxpr.invars)
    return Program(tuple(needed), invars, tuple(outvars), consts, jaxpr)


class _Builder:
    """Copies equations with fresh variables, those of calls in place of the call."""

    def __init__(self, entered: frozenset[str], consts: dict[Var, Any]):
        self.entered, self.consts = entered, consts
        self.equations: list[Equation] = []

    def enter(
        self, jaxpr: Any, names: dict[Var, Atom], inside: tuple[Remat, ...]
    ) -> list[Atom]:
        """Append the equations of a jaxpr; return its outputs."""
        renamed = lambda atom: atom if is_literal(atom) else names[atom]
        for eqn in jaxpr.eqns:
            operands = [renamed(atom) for atom in eqn.invars]
            if eqn.primitive.name in self.entered and not _is_placed(eqn):
                results = self._call(eqn, operands, inside)
            else:
                results = [Var(v.aval) for v in eqn.outvars]
                copy = eqn.replace(invars=operands, outvars=results)
                self.equations.append(Equation(copy, inside))
            names |= dict(zip(eqn.outvars, results, strict=True))
        return [renamed(atom) for atom in jaxpr.outvars]

    def _call(
        self, eqn: Any, operands: list[Atom], inside: tuple[Remat, ...]
    ) -> list[Atom]:
        inner, values = called(eqn)
        names = dict(zip(inner.invars, operands, strict=True))
        for var, value in zip(inner.constvars, values, strict=True):
            self.consts[names.setdefault(var, Var(var.aval))] = value
        more = (Remat(eqn),) if eqn.primitive.name in REMAT else ()
        return self.enter(inner, names, (*inside, *more))


def is_literal(atom: object) -> TypeGuard[Literal]:
    """Whether an operand is a number written into the program."""
    return isinstance(atom, Literal)


def _is_placed(eqn: Any) -> bool:
    """Whether a jit names the devices of its arguments or results."""
    placed = (
        sharding
        for kind in ("in_shardings", "out_shardings")
        for sharding in eqn.params.get(kind, ())
    )
    return any(type(sharding).__name__ != _UNSPECIFIED for sharding in placed)


def called(eqn: Any) -> tuple[Any, tuple[Any, ...]]:
    """The open jaxpr of a call, and its constants."""
    inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params)
    return open_jaxpr(inner)


def _parts(eqn: Any) -> list[Any]:
    """The closed jaxprs of a call, a loop or a condition."""
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        return [closed_jaxpr(*called(eqn))]
    control = {
        "scan": lambda: [params["jaxpr"]],
        "while": lambda: [params["cond_jaxpr"], params["body_jaxpr"]],
        "cond": lambda: [*params["branches"]],
    }
    return control.get(name, list)()


def backward_slice(
    equations: Sequence[Equation],
    ends: Iterable[Atom],
    stops: Collection[Var] = (),
    reads: Callable[[Equation], Iterable[Atom]] = lambda equation: equation.reads,
) -> list[Equation]:
    """The equations that values depend on, in order.

    Args:
        equations: In the order of evaluation.
        ends: The values.
        stops: Values that are given: what makes them is not needed.
        reads: What an equation needs.
    """
    wanted = {v for v in ends if not is_literal(v) and v not in stops}
    needed = []
    for equation in reversed(equations):
        if wanted.intersection(equation.eqn.outvars):
            wanted.update(
                v for v in reads(equation) if not is_literal(v) and v not in stops
            )
            needed.append(equation)
    return needed[::-1]


# --- back to jaxprs -------------------------------------------------------------------


def jaxpr_of(
    pattern: Any,
    equations: Sequence[Equation],
    invars: Sequence[Var],
    outvars: Sequence[Atom],
) -> Any:
    """A closed jaxpr of some equations; the rematerialized ones are so again.

    Args:
        pattern: A jaxpr that gives all that is not equations and variables.
        equations: In order.
        invars: What they read.
        outvars: What is asked of them.
    """
    eqns = list(_regrouped(equations, outvars, 0))
    return closed_jaxpr(part_of(pattern, eqns, list(invars), list(outvars)))


def part_of(
    pattern: Any, eqns: list[Any], invars: list[Var], outvars: list[Atom]
) -> Any:
    """An open jaxpr of some equations of another one."""
    info = pattern.debug_info._replace(arg_names=None, result_paths=None)
    return pattern.replace(
        constvars=[], invars=invars, outvars=outvars, eqns=eqns, debug_info=info
    )


def _regrouped(
    equations: Sequence[Equation], outvars: Iterable[Atom], depth: int
) -> Iterator[Any]:
    """Equations that came out of one rematerialized call go back into one."""
    call_at = lambda e: e.inside[depth] if len(e.inside) > depth else None
    runs = [
        (call, list(run)) for call, run in itertools.groupby(equations, key=call_at)
    ]
    read_later = _read_after([run for _, run in runs], outvars)
    for (call, run), later in zip(runs, read_later, strict=True):
        if call is None:
            yield from (equation.eqn for equation in run)
        else:
            yield _called_again(call, run, later, depth)


def _called_again(call: Remat, run: list[Equation], later: set[Var], depth: int) -> Any:
    made = [v for equation in run for v in equation.eqn.outvars]
    inner = {*made}
    free = [*dict.fromkeys(v for e in run for v in e.reads if v not in inner)]
    results = [v for v in made if v in later]
    eqns = list(_regrouped(run, results, depth + 1))
    jaxpr = part_of(called(call.eqn)[0], eqns, free, results)
    params = {**call.eqn.params, "jaxpr": jaxpr}
    return call.eqn.replace(invars=free, outvars=results, params=params)


def _read_after(runs: list[list[Equation]], outvars: Iterable[Atom]) -> list[set[Var]]:
    """For each run what the later ones and the outputs read."""
    wanted = {v for v in outvars if not is_literal(v)}
    after = []
    for run in reversed(runs):
        after.append(set(wanted))
        wanted |= {v for equation in run for v in equation.reads}
    return after[::-1]
