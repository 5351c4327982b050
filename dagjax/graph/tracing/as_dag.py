"""The DAG of any network: itself, or the graph of its program."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import jax

from dagjax.graph.core.dag import DAG
from dagjax.graph.core.network import Network
from dagjax.graph.core.topology import Graph, GraphError
from dagjax.graph.tracing.trace import dag_of
from dagjax.graph.tracing.traced_function import TracedFunction
from dagjax.jaxprs.gc_paused import gc_paused
from dagjax.jaxprs.versions import shape_of, trace_context
from dagjax.types import Params, PyTree, State


def as_dag(net: Network) -> DAG:
    """A network as a DAG on the same tree of parameters.

    A compacted or a sparse network is traced, so that what works on arcs (`dj.delete`,
    `dj.factors`, `dj.linearize`, ...) works on it too. A DAG is returned as it is.

    Args:
        net: A network that knows the shapes of its inputs.

    Raises:
        GraphError: If it is no network, or does not know those shapes.
        TraceError: If its program is no graph: an output that no input changes.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.series(nn.Dense(8), nn.relu, nn.Dense(3))
        >>> dag = dj.init(jax.random.key(0), graph, jnp.ones((2, 4)))
        >>> small = dj.compact(dag, dj.prune_units(dag, density=0.5)).net
        >>> dj.as_dag(small).graph.arcs
        (Arc('Dense': x -> Dense, dense 4x4 > ...), Arc('Dense_1': ...))
    """
    if isinstance(net, DAG):
        return net
    if not isinstance(net, Network):
        raise GraphError(f"a graph or a network was expected, got {type(net).__name__}")
    if net.example_inputs is None:
        raise GraphError("the network does not know the shapes of its inputs")
    dag = _traced(trace_context(), *_static(net.example_inputs), *_static(net))
    user_state = {} if net.state is None else {"user": net.state}
    return dag.replace(params=net.params, state={**dag.state, **user_state})


def graph_of(net: Network | Graph) -> Graph:
    """The graph of a network, or the graph itself."""
    return net if isinstance(net, Graph) else as_dag(net).graph


def _static(tree: PyTree) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """What can be compared: the structure of a tree, and its shapes."""
    leaves, form = jax.tree.flatten(tree)
    return form, tuple(map(shape_of, leaves))


@functools.lru_cache(maxsize=16)
@gc_paused()
def _traced(
    context: Hashable, form: Any, xs: PyTree, tree: PyTree, shapes: PyTree
) -> DAG:
    """Traced once for networks of one structure; it holds constants, no parameters."""
    del context
    net = tree.unflatten(shapes)
    blank = net.replace(params=None, state=None)
    run = functools.partial(_call, jax.tree.structure(blank))
    vars(run)["__qualname__"] = type(net).__name__  # what messages call it
    inputs = form.unflatten(xs)
    function = TracedFunction(run, net.params, net.state, inputs, "layers", False)
    return dag_of(function, None, None)


def _call(tree: PyTree, params: Params, state: State, *xs: PyTree) -> Any:
    return tree.unflatten(()).replace(params=params, state=state)(*xs)
