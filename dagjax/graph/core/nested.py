"""A graph as the function of one arc."""

from __future__ import annotations

from collections.abc import Hashable

import jax

from dagjax.graph.core.dag import DAG, evaluate
from dagjax.graph.core.functions import Function, Params, State, as_function
from dagjax.graph.core.initialize import init
from dagjax.graph.core.topology import Graph, GraphError
from dagjax.types import Key, PyTree


class Nested(Function):
    """A graph as the function of one arc."""

    def __init__(self, graph: Graph):
        if len(graph.inputs) != 1 or len(graph.outputs) != 1:
            raise GraphError(
                f"one arc holds a graph with one input and one output; {graph!r} has "
                f"{len(graph.inputs)} and {len(graph.outputs)}"
            )
        super().__init__(graph, graph, "block")
        self.reads_all_params = any(arc.reads_all_params for arc in graph.arcs)

    def init(self, key: jax.Array, x: PyTree) -> tuple[Params, State]:
        """Parameters and state of the arcs inside, under their names."""
        dag = init(key, self.fn, x)
        return dag.params, dag.state

    def apply(
        self,
        params: Params,
        state: State,
        x: PyTree,
        *,
        train: bool,
        key: Key | None,
        context: Hashable = None,
    ) -> tuple[PyTree, State]:
        """The output of the graph inside."""
        inner = DAG(self.fn, params, state)
        return evaluate(inner, x, context=context, train=train, key=key)

    def own(self, params: Params, name: str) -> PyTree:
        """What the arcs inside read, if that is found in the trees of the network."""
        if not self.reads_all_params:
            return super().own(params, name)
        parts = [arc.fn.own(params, arc.params_name) for arc in self.fn.arcs]
        return {path: leaf for part in parts for path, leaf in part.items()}

    def __repr__(self) -> str:
        steps = []
        for row in self.fn.at_level[1:]:
            step = ", ".join(repr(arc.fn) for arc in row)
            merges = {self.fn.merge_of.get(arc.target) for arc in row} - {None}
            step = f"({step})" if len(row) > 1 else step
            steps.append(" ".join([step, *map(repr, merges)]))
        return " > ".join(steps)


@as_function.register
def _(fn: Graph) -> Function:
    inner = fn.arcs[0].fn if len(fn.arcs) == 1 and not fn.merges else None
    return inner if isinstance(inner, Nested) else Nested(fn)  # a block is itself
