"""A traced function as arcs, merges and the form of its arguments."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from dagjax.graph.core.functions import Function, Params, State
from dagjax.graph.core.merges import Port
from dagjax.graph.core.signature import Signature
from dagjax.graph.tracing.code import CallContext
from dagjax.graph.tracing.naming import describe, kind
from dagjax.graph.tracing.neutral import roles, settled
from dagjax.graph.tracing.plan import Plan
from dagjax.graph.tracing.traced_function import Shape, TracedFunction
from dagjax.jaxprs.fingerprint import pattern_of
from dagjax.jaxprs.messages import TraceError, name_of
from dagjax.jaxprs.primitives import is_key, is_known
from dagjax.types import Key, PyTree


class Traced(Function):
    """A part of a traced function as the function of an arc.

    It finds its parameters in the user's own tree.
    """

    reads_all_params = True

    def __init__(self, function: TracedFunction, name: str):
        super().__init__(function.fn, (function, name), name)
        self.function = function
        piece = function.base.piece_of[name]
        self._code = function.base.whole_arc(name)
        self._dtype = piece.source.aval.dtype
        work = function.base.cut.work(piece)
        self.opaque = not all(map(is_known, work))
        self.text = ("-" if piece.negated else "") + describe(function.base.flow, work)

    def __reduce__(self) -> tuple[Any, ...]:
        return Traced, (self.function, self.name)

    @property
    def reads(self) -> tuple[str, ...]:
        """Paths of the parameters that it reads."""
        return tuple(s.path for s in self._code.leaves if s.tree == "params")

    @property
    def pattern(self) -> Hashable:
        """Its equations with their shapes."""
        return self._pattern

    @functools.cached_property
    def _pattern(self) -> Hashable:
        return self.text, pattern_of(self._code.closed)

    def own(self, params: Params, name: str) -> PyTree:
        """`{path: leaf}` of the parameters that it reads."""
        leaves = self.function.leaves(params, {})["params"]
        indices = [leaf for leaf in self._code.leaves if leaf.tree == "params"]
        return {leaf.path: leaves[leaf.position] for leaf in indices}

    def init(self, key: jax.Array, x: PyTree) -> tuple[Params, State]:
        """A traced function has the parameters that it was traced with."""
        raise TraceError(
            f"{self.name!r} is part of a traced function, which has its parameters; "
            "use the DAG that dagjax.trace gave"
        )

    def apply(
        self,
        params: Params,
        state: State,
        x: PyTree,
        *,
        train: bool,
        key: Key | None,
        context: CallContext | None = None,
    ) -> tuple[PyTree, State]:
        """Its equations at `x`."""
        del train, key
        what = f"the input of {self.name!r}"
        if self._dtype != x.dtype:
            raise TraceError(
                f"{what} is {x.dtype}; it was {self._dtype} when the function was "
                "traced: cast it, or trace the function again"
            )
        source = lambda plan: plan.piece_of[self.name].source.aval.shape
        if context is None:
            context = CallContext(None, self.function.leaves(params, state))
        plan = _plan(self.function, context, source, x.shape, what)
        code, piece = plan.arc(self.name)
        between = (piece.source, piece.end)  # other arcs may deliver it elsewhere
        (y,) = context.once(between, [x], lambda: code(context, x))
        y = -y if piece.negated else y
        shape = piece.target.aval.shape
        fits = piece.port is not None or y.shape == shape
        return y if fits else jnp.broadcast_to(y, shape), state

    def __repr__(self) -> str:
        return self.text


class TracedMerge:
    """Equations of a traced function in which branches meet."""

    def __init__(self, function: TracedFunction, node: str):
        self.function, self.node = function, node
        self._value = function.base.value_of[node]
        self._join = function.base.cut.merges[self._value]
        self.word = kind(self._join.equations)
        self.roles = roles(self._join)
        self.opaque = not all(map(is_known, self._join.equations))
        moving = {"concatenate", "stack", "broadcast_in_dim", "reshape", "transpose"}
        self.additive = moving.issuperset(e.name for e in self._join.equations)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TracedMerge) and (self.function, self.node) == (
            other.function, other.node
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash((self.function, self.node))

    def __deepcopy__(self, memo: dict[int, object]) -> TracedMerge:
        return self  # frozen

    def __reduce__(self) -> tuple[Any, ...]:
        return TracedMerge, (self.function, self.node)

    def __repr__(self) -> str:
        return self.word.capitalize()

    @functools.cached_property
    def pattern(self) -> Hashable:
        """Its equations with their shapes."""
        return pattern_of(self.function.base.whole_merge(self.node).closed)

    def bind(
        self, params: Params, state: State, context: CallContext | None = None
    ) -> Callable[..., Any]:
        """The merge with its parameters."""
        if context is None:
            context = CallContext(None, self.function.leaves(params, state))
        return functools.partial(self._read, context)

    def _read(self, context: CallContext, ports: tuple[Port, ...]) -> jax.Array:
        """Once for all arcs that read the node."""
        arrived = [x for port in ports for x in port]
        return context.once(self.node, arrived, lambda: self._merged(context, ports))

    def _merged(self, context: CallContext, ports: tuple[Port, ...]) -> jax.Array:
        pairs = zip(self.roles, ports, strict=True)
        values = [role.filled(port, ports) for role, port in pairs]
        new, what = _sizes(values), f"what the merge {self.node!r} reads"
        plan = _plan(self.function, context, self._shapes, new, what)
        (y,) = plan.merge(self.node)(context, *values)
        return settled(self.roles, ports, y)

    def _shapes(self, plan: Plan) -> Shape:
        value = plan.value_of[self.node]
        return _sizes(port.aval for port in plan.cut.merges[value].ports)


@dataclasses.dataclass(frozen=True)
class TracedSignature(Signature):
    """The arguments and the result of the function that was traced."""

    function: TracedFunction

    @property
    def example_inputs(self) -> tuple[PyTree, ...]:
        """Shapes of inputs that it takes."""
        return self.function.inputs

    @property
    def updated_state(self) -> tuple[str, ...]:
        """Paths of the numbers of the state that the function returns changed."""
        plan = self.function.base
        if plan.new_state is None:
            return ()
        state = [leaf for leaf in plan.leaf_of.values() if leaf.tree == "user"]
        path_of = {leaf.position: leaf.path for leaf in state}
        return tuple(
            path_of[leaf]
            for leaf, atom in enumerate(plan.state_outvars)
            if not (atom in plan.state_values and atom in plan.leaf_of)
            and jnp.issubdtype(atom.aval.dtype, jnp.inexact)  # counts of keys may go on
        )

    def inputs(self, xs: Iterable[Any]) -> tuple[Any, ...]:
        """The arrays among the leaves; keys are no data."""
        xs, plan = tuple(xs), self.function.base
        traced = self.function.inputs
        ours, theirs = jax.tree.structure(traced), jax.tree.structure(xs)
        if len(xs) == len(traced) and ours != theirs:
            raise TraceError(
                f"{name_of(self.function.fn)} was traced with inputs of the "
                f"form {ours}, got {theirs}"
            )
        given, keys = jax.tree.leaves(xs), plan.key_places
        if len(given) == len(plan.inputs) + len(keys):
            given = [x for i, x in enumerate(given) if i not in keys]
        shapes = [v.aval for v in plan.inputs]
        if len(given) != len(shapes) or any(map(is_key, given)):
            names = ", ".join(shape.str_short() for shape in shapes)
            raise TraceError(
                f"{name_of(self.function.fn)} was traced with {len(shapes)} "
                f"arrays ({names}) and {len(keys)} keys, got {len(given)} leaves; its "
                "parameters and state are in the DAG (dag.replace(params=...))"
            )
        return tuple(given)

    def context(
        self,
        params: Params,
        state: State,
        values: dict[str, PyTree],
        xs: Iterable[Any] = (),
    ) -> CallContext:
        """The plan that the inputs fit, and the leaves with the keys of this call."""
        base, given = self.function.base, jax.tree.leaves(tuple(xs))
        leaves = self.function.leaves(params, state)
        places = base.key_places
        if places and len(given) == len(places) + len(base.inputs):
            leaves["keys"] = [given[i] for i in places]
        names = [base.names.nodes[v] for v in base.inputs]
        if not {*names} <= {*values}:
            return CallContext(None, leaves)
        shapes = lambda plan: _sizes(v.aval for v in plan.inputs)
        new, what = _sizes(values[name] for name in names), ", ".join(names)
        return CallContext(self.function.plan(shapes, new, f"the input {what}"), leaves)

    def result(
        self,
        read: Callable[[str], Any],
        outputs: tuple[str, ...],
        state: Any,
        context: Any,
    ) -> tuple[Any, Any]:
        """The tree that the function returns, and the state with what it updates."""
        plan = context.plan or self.function.base
        names = [plan.names.nodes[v] for v in plan.outvars]
        if outputs != tuple(dict.fromkeys(names)):  # a part of the network
            return super().result(read, outputs, state, context)
        values = {name: read(name) for name in outputs}
        tree = jax.tree.structure(plan.result)
        y = jax.tree.unflatten(tree, [values[name] for name in names])
        if plan.new_state is None:
            return y, state
        code, nodes = plan.update
        new = code(context, *map(read, nodes))
        tree = jax.tree.structure(plan.new_state)
        return y, {**state, "user": jax.tree.unflatten(tree, new)}

    def shape(self, node: str, port: int | None, space: Any, batch: Shape) -> Shape:
        """The shape of a node's value at a batch size."""
        plan = self.function.at(batch[0]) if batch else self.function.base
        if node not in plan.value_of:  # one that was not traced
            return super().shape(node, port, space, batch)
        value = plan.value_of[node]
        value = value if port is None else plan.cut.merges[value].ports[port]
        return value.aval.shape


def _plan(
    function: TracedFunction, context: CallContext, shape_in: Any, new: Shape, what: str
) -> Plan:
    """The plan for values of a shape: that of the call, if they have it there."""
    if context.plan is not None and shape_in(context.plan) == new:
        return context.plan
    return function.plan(shape_in, new, what)


def _sizes(values: Iterable[Any]) -> Shape:
    """The shapes of several values one after the other."""
    return tuple(size for value in values for size in value.shape)
