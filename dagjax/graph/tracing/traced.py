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
from dagjax.graph.tracing.fingerprint import pattern_of
from dagjax.graph.tracing.naming import describe, kind
from dagjax.graph.tracing.neutral import roles, settled
from dagjax.graph.tracing.program import Plan, Request
from dagjax.graph.tracing.roles import is_known

Shape = tuple[int, ...]


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

    def plan(self, shape_in: Callable[[Plan], Shape], new: Shape, what: str) -> Plan:
        """The plan in which a value has the shape `new`.

        Args:
            shape_in: The shape of the value in a plan.
            new: Its shape now.
            what: The value in words.

        Raises:
            TraceError: If no batch size explains the shape.
        """
        for plan in [*self._plans.values()]:
            if shape_in(plan) == new:
                return plan
        old = shape_in(self.base)
        for batch in self._batches(old, new):
            if shape_in(self.at(batch)) == new:
                return self.at(batch)
        raise TraceError(
            f"{what} has the shape {list(new)}; {name_of(self.request.fn)} was traced "
            f"where it has {list(old)}, and only the batch size may be another; trace "
            "it again with inputs of the new shapes"
        )

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
            plan.release()
            self._plans[batch] = plan
        return self._plans[batch]

    def _batches(self, old: Shape, new: Shape) -> list[int]:
        """Batch sizes that may explain why a value has another shape now."""
        if not self.batch:
            return []
        if len(old) != len(new):  # at batch size 1 axes are dropped now and then
            return [n for n in new[:1] if n]
        pairs = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        found = {b * self.batch / a if a else 0 for a, b in pairs}
        return [int(n) for n in found if len(found) == 1 and n >= 1 and n == int(n)]


class Traced(Function):
    """A part of a traced function as the function of an arc.

    It finds its parameters in the user's own tree.
    """

    rooted = True

    def __init__(self, program: Program, name: str):
        super().__init__(program.request.fn, (program, name), name)
        self.program = program
        self._code, piece = program.base.arc(name)
        self._dtype = piece.source.aval.dtype
        work = program.base.cut.work(piece)
        self.opaque = not all(map(is_known, work))
        self.text = ("-" if piece.negated else "") + describe(program.base.flow, work)

    @property
    def reads(self) -> tuple[str, ...]:
        """Paths of the parameters that it reads."""
        return tuple(s.path for s in self._code.slots if s.tree == "params")

    @property
    def pattern(self) -> Hashable:
        """Its equations with their shapes."""
        return self._pattern

    @functools.cached_property
    def _pattern(self) -> Hashable:
        return self.text, pattern_of(self._code.closed)

    def own(self, params: Params, name: str) -> Any:
        """`{path: leaf}` of the parameters that it reads."""
        leaves = jax.tree.leaves(params)
        slots = [slot for slot in self._code.slots if slot.tree == "params"]
        return {slot.path: leaves[slot.place] for slot in slots}

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
        what = f"the input of {self.name!r}"
        if self._dtype != x.dtype:
            raise TraceError(
                f"{what} is {x.dtype}; it was {self._dtype} when the function was "
                "traced: cast it, or trace the function again"
            )
        source = lambda plan: plan.piece_of[self.name].source.aval.shape
        plan = self.program.plan(source, jnp.shape(x), what)
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

    @functools.cached_property
    def pattern(self) -> Hashable:
        """Its equations with their shapes."""
        return pattern_of(self.program.base.merge(self.node).closed)

    def bind(self, params: Params, state: State) -> Callable[..., Any]:
        """The merge with its parameters."""
        return functools.partial(self._read, params, state)

    def _read(self, params: Params, state: State, ports: tuple[Port, ...]) -> Any:
        pairs = zip(self.roles, ports, strict=True)
        values = [role.filled(port, ports) for role, port in pairs]
        (y,) = self._plan(values).merge(self.node)(params, state, *values)
        return settled(self.roles, ports, y)

    def _plan(self, values: list[Any]) -> Plan:
        def shapes(plan: Plan) -> Shape:
            ports = plan.cut.merges[plan.value_of[self.node]].ports
            return tuple(n for port in ports for n in port.aval.shape)

        new = tuple(n for value in values for n in value.shape)
        return self.program.plan(shapes, new, f"what the merge {self.node!r} reads")


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

    def shape(self, node: str, port: int | None, space: Any, batch: Shape) -> Shape:
        """The shape of a node's value at a batch size."""
        plan = self.program.at(batch[0]) if batch else self.program.base
        if node not in plan.value_of:  # one that was not traced
            return super().shape(node, port, space, batch)
        value = plan.value_of[node]
        return (
            value if port is None else plan.cut.merges[value].ports[port]
        ).aval.shape

    def _update(self, read: Callable[[str], Any], net: Any, y: Any) -> Any:
        result = lambda plan: plan.outvars[0].aval.shape
        plan = self.program.plan(result, jnp.shape(y), "the result")
        code, nodes = plan.update
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
