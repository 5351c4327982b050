"""The one driver of programs: calls, conditions and loops for all transformations.

A transformation is a subclass. It says what an equation without inner programs makes of
what it reads (`equation`); `Evaluation` does the rest on arrays, `Abstract` on anything
else that can be joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jax import lax

from dagjax.jaxprs.primitives import primitive_of, primitives_with
from dagjax.jaxprs.program import (
    CALLS,
    Atom,
    Equation,
    Program,
    called,
    is_literal,
    part_of,
    program_of,
)
from dagjax.jaxprs.versions import (
    Var,
    aligned,
    closed_jaxpr,
    jaxpr_as_fun,
    jaxprs_in_params,
    varying,
)

V = TypeVar("V")
_CUSTOM = primitives_with(call="custom")
Env = dict[Any, Any]


class Interpreter(Generic[V]):
    """Walks a program in the order of evaluation."""

    def run(
        self, program: Program, args: Sequence[V], env: Env | None = None
    ) -> list[V]:
        """What the outputs are.

        Args:
            program: The program.
            args: What its arguments are.
            env: Where to put what its values are.
        """
        env = {} if env is None else env
        env.update(zip(program.invars, args, strict=True))
        for var, array in program.consts.items():
            env[var] = self.constant(var, array)
        for equation in self.equations(program):
            results = self.visit(equation, env)
            env.update(zip(equation.eqn.outvars, results, strict=True))
        return [self.read(env, atom) for atom in program.outvars]

    def equations(self, program: Program) -> Iterable[Equation]:
        """Those to be visited."""
        return program.equations

    def read(self, env: Env, atom: Atom) -> V:
        """What a value or a literal is."""
        return self.literal(atom) if is_literal(atom) else env[atom]

    def visit(self, equation: Equation, env: Env) -> Sequence[V]:
        """What an equation makes of what it reads."""
        values = [self.read(env, atom) for atom in equation.eqn.invars]
        if equation.name in CALLS:
            return self.call(equation, values)
        control = {"cond": self.cond, "scan": self.scan, "while": self.loop}
        return control.get(equation.name, self.equation)(equation, values)

    def literal(self, atom: Atom) -> V:
        """What a literal is."""
        return atom.val

    def constant(self, var: Var, array: Any) -> V:
        """What an array is that the program holds."""
        raise NotImplementedError

    def equation(self, equation: Equation, values: list[V]) -> Sequence[V]:
        """The rule of a primitive without inner programs."""
        raise NotImplementedError

    def call(self, equation: Equation, values: list[V]) -> Sequence[V]:
        """A call with a derivative rule of its own, or rematerialized."""
        return self.run(equation.bodies[0], values)

    def cond(self, equation: Equation, values: list[V]) -> Sequence[V]:
        """A choice between bodies by the first operand."""
        raise NotImplementedError

    def scan(self, equation: Equation, values: list[V]) -> Sequence[V]:
        """A loop of known length."""
        raise NotImplementedError

    def loop(self, equation: Equation, values: list[V]) -> Sequence[V]:
        """A `while` loop."""
        raise NotImplementedError


class Evaluation(Interpreter[Any]):
    """Evaluates a program on arrays; a subclass changes some equations."""

    def constant(self, var: Var, array: Any) -> Any:
        """The array itself."""
        return array

    def equation(self, equation: Equation, values: list[Any]) -> Sequence[Any]:
        """The primitive."""
        return bind(equation.eqn, values)

    def cond(self, equation: Equation, values: list[Any]) -> Sequence[Any]:
        """The branch that the first operand chooses."""
        branches = [self._function(body) for body in equation.bodies]
        values = aligned(values)
        return lax.switch(values[0], branches, *values[1:])

    def scan(self, equation: Equation, values: list[Any]) -> Sequence[Any]:
        """The loop, its body evaluated by the same rules."""
        parts, body, p = scan_parts(equation), equation.bodies[0], equation.eqn.params
        held, carry, xs = parts.of(aligned(values))

        def step(carry: Any, x: Any) -> Any:
            results = self.run(body, [*held, *carry, *x])
            return results[: len(carry)], results[len(carry) :]

        setting = {"reverse": p["reverse"], "unroll": p.get("unroll", 1)}
        carry, ys = lax.scan(step, carry, xs, length=p["length"], **setting)
        return [*carry, *ys]

    def loop(self, equation: Equation, values: list[Any]) -> Sequence[Any]:
        """The loop, its test and its body evaluated by the same rules."""
        test, body = equation.bodies
        tests, held, carry = while_parts(equation, aligned(values))
        going = lambda carry: self.run(test, [*tests, *carry])[0]
        step = lambda carry: self.run(body, [*held, *carry])
        return lax.while_loop(going, step, carry)

    def _function(self, body: Program) -> Callable[..., list[Any]]:
        return lambda *values: self.run(body, values)


class Abstract(Interpreter[V]):
    """Finds out about all values of a program without evaluating it.

    `of` holds what is found of every variable, those of inner programs too: in a loop
    it is what holds in all passes.
    """

    def __init__(self) -> None:
        self.of: dict[Any, V] = {}

    def run(
        self, program: Program, args: Sequence[V], env: Env | None = None
    ) -> list[V]:
        """What the outputs are; `of` holds what all values are."""
        return super().run(program, args, self.of)

    def join(self, one: V, two: V) -> V:
        """What holds of a value that is one thing or the other."""
        raise NotImplementedError

    def equal(self, one: V, two: V) -> bool:
        """Whether a joined value says the same as before."""
        raise NotImplementedError

    def unstack(self, equation: Equation, value: V) -> V:
        """One slice of a value along its first axis, whichever it is."""
        raise NotImplementedError

    def stack(self, equation: Equation, value: V) -> V:
        """Slices along a new first axis, all of one kind."""
        raise NotImplementedError

    def entering(self, equation: Equation, value: V) -> V:
        """What is known inside a condition or a loop of a value from outside."""
        return value

    def cond(self, equation: Equation, values: list[V]) -> Sequence[V]:
        """What all branches agree on."""
        given = [self.entering(equation, value) for value in values[1:]]
        first, *rest = [self.run(body, given) for body in equation.bodies]
        for other in rest:
            first = [*map(self.join, first, other)]
        return first

    def scan(self, equation: Equation, values: list[V]) -> Sequence[V]:
        """Carries to their fixpoint; the axis that is scanned is no one's."""
        body, given = equation.bodies[0], [self.entering(equation, v) for v in values]
        held, carry, xs = scan_parts(equation).of(given)
        slices = [self.unstack(equation, x) for x in xs]
        carry, results = self._fixpoint(body, held, carry, slices)
        ys = [self.stack(equation, y) for y in results[len(carry) :]]
        return [*carry, *ys]

    def loop(self, equation: Equation, values: list[V]) -> Sequence[V]:
        """Carries to their fixpoint, with which the test is run too."""
        given = [self.entering(equation, value) for value in values]
        tests, held, carry = while_parts(equation, given)
        carry, _ = self._fixpoint(equation.bodies[1], held, carry, [])
        self.run(equation.bodies[0], [*tests, *carry])
        return carry

    def _fixpoint(
        self, body: Program, held: Sequence[V], carry: Sequence[V], xs: Sequence[V]
    ) -> tuple[list[V], list[V]]:
        """The carries that a pass leaves as they are, and what the body makes of them.

        It ends because a join only ever forgets.
        """
        carry = [*carry]
        while True:
            results = self.run(body, [*held, *carry, *xs])
            joined = [*map(self.join, carry, results)]  # ys are left over
            if all(map(self.equal, joined, carry)):
                return joined, results
            carry = joined


