"""One step of a network: arcs read the values of nodes and add to them."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from dagjax.graph.core.functions import Params, State
from dagjax.graph.core.merges import Port
from dagjax.graph.core.topology import Arc, Graph, GraphError
from dagjax.types import Array, PyTree

Values = dict[str, PyTree]  # {node: array, or a tuple of ports}
_NOTHING: State = {}  # of an arc without state; one object, so that it is known again


def start(
    graph: Graph, xs: Iterable[Any], nodes: Iterable[str] | None = None
) -> Values:
    """Values before level 1: the inputs, and zeros at `nodes`.

    By default those get zeros where no arc will deliver.
    """
    xs = graph.signature.inputs(xs)
    if len(xs) != len(graph.inputs):
        raise GraphError(
            f"the network has {len(graph.inputs)} inputs ({', '.join(graph.inputs)}), "
            f"got {len(xs)} arrays"
        )
    values: Values = dict(zip(graph.inputs, map(jnp.asarray, xs), strict=True))
    batch = batch_of(values.values())
    fed = {(arc.target, arc.port) for arc in graph.arcs} if nodes is None else set()
    for node in graph.nodes if nodes is None else nodes:
        if node not in values:
            values[node] = _empty(graph, node, batch, fed)
    return values


def batch_of(xs: Iterable[Any]) -> tuple[int, ...]:
    """`(B,)`, the first axis of the first input that has one; a scalar has none."""
    return next((x.shape[:1] for x in xs if x.shape), ())


def zeros(graph: Graph, batch: tuple[int, ...]) -> Values:
    """Zero at every node, the inputs too; a graph that `init` has seen knows shapes."""
    return {node: _empty(graph, node, batch, set()) for node in graph.nodes}


def sweep(
    graph: Graph,
    arcs: Iterable[Arc],
    params: dict[str, Params],
    state: dict[str, State],
    values: Values,
    *,
    gates: Mapping[str, Any] | None = None,
    train: bool = False,
    key: jax.Array | None = None,
    sign: int = 1,
    onto: Values | None = None,
    context: Hashable = None,
) -> tuple[Values, dict[str, State]]:
    """`z -> z + sign * N(z)`, N the sum of some arcs, each reading the old values.

    `onto` is what they add to, where it is not `z` itself; `context` that of the call,
    by default the one that the values of the inputs give. Tied arcs update their state
    one after the other.
    """
    new = dict(values if onto is None else onto)
    if context is None:
        context = graph.signature.context(params, state, values)
    for arc in arcs:
        value = values[arc.source]
        y, updated = apply_arc(
            graph, arc, params, state, value, train=train, key=key, context=context
        )
        if not arc.reads_all_params and updated is not state.get(
            arc.params_name, _NOTHING
        ):
            state = {**state, arc.params_name: updated}
        gate = None if gates is None else gates.get(arc.name)
        new[arc.target] = deliver(graph, arc, new.get(arc.target), y, gate, sign)
    return new, state


def read(
    graph: Graph,
    node: str,
    value: PyTree,
    params: Params = None,
    state: Any = None,
    context: Hashable = None,
) -> jax.Array:
    """What an arc sees at a node: the sum, or the merge of its ports."""
    merge = graph.merge_of.get(node)
    if merge is None:
        return value
    bind = getattr(merge, "bind", None)  # a merge of a traced function reads leaves
    return merge(value) if bind is None else bind(params, state, context)(value)


def deliver(
    graph: Graph, arc: Arc, old: PyTree, y: Array, gate: Any = None, sign: int = 1
) -> PyTree:
    """The target's value with `gate * y` added, at a port the gate to its presence."""
    if gate is not None:
        y = _scaled(arc, gate, y)
    if arc.port is None:
        return _add(old, y, sign)
    presence = jnp.ones((), y.dtype) if gate is None else jnp.asarray(gate, y.dtype)
    ports = list(old or [Port(None, None)] * (graph.ports(arc.target) or 0))
    value, before = ports[arc.port]
    ports[arc.port] = Port(_add(value, y, sign), _add(before, presence, sign))
    return tuple(ports)


