"""Initial parameters, and the shape of every node."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.graph.core.dag import DAG
from dagjax.graph.core.functions import Function, Params, State
from dagjax.graph.core.levels import (
    Values,
    apply_arc,
    apply_levels,
    batch_of,
    deliver,
    error_context,
    in_words,
    is_traced,
    read,
    start,
    stream,
    zero,
    zeros,
)
from dagjax.graph.core.topology import Arc, Graph, GraphError, Space
from dagjax.jaxprs.versions import shape_of, trace_context
from dagjax.types import PyTree

_MANY = 64  # equal arcs that are initialized in one call
_ODD = 97  # a batch size that no other axis is likely to have


def init(key: jax.Array, graph: Graph, *xs: PyTree) -> DAG:
    """Initialize every arc from the shapes of an example batch.

    Arc `a` draws from `fold_in(key, hash of the name a)`, so an arc that is deleted or
    inserted leaves the others' initial values alone. Tied arcs are initialized once.

    Args:
        key: A typed key.
        graph: The graph.
        *xs: One example `[B, ...]` for each input node; shapes and dtypes are enough.

    Returns:
        A DAG whose graph knows the space of every node.

    Raises:
        GraphError: If two arcs of a sum deliver different shapes.

    Example:
        >>> import dagjax as dj, jax, jax.numpy as jnp
        >>> dj.init(jax.random.key(0), dj.zoo.lenet_300_100(), jnp.ones((1, 28, 28, 1)))
        DAG(Graph(4 nodes, 3 arcs, 3 levels: in -> out), 266,610 parameters)
    """
    specs = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in xs]
    values = jax.eval_shape(functools.partial(start, graph), specs)
    alike: dict[Any, dict[str, PyTree]] = {}  # what one draw can initialize
    for arc in graph.arcs:
        x = _shape_at(graph, arc.source, values)
        with error_context(arc, x):
            y = _output_shape(trace_context(), arc.fn, jax.tree.map(shape_of, x))
        old = values.get(arc.target)
        _check_sum(graph, arc, old, y)
        values[arc.target] = _delivered(graph, arc, old, y)
        alike.setdefault((arc.fn, x), {}).setdefault(arc.params_name, arc)
    for node in graph.outputs:
        _shape_at(graph, node, values)
    params, state = {}, {}
    for (fn, x), arcs in alike.items():
        with error_context(next(iter(arcs.values())), x):
            for name, own, held in _drawn(key, fn, x, list(arcs)):
                params |= {name: own} if jax.tree.leaves(own) else {}
                state |= {name: held} if jax.tree.leaves(held) else {}
    order = dict.fromkeys(arc.params_name for arc in graph.arcs)
    batch = batch_of(specs)
    spaces = jax.tree.map(lambda v: _space(v, batch), _values_only(values))
    return DAG(
        graph.replace(spaces=spaces),
        {name: params[name] for name in order if name in params},
        {name: state[name] for name in order if name in state},
    )


def shaped(dag: DAG) -> DAG:
    """The same network, its graph with the space of every node; nothing is computed."""
    graph = dag.graph
    if not all(node in graph.space_of for node in graph.inputs):
        return dag

    def values(dag: DAG) -> Values:
        z = start(graph, [zero(graph, node, None, (_ODD,)) for node in graph.inputs])
        return _values_only(apply_levels(graph, dag.params, dag.state, z)[0])

    found = jax.tree.map(lambda v: _space(v, (_ODD,)), jax.eval_shape(values, dag))
    return dag.replace(graph=graph.replace(spaces=found))


def check_arc(dag: DAG, arc: Arc) -> None:
    """Whether an arc can read its source and add to its target; nothing is computed.

    Raises:
        GraphError: If its parameters do not fit, or what it delivers does not.
    """
    graph = dag.graph
    if arc.source not in graph.space_of or arc.target not in graph.space_of:
        return
    own = dag.params.get(arc.params_name, {})

    def run(dag: DAG) -> tuple[Any, Any]:
        z = zeros(graph, (1,))
        y, _ = apply_arc(graph, arc, dag.params, dag.state, z[arc.source])
        return y, z[arc.target]

    try:
        y, old = jax.eval_shape(run, dag)
    except Exception as error:
        raise GraphError(
            f"{arc!r} cannot read {arc.source!r} with the parameters that it was given "
            f"({jax.tree.map(jnp.shape, own)}): {error}"
        ) from error
    _check_sum(graph, arc, old, y)


@functools.lru_cache(maxsize=4096)  # blocks in blocks would ask again and again
def _output_shape(context: PyTree, fn: Function, x: PyTree) -> PyTree:
    """The shape of what a function makes of `x`; nothing is computed."""
    del context

    def run(x: PyTree) -> jax.Array:
        own, held = fn.init(jax.random.key(0), x)
        return fn.apply(own, held, x, train=False, key=None)[0]

    return jax.tree.map(shape_of, jax.eval_shape(run, x))


def _drawn(
    key: jax.Array, fn: Function, x: PyTree, names: list[str]
) -> Iterator[tuple[str, Params, State]]:
    """Initial parameters and state of equal arcs; of very many in one call."""
    if len(names) < _MANY:
        for name in names:
            yield name, *fn.init(jax.random.fold_in(key, stream(name)), x)
        return
    drawn = draw_stacked(key, fn, x, names)
    if not is_traced(drawn):
        drawn = jax.device_get(drawn)  # rows of host arrays cost nothing
    leaves, tree = jax.tree.flatten(drawn)
    for i, name in enumerate(names):
        yield name, *tree.unflatten([jnp.asarray(leaf[i]) for leaf in leaves])


def draw_stacked(
    key: jax.Array, fn: Function, x: PyTree, names: Iterable[str]
) -> tuple[Params, State]:
    """Initial parameters and state of equal arcs along a new first axis."""
    codes = np.array([stream(name) for name in names], np.uint32)
    draw = lambda code: fn.init(jax.random.fold_in(key, code), x)
    return jax.vmap(draw)(codes)  # not jitted: the bits of one by one


def _delivered(graph: Graph, arc: Arc, old: PyTree, y: PyTree) -> PyTree:
    """The shape of the target's value with `y` added."""
    if arc.port is None:
        return y if old is None else jax.eval_shape(jnp.add, old, y)
    return jax.eval_shape(functools.partial(deliver, graph, arc), old, y)