class ScanParts(NamedTuple):
    """Which operands of a scan are carried: constants come before, slices after."""

    carried: slice

    def of(self, values: Sequence[V]) -> tuple[Sequence[V], Sequence[V], Sequence[V]]:
        """Constants, carries, and what is scanned."""
        first, last = self.carried.start, self.carried.stop
        return values[:first], values[first:last], values[last:]


def scan_parts(equation: Equation) -> ScanParts:
    """The parts of a scan, from shapes: its parameters have other names by version."""
    eqn, body = equation.eqn, equation.bodies[0]
    stacked = lambda outer, inner: outer.aval.ndim > inner.aval.ndim
    ys = sum(map(stacked, eqn.outvars, body.outvars))
    xs = sum(map(stacked, eqn.invars, body.invars))
    stop = len(eqn.invars) - xs
    return ScanParts(slice(stop - len(eqn.outvars) + ys, stop))


def while_parts(equation: Equation, values: Sequence[V]) -> tuple[Any, Any, Any]:
    """The test's constants, the body's constants, and the carries of a loop."""
    p = equation.eqn.params
    first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    return values[:first], values[first:second], values[second:]


def bind(eqn: Any, values: Sequence[Any], **changes: Any) -> list[Any]:
    """The primitive of an equation on other values."""
    if primitive_of(eqn).kind in ("call", "control", "opaque") and _holds_jaxpr(eqn):
        return bind_whole(eqn, *values)
    results = eqn.primitive.bind(*aligned(values), **{**eqn.params, **changes})
    return [*results] if eqn.primitive.multiple_results else [results]


def _holds_jaxpr(eqn: Any) -> bool:
    return any(True for _ in jaxprs_in_params(eqn.params))


def bind_whole(eqn: Any, *values: Any) -> list[Any]:
    """An equation as it is, whatever functions its parameters hold."""
    values = tuple(aligned(values))
    if varying(values) and eqn.primitive.name in _CUSTOM:
        eqn = _traced_here(eqn, values)
    pattern = next(iter(jaxprs_in_params(eqn.params)))
    fresh = [Var(v.aval) for v in eqn.invars]
    alone = part_of(pattern, [eqn.replace(invars=fresh)], fresh, [*eqn.outvars])
    return jaxpr_as_fun(closed_jaxpr(alone))(*values)


def _traced_here(eqn: Any, values: Sequence[Any]) -> Any:
    """A call with a rule of its own, traced for arrays that vary over a `shard_map`."""
    body = program_of(closed_jaxpr(*called(eqn)))
    run = lambda *xs: _Whole().run(body, xs)
    return eqn.replace(
        params={**eqn.params, "call_jaxpr": jax.make_jaxpr(run)(*values)}
    )


class _Whole(Evaluation):
    """Evaluates a program as it is, calls with rules of their own among it."""

    def call(self, equation: Equation, values: list[Any]) -> Sequence[Any]:
        """A call with a rule of its own stays one."""
        whole = equation.name in _CUSTOM
        return (
            bind_whole(equation.eqn, *values)
            if whole
            else super().call(equation, values)
        )


def run_closed(closed: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of a closed jaxpr, also in a `shard_map` that checks axes."""
    if not varying(values):
        return jaxpr_as_fun(closed)(*values)
    return _Whole().run(program_of(closed), aligned(values))


def evaluate(program: Program, args: Sequence[Any]) -> Env:
    """All values of a program."""
    env: Env = {}
    Evaluation().run(program, args, env)
    return env
