"""The network: a static graph with its parameters and state, a pytree."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dagjax.graph.core.functions import Params, State
from dagjax.graph.core.levels import Values, read, start, sweep
from dagjax.graph.core.topology import Arc, Graph
from dagjax.types import PyTree

_BATCH = 2  # where a graph does not say at which batch size it was made


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "state"],
    meta_fields=["graph"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class DAG:
    """A network as a directed acyclic graph of functions.

        h_v = b_v + sum over arcs u -> v of  gate * f(params, h_u)

    A pytree: `graph` is static, `params` are trained, `state` (statistics) is not.
    `jit`, `vmap` and checkpoints take the whole DAG; differentiate `dag.params`.

    Args:
        graph: Nodes and arcs.
        params: `{arc: parameters}`; tied arcs have one entry under their common name.
        state: `{arc: {collection: variables}}`.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.series(nn.Dense(8), nn.relu, nn.Dense(3))
        >>> dag = dj.init(jax.random.key(0), graph, jnp.ones((2, 4)))
        >>> dag(jnp.ones((5, 4))).shape
        (5, 3)
        >>> loss = lambda params, x: dag.replace(params=params)(x).sum()
        >>> grads = jax.grad(loss)(dag.params, jnp.ones((5, 4)))
        >>> jax.tree.map(jnp.shape, grads["Dense"])
        {'bias': (8,), 'kernel': (4, 8)}
    """

    graph: Graph
    params: dict[str, Params]
    state: dict[str, State]

    def __call__(self, *xs: PyTree, gates: Mapping[str, Any] | None = None) -> PyTree:
        """The outputs at `xs`, in inference mode.

        Args:
            *xs: One array `[B, ...]` for each input node.
            gates: `{arc: gate}` that scale what each arc delivers; 1 where not named.

        Returns:
            The value of the output node; a tuple where there are several.
        """
        return self.apply(*xs, gates=gates)[0]

    def apply(
        self,
        *xs: PyTree,
        gates: Mapping[str, Any] | None = None,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[Any, dict[str, State]]:
        """Outputs and new state; `train=True` updates batch statistics, drops out.

        Args:
            *xs: One array `[B, ...]` for each input node.
            gates: `{arc: gate}`; 1 where not named.
            train: Static mode flag, handed to modules that take one.
            key: For random arcs in train mode; each arc draws from its own stream.
        """
        self.graph.select(gates or ())  # names that do not exist
        return evaluate(self, *xs, gates=gates, train=train, key=key)

    def read(self, node: str, value: PyTree) -> Any:
        """What an arc sees at a node: the sum, or the merge of its ports."""
        return read(self.graph, node, value, self.params, self.state)

    @property
    def example_inputs(self) -> tuple[PyTree, ...] | None:
        """Shapes of inputs that it takes."""
        graph, traced = self.graph, self.graph.signature.example_inputs
        if traced is not None or not {*graph.inputs} <= {*graph.space_of}:
            return traced
        spaces = [graph.space_of[node] for node in graph.inputs]
        return tuple(jax.ShapeDtypeStruct(s.sized((_BATCH,)), s.dtype) for s in spaces)

    @property
    def updated_state(self) -> tuple[str, ...]:
        """Paths of the state that each call updates."""
        return self.graph.signature.updated_state

    @property
    def user_state(self) -> Any:
        """What is not trained, as it was given when the network was traced."""
        return self.state.get("user", {})

    def replace(self, **changes: Any) -> DAG:
        """A copy with other fields: `dag.replace(params=params)`."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        return f"DAG({self.graph!r}, {count_params(self.params):,} parameters)"


def evaluate(
    dag: DAG, *xs: PyTree, context: Hashable = None, **options: Any
) -> tuple[Any, dict[str, State]]:
    """Outputs and new state: `h = b`, then level by level.

        h_v = h_v + sum over arcs u -> v of  gate * f(params, h_u)

    Args:
        dag: The network.
        *xs: One array `[B, ...]` for each input node.
        context: What the arcs know of the call; by default its signature says.
        **options: Those of `sweep`: gates, train, key.
    """
    graph, params, state = dag.graph, dag.params, dag.state
    h = start(graph, xs)
    if context is None:
        context = graph.signature.context(params, state, h, xs)
    for arcs in graph.at_level[1:]:
        h, state = sweep(graph, arcs, params, state, h, context=context, **options)
    output = lambda v: read(graph, v, h[v], params, state, context)
    return graph.signature.result(output, graph.outputs, state, context)


def gates(dag: DAG | Graph) -> dict[str, jax.Array]:
    """All gates open: `{arc: 1.0}`.

    Example:
        >>> import dagjax as dj
        >>> dj.gates(dj.zoo.lenet_300_100())
        {'fc1': Array(1., dtype=float32), 'fc2': ..., 'fc3': ...}
    """
    graph = dag if isinstance(dag, Graph) else dag.graph
    return {arc.name: jnp.ones(()) for arc in graph.arcs}


def inject(dag: DAG, *xs: PyTree) -> Values:
    """The injection `b`: inputs at the input nodes, zero at all others.

    Args:
        dag: The network.
        *xs: One array `[B, ...]` for each input node.

    Returns:
        `{node: value}`; a merge node's value is a tuple of ports.
    """
    return start(dag.graph, xs, nodes=dag.graph.nodes)


def parts_of(
    dag: DAG, arcs: Iterable[Arc]
) -> tuple[dict[str, Params], dict[str, State]]:
    """Parameters and state of some arcs; arcs that read the whole trees keep them."""
    if any(arc.reads_all_params for arc in dag.graph.arcs):
        return dag.params, dag.state
    names = dict.fromkeys(arc.params_name for arc in arcs)
    params, state = dag.params, dag.state
    return {n: params[n] for n in names if n in params}, {
        n: state[n] for n in names if n in state
    }


def count_params(params: Params) -> int:
    """The number of scalars in a tree of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
