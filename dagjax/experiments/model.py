"""A network to train: a graph, with gates among its parameters if arcs are pruned."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax

from dagjax.graph.core import dag as _dag
from dagjax.graph.core import initialize
from dagjax.graph.core.combine import as_graph
from dagjax.graph.core.network import Network
from dagjax.graph.core.topology import Graph
from dagjax.types import Array, Key, PyTree, State

Theta = dict[str, PyTree]  # {"params": {arc: ...}, "gates": {arc: gate} or {}}


class Trainable(Protocol):
    """What training asks of a network."""

    def shapes(self, x: Array) -> tuple[Theta, State, PyTree]:
        """Shapes of the parameters, the state and the outputs."""
        ...

    def apply(
        self,
        theta: Theta,
        state: State,
        x: Array,
        *,
        train: bool = False,
        key: Key | None = None,
    ) -> tuple[PyTree, State]:
        """Outputs and new state."""
        ...


@dataclasses.dataclass(frozen=True)
class Model:
    """`init(key, x) -> (theta, state)` and `apply(theta, state, x) -> (y, state)`.

    Args:
        graph: The network.
        gated: Whether gates stand among the parameters; they are pruned, not trained.
    """

    graph: Graph
    gated: bool = False

    def init(self, key: Key, x: Array) -> tuple[Theta, State]:
        """Initial parameters, open gates, initial state."""
        dag = initialize.init(key, self.graph, x)
        gates = _dag.gates(dag) if self.gated else {}
        return {"params": dag.params, "gates": gates}, dag.state

    def shapes(self, x: Array) -> tuple[Theta, State, PyTree]:
        """Shapes of the parameters, the state and the outputs; nothing is computed."""
        make = lambda key: self.init(key, x)
        theta, state = jax.eval_shape(make, jax.random.key(0))
        outputs = jax.eval_shape(lambda t, s: self.apply(t, s, x)[0], theta, state)
        return theta, state, outputs

    def apply(
        self,
        theta: Theta,
        state: State,
        x: Array,
        *,
        train: bool = False,
        key: Key | None = None,
    ) -> tuple[PyTree, State]:
        """Outputs and new state."""
        dag = _dag.DAG(self.graph, theta["params"], state)
        return dag.apply(x, gates=theta["gates"] or None, train=train, key=key)


def as_model(net: Network, gated: bool = False) -> Model:
    """A graph, a Flax Linen module or a pair `(init, apply)` as a model.

    Example:
        >>> import flax.linen as nn
        >>> as_model(nn.Dense(3)).graph
        Graph(2 nodes, 1 arcs, 1 levels: in -> out)
    """
    if isinstance(net, _dag.DAG):
        raise ValueError(
            f"{net!r} has its parameters, and an experiment draws them anew for each "
            "seed: give it the graph (dag.graph); of a traced network the module or "
            "a pair (init, apply)"
        )
    return Model(as_graph(net), gated)