def _shape_at(graph: Graph, node: str, values: Values) -> PyTree:
    if node not in graph.merge_of:
        return values[node]
    try:
        return jax.eval_shape(functools.partial(read, graph, node), values[node])
    except Exception as error:
        arcs = graph.arcs_into(node)
        shapes = [in_words(values[node][arc.port].value) for arc in arcs]
        given = ", ".join(
            f"{arc.name} delivers {shape} to port {arc.port}"
            for arc, shape in zip(arcs, shapes, strict=True)
        )
        raise GraphError(
            f"{graph.merge_of.get(node)!r} cannot merge at node {node!r}: {given}; "
            f"{error}"
        ) from error


def _values_only(values: Values) -> Values:
    return {
        node: tuple(p.value for p in v) if isinstance(v, tuple) else v
        for node, v in values.items()
    }


def _space(value: PyTree, batch: tuple[int, ...]) -> Space:
    batched = bool(batch) and value.shape[:1] == batch
    return Space(value.shape[1:] if batched else value.shape, str(value.dtype), batched)


def _check_sum(graph: Graph, arc: Arc, old: PyTree, y: PyTree) -> None:
    if not hasattr(y, "shape"):
        raise GraphError(f"{arc!r} must return one array, got {type(y).__name__}")
    if arc.port is None and old is not None and old.shape != y.shape:
        others = [a.name for a in graph.arcs_into(arc.target) if a.name != arc.name]
        raise GraphError(
            f"node {arc.target!r} sums different shapes: {', '.join(others)} deliver "
            f"{old.shape}, {arc.name} delivers {y.shape}; give the odd one a projection"
        )