def apply_levels(
    graph: Graph,
    params: dict[str, Params],
    state: dict[str, State],
    values: Values,
    **options: Any,
) -> tuple[Values, dict[str, State]]:
    """All level factors, from values before level 1; options are those of `sweep`."""
    for arcs in graph.at_level[1:]:
        values, state = sweep(graph, arcs, params, state, values, **options)
    return values, state


def apply_arc(
    graph: Graph,
    arc: Arc,
    params: dict[str, Params],
    state: dict[str, State],
    value: PyTree,
    *,
    train: bool = False,
    key: jax.Array | None = None,
    context: Hashable = None,
) -> tuple[PyTree, State]:
    """What an arc makes of the value of its source, and the arc's new state."""
    arc_params, arc_state = params, state
    call = {"context": context} if arc.reads_all_params else {}
    if not arc.reads_all_params:
        by_arc = params if isinstance(params, Mapping) else {}
        arc_params = by_arc.get(arc.params_name, {})
        arc_state = state.get(arc.params_name, _NOTHING)
    random = None if key is None else jax.random.fold_in(key, stream(arc.name))
    x = read(graph, arc.source, value, params, state, context)
    # Profiles and messages show the name.
    with error_context(arc, x), jax.named_scope(arc.name):
        return arc.fn.apply(arc_params, arc_state, x, train=train, key=random, **call)


def stream(name: str) -> int:
    """The number under which an arc draws its random numbers: a hash of its name."""
    return zlib.crc32(name.encode())


def is_traced(tree: PyTree) -> bool:
    """Whether values are not known yet, as under jit."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def error_context(arc: Arc, x: PyTree) -> Iterator[None]:
    """Say in which arc an error arose."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {arc!r}, whose input is {in_words(x)}")
        raise


def _scaled(arc: Arc, gate: Any, y: Array) -> Any:
    """`gate * y` in the type of `y`."""
    gate = jnp.asarray(gate)
    exact = jnp.issubdtype(y.dtype, jnp.inexact)
    if not exact and jnp.issubdtype(gate.dtype, jnp.inexact):
        unknown = isinstance(gate, Tracer)
        if unknown and y.dtype == bool:  # on unless it is zero
            return (gate != 0) & y
        if unknown or (gate.astype(y.dtype) != gate).any():
            shown = f"{gate.dtype}, not known before the call" if unknown else gate
            raise GraphError(
                f"the gate of {arc!r} is {shown}, but it delivers {y.dtype}: gate "
                "integers with whole numbers (under jit an array of integers or "
                "bools), or cast what the arc delivers to floats"
            )
    return gate.astype(y.dtype) * y


def _add(old: Any, y: Any, sign: int) -> Any:
    if y.dtype == bool:  # its own inverse, as a sum must have one
        return y if old is None else jnp.logical_xor(old, y)
    if old is None:
        return y if sign > 0 else -y
    return old + y if sign > 0 else old - y


def _empty(graph: Graph, node: str, batch: tuple[int, ...], fed: set) -> PyTree:
    """Zeros where `(node, port)` is not fed, None where an arc will deliver."""
    ports = graph.ports(node)
    if ports is None:
        return None if (node, None) in fed else zero(graph, node, None, batch)
    return tuple(
        Port(None, None)
        if (node, port) in fed
        else Port(zeros := zero(graph, node, port, batch), jnp.zeros((), zeros.dtype))
        for port in range(ports)
    )


def zero(
    graph: Graph, node: str, port: int | None, batch: tuple[int, ...]
) -> jax.Array:
    """Zero at a node or at one of its ports."""
    space = graph.space_of.get(node)
    if space is None:
        raise GraphError(
            f"the shape of node {node!r} is not known; dagjax.init finds it"
        )
    space = space if port is None else space[port]
    return jnp.zeros(graph.signature.shape(node, port, space, batch), space.dtype)


def in_words(x: PyTree) -> str:
    """Dtype and shape in words."""
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else str(x)
