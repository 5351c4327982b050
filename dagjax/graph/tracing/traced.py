"""A traced function as arcs, merges and the form of its arguments."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from dagjax.graph.form import Form
from dagjax.graph.functions import Function, Params, State
from dagjax.graph.identity import canonical
from dagjax.graph.merges import Port
from dagjax.graph.tracing.errors import TraceError, name_of
from dagjax.graph.tracing.naming import describe, kind
from dagjax.graph.tracing.neutral import roles, settled
from dagjax.graph.tracing.program import Plan, Request
from dagjax.graph.tracing.roles import is_known


class Program:
    """A function with its plans, one for each batch size that was met.

    Two programs are equal if the same function (its code and what it closes over) was
    traced at the same shapes to the same equations.

    Args:
        request: What is traced.
    """

    def __init__(self, request: Request):
        self.request, self.base = request, Plan(request)
        self.batch = _batch(request)
        self._plans = {self.batch: self.base}
        shapes = [(v.aval.shape, str(v.aval.dtype)) for v in self.base.flat.invars]
        self.key: Hashable = (
            canonical(request.fn), tuple(shapes), self.base.fingerprint,
            jax.tree.structure(request.args), canonical(request.granularity),
        )  # fmt: skip
        self._hash = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Program) and self.key == other.key)

    def __hash__(self) -> int:
        return self._hash

    def plan(self, old: tuple[int, ...], new: tuple[int, ...], what: str) -> Plan:
        """The plan in which a value of shape `old` has the shape `new`.

        Raises:
            TraceError: If no other batch size explains the shape.
        """
        if old == new:
            return self.base
        batch = self._batch_of(old, new)
        if batch is None:
            raise TraceError(
                f"{what} has the shape {list(new)}; {name_of(self.request.fn)} was "
                f"traced where it has {list(old)}, and only the batch size may be "
                "another; trace it again with inputs of the new shapes"
            )
        return self.at(batch)

    def at(self, batch: int) -> Plan:
        """The plan at another batch size.

        Raises:
            TraceError: If the graph is another one there.
        """
        if batch not in self._plans:
            plan = Plan(_resized(self.request, self.batch, batch))
            ours, theirs = self.base.structure, plan.structure
            if differing := sorted({*ours.items()} ^ {*theirs.items()}):
                raise TraceError(
                    f"the graph of {name_of(self.request.fn)} depends on the batch "
                    f"size: arc {differing[0][0]!r} is {ours.get(differing[0][0])} at "
                    f"batch size {self.batch} and {theirs.get(differing[0][0])} at "
                    f"{batch} (source, target, port); trace it again for this size"
                )
            self._plans[batch] = plan
        return self._plans[batch]

    def _batch_of(self, old: tuple[int, ...], new: tuple[int, ...]) -> int | None:
        pairs = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
        if len(old) != len(new) or not self.batch or not all(a for a, _ in pairs):
            return None
        found = {b * self.batch / a for a, b in pairs}
        batch = found.pop()
        return int(batch) if not found and batch == int(batch) and batch else None


class Traced(Function):
    """A part of a traced function as the function of an arc.

    It finds its parameters in the user's own tree.
    """

    rooted = True

    def __init__(self, program: Program, name: str):
        super().__init__(program.request.fn, (program, name), name)
        self.program = program
        self._code, piece = program.base.arc(name)
        work = program.base.cut.work(piece)
        self.opaque = not all(map(is_known, work))
        self.text = ("-" if piece.negated else "") + describe(program.base.flow, work)

    @property
    def reads(self) -> tuple[int, ...]:
        """Which leaves of the parameters it reads."""
        return tuple(index for kind, index in self._code.leaves if kind == "params")

    def init(self, key: jax.Array, x: Any) -> tuple[Params, State]:
        """A traced function has the parameters that it was traced with."""
        raise TraceError(
            f"{self.name!r} is part of a traced function, which has its parameters; "
            "use the DAG that dagjax.trace gave"
        )

    def apply(
        self, params: Params, state: State, x: Any, *, train: bool, key: Any
    ) -> tuple[Any, State]:
        """Its equations at `x`."""
        del train, key
        source = self._code.closed.jaxpr.invars[0].aval
        what = f"the input of {self.name!r}"
        plan = self.program.plan(source.shape, jnp.shape(x), what)
        code, piece = plan.arc(self.name)
        (y,) = code(params, state, x)
        y = -y if piece.negated else y
        shape = piece.target.aval.shape
        whole = piece.port is not None or y.shape == shape
        return y if whole else jnp.broadcast_to(y, shape), state

    def __repr__(self) -> str:
        return self.text


class TracedMerge:
    """Equations of a traced function in which branches meet."""

    def __init__(self, program: Program, node: str):
        self.program, self.node = program, node
        self._value = program.base.value_of[node]
        self._meeting = program.base.cut.merges[self._value]
        self.word = kind(self._meeting.equations)
        self.roles = roles(self._meeting)
        self.opaque = not all(map(is_known, self._meeting.equations))
        moving = {"concatenate", "stack", "broadcast_in_dim", "reshape", "transpose"}
        self.additive = moving.issuperset(e.name for e in self._meeting.equations)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TracedMerge) and (self.program, self.node) == (
            other.program, other.node
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash((self.program, self.node))

    def __repr__(self) -> str:
        return self.word.capitalize()

    def bind(self, params: Params, state: State) -> Callable[..., Any]:
        """The merge with its parameters."""
        return functools.partial(self._read, params, state)

    def _read(self, params: Params, state: State, ports: tuple[Port, ...]) -> Any:
        pairs = zip(self.roles, ports, strict=True)
        values = [role.filled(port, ports) for role, port in pairs]
        (y,) = self._plan(values).merge(self.node)(params, state, *values)
        return settled(self.roles, ports, y)

    def _plan(self, values: list[Any]) -> Plan:
        for old, new in zip(self._meeting.ports, values, strict=True):
            if old.aval.shape != new.shape:
                what = f"a port of {self.node!r}"
                return self.program.plan(old.aval.shape, new.shape, what)
        return self.program.base


@dataclasses.dataclass(frozen=True)
class TracedForm(Form):
    """The arguments and the result of the function that was traced."""

    program: Program

    def inputs(self, xs: Iterable[Any]) -> tuple[Any, ...]:
        """The arrays among the leaves; keys are no data."""
        given = [x for x in jax.tree.leaves(tuple(xs)) if not is_key(x)]
        plan = self.program.base
        if len(given) > len(plan.inputs):  # keys of the older kind
            given = [x for i, x in enumerate(given) if i not in self._key_places()]
        shapes = [v.aval for v in plan.inputs]
        if len(given) != len(shapes):
            raise TraceError(
                f"{name_of(self.program.request.fn)} was traced with {len(shapes)} "
                f"arrays ({', '.join(s.str_short() for s in shapes)}), got {len(given)}"
            )
        return tuple(given)

    def context(self, xs: Iterable[Any], state: Any) -> Any:
        """The state with the keys of this call."""
        places = self._key_places()
        given = jax.tree.leaves(tuple(xs))
        if not places or len(given) != len(places) + len(self.program.base.inputs):
            return state
        return {**state, "keys": [given[i] for i in places]}

    def result(
        self, read: Callable[[str], Any], outputs: tuple[str, ...], net: Any
    ) -> tuple[Any, Any]:
        """The tree that the function returns, and the state with what it updates."""
        plan = self.program.base
        names = [plan.names.nodes[v] for v in plan.outvars]
        values = {name: read(name) for name in dict.fromkeys(names)}
        tree = jax.tree.structure(plan.result)
        y = jax.tree.unflatten(tree, [values[name] for name in names])
        if plan.new_state is None:
            return y, net.state
        return y, {**net.state, "user": self._update(read, net, values[names[0]])}

    def _update(self, read: Callable[[str], Any], net: Any, y: Any) -> Any:
        program = self.program
        ours = program.base.outvars[0].aval.shape
        plan = program.plan(ours, jnp.shape(y), "the result")
        code, nodes = plan.update()
        leaves = code(net.params, net.state, *map(read, nodes))
        return jax.tree.unflatten(jax.tree.structure(plan.new_state), leaves)

    def _key_places(self) -> list[int]:
        """Where the keys stand among the leaves of the inputs."""
        plan = self.program.base
        inputs = plan.flat.invars[-len(jax.tree.leaves(plan.request.inputs)) :]
        return [i for i, v in enumerate(inputs) if v in plan.slots]


def is_key(x: Any) -> bool:
    """Whether a leaf is a typed random key."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _batch(request: Request) -> int:
    """The size of the first axis of the first input that has one; 0 if none has."""
    arrays = [x for x in jax.tree.leaves(request.inputs) if not is_key(x)]
    return next((x.shape[0] for x in arrays if x.shape), 0)


def _resized(request: Request, old: int, new: int) -> Request:
    """The request with another batch size."""

    def resized(x: Any) -> Any:
        if is_key(x) or x.shape[:1] != (old,):
            return x
        return jax.ShapeDtypeStruct((new, *x.shape[1:]), x.dtype)

    inputs = jax.tree.map(resized, request.inputs)
    return dataclasses.replace(request, inputs=inputs)
