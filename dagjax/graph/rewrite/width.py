"""Narrow a network: every hidden layer by one factor, the readout as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax

from dagjax.graph.core.dag import count_params
from dagjax.graph.core.functions import Function, Linen
from dagjax.graph.core.initialize import init
from dagjax.graph.core.nested import Nested
from dagjax.graph.core.topology import Arc, Graph, GraphError
from dagjax.types import PyTree


def narrow(graph: Graph, factor: float) -> Graph:
    """The same graph with `round(factor * features)` features in every hidden layer.

    The last layers before an output keep their features, also where something without
    any (a softmax, a skip) stands between. Only Flax modules with a field `features`
    are changed.

    Args:
        graph: A graph of Flax layers.
        factor: Greater than 0; 1 leaves the graph as it is.

    Example:
        >>> import dagjax as dj
        >>> dj.narrow(dj.zoo.mlp((100, 10)), 0.3).arcs[0]
        Arc('fc1': in -> n1, flatten > Dense(30))
    """
    return _narrow(graph, factor, last=True)


def narrow_to(graph: Graph, count: int, *xs: PyTree) -> Graph:
    """The narrow graph whose number of parameters is nearest to `count`.

    `xs` are an example batch for each input.

    Raises:
        GraphError: If no layer has a width that could be changed, or the layers do not
            fit any more.

    >>> import dagjax as dj, jax.numpy as jnp
    >>> narrow_to(dj.zoo.mlp((100, 10), input_shape=(4,)), 760, jnp.ones((1, 4)))
    Graph(3 nodes, 2 arcs, 2 levels: in -> out)
    """
    if narrow(graph, 1e-9) == narrow(graph, 1.0):
        raise GraphError(
            f"{graph!r} cannot be narrowed: no hidden layer is a Flax module with a "
            "field `features`"
        )
    low, high, tried = 0.0, 1.0, {}
    for _ in range(12):
        factor = (low + high) / 2
        candidate = narrow(graph, factor)
        if candidate not in tried:
            tried[candidate] = _count(candidate, xs)
        low, high = (factor, high) if tried[candidate] < count else (low, factor)
    return min(tried, key=lambda candidate: abs(tried[candidate] - count))


def _count(graph: Graph, xs: PyTree) -> int:
    try:
        dag = jax.eval_shape(lambda: init(jax.random.key(0), graph, *xs))
    except Exception as error:  # such as a depthwise convolution of other width
        raise GraphError(
            f"{graph!r} cannot be narrowed: with fewer features its layers do not fit "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        ) from error
    return count_params(dag.params)


def with_functions(graph: Graph, change: Callable[[Arc], Function]) -> Graph:
    """The graph with other functions; only its inputs' shapes are known then."""
    arcs = [dataclasses.replace(arc, fn=change(arc)) for arc in graph.arcs]
    known = {n: space for n, space in graph.spaces if n in graph.inputs}
    return graph.replace(arcs=arcs, spaces=known)


def with_features(fn: Function, features: int) -> Function:
    """The same Flax layer with another width."""
    return Linen(fn.fn.clone(features=features))


def has_features(fn: Function) -> bool:
    """Whether a function is a Flax layer with a width, or a graph that has one."""
    if isinstance(fn, Nested):
        return any(has_features(arc.fn) for arc in fn.fn.arcs)
    features = getattr(fn.fn, "features", None)
    return isinstance(fn.fn, nn.Module) and isinstance(features, int)


def _narrow(graph: Graph, factor: float, last: bool) -> Graph:
    """`last`: keep the last layers that have features, narrow what comes before."""
    final = _as_wide_as_the_outputs(graph) if last else frozenset()

    def change(arc: Arc) -> Function:
        fn, keep = arc.fn, arc.target in final
        if isinstance(fn, Nested):
            return Nested(_narrow(fn.fn, factor, keep))
        if keep or not has_features(fn):
            return fn
        return with_features(fn, max(1, round(factor * fn.fn.features)))

    return with_functions(graph, change)


def _as_wide_as_the_outputs(graph: Graph) -> frozenset[str]:
    """The nodes from which an output is reached past no layer with features."""
    final = {*graph.outputs}
    for arc in reversed(graph.arcs):
        if arc.target in final and _passes(arc.fn):
            final.add(arc.source)
    return frozenset(final)


def _passes(fn: Function) -> bool:
    """Whether the width of its input is that of its output."""
    if isinstance(fn, Nested):
        return bool({*fn.fn.inputs} & _as_wide_as_the_outputs(fn.fn))
    return not has_features(fn)
