"""Whole arcs of sums as units: their parameters, and the products that are theirs."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from dagjax.compaction.channels.cost_model import Terms
from dagjax.compaction.channels.grouping import Group, Member
from dagjax.compaction.channels.traced_network import TracedNetwork
from dagjax.graph.core.topology import Graph
from dagjax.jaxprs.program import Equation

ARCS = "arcs"  # the name of their group


@dataclasses.dataclass(frozen=True, eq=False)
class ArcUnits:
    """Arcs that can go.

    Args:
        leaves: `{arc: indices of its parameters}` of arcs that can go.
        names: All arcs of the graph.
        of_terms: For each term of the operations the arc whose parameters alone it
            reads, or None.
    """

    leaves: dict[str, tuple[int, ...]]
    names: frozenset[str]
    of_terms: tuple[str | None, ...]

    def parameters(self, arcs: Iterable[str]) -> set[int]:
        """Indices of the parameters of some arcs."""
        return {leaf for arc in arcs for leaf in self.leaves[arc]}

    def group(self, paths: Sequence[str], terms: tuple[Terms, Terms]) -> Group:
        """The group whose units they are.

        Args:
            paths: The parameters.
            terms: Operations and parameters as functions of what is cut.
        """
        flops, entries = (of.whole() for of in terms)
        reads = np.array(self.of_terms, object)
        saved = np.array([flops[reads == arc].sum() for arc in self.leaves])
        own = np.array([entries[[*leaves]].sum() for leaves in self.leaves.values()])
        members = lambda: tuple(
            Member(paths[leaf], None, ())
            for leaf in itertools.chain.from_iterable(self.leaves.values())
        )
        names = (*self.leaves,)
        return Group(ARCS, len(names), 0, saved, own, names, members)


def arc_units(
    graph: Graph | None, numbered: Any, source: TracedNetwork, operations: Terms
) -> ArcUnits:
    """The arcs that meet others in a sum, and have parameters that only they read.

    Args:
        graph: The arcs; None if they are not known.
        numbered: A tree like the parameters, of their indices.
        source: The program.
        operations: Its operations.
    """
    if graph is None:
        return ArcUnits({}, frozenset(), (None,) * len(operations.steps))
    leaves = _own_leaves(graph, numbered)
    arc_of = {leaf: arc for arc, own in leaves.items() for leaf in own}
    made_of = _made_of_leaves(source)
    count = len(jax.tree.leaves(numbered))

    def owner(equation: Equation) -> str | None:
        read = {i for v in equation.reads for i in made_of.get(v, ())}
        arcs = {arc_of.get(i) for i in read if i < count}
        return arcs.pop() if len(arcs) == 1 else None

    names = frozenset(arc.name for arc in graph.arcs)
    return ArcUnits(leaves, names, tuple(map(owner, operations.steps)))


def _own_leaves(graph: Graph, numbered: Any) -> dict[str, tuple[int, ...]]:
    beside = Counter(arc.target for arc in graph.arcs)
    read = {
        arc.name: jax.tree.leaves(arc.fn.own(numbered, arc.params_name))
        for arc in graph.arcs
    }
    readers = Counter(itertools.chain.from_iterable(read.values()))
    leaves = {
        arc.name: tuple(i for i in read[arc.name] if readers[i] == 1)
        for arc in graph.arcs
        if beside[arc.target] > 1 and arc.port is None
    }
    return {name: own for name, own in leaves.items() if own}


def _made_of_leaves(source: TracedNetwork) -> dict[Any, set[int]]:
    """`{value: indices of the leaves that it is made of}`, if of nothing else."""
    body = source.body
    leaves = {v: {i} for i, v in enumerate(body.invars[: source.free])}
    for equation in body.equations:
        if equation.reads and all(v in leaves for v in equation.reads):
            of = set().union(*(leaves[v] for v in equation.reads))
            leaves |= dict.fromkeys(equation.eqn.outvars, of)
    return leaves
