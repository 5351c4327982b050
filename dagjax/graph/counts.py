"""How many paths and sub-architectures a graph has: exact, in Python integers."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator

from dagjax.graph.dag import DAG
from dagjax.graph.topology import Graph, GraphError, live_arcs

_STATES = 2**20  # of the frontier; beyond it the count takes minutes and gigabytes
_LISTED = 20  # arcs whose subsets are listed one by one

Frontier = frozenset[str]  # nodes that are reached and not left yet


def count_paths(net: Graph | DAG) -> int:
    """The number of paths from inputs to outputs, `sum ((I - A)^-1)_ts`.

    A is the matrix of arc counts; Python integers, so nothing overflows.

    Args:
        net: A graph or a network.

    Example:
        >>> import dagjax as dj
        >>> diamond = [dj.Arc(n, s, t, abs) for n, s, t in
        ...            [("a", "x", "h"), ("b", "x", "h"), ("c", "h", "y")]]
        >>> count_paths(dj.Graph(diamond, "x", "y"))
        2
    """
    graph = net.graph if isinstance(net, DAG) else net
    paths = dict.fromkeys(graph.nodes, 0) | dict.fromkeys(graph.inputs, 1)
    for arc in graph.arcs:
        paths[arc.target] += paths[arc.source]
    return sum(paths[node] for node in graph.outputs)


def count_subgraphs(net: Graph | DAG) -> int:
    """The number of sub-architectures: non-empty sets of arcs, each on a path within.

    A set is one choice of out-arcs, not none, at each node that it reaches, so the
    count is a sum over frontiers (nodes reached and not left yet), level by level:
    exponential in the width of the graph only. In series counts multiply, in
    parallel `1 + count` do.

    Args:
        net: A graph or a network.

    Raises:
        GraphError: If the graph is too wide to be counted.

    Example:
        >>> import dagjax as dj
        >>> count_subgraphs(dj.zoo.resnet(20)) == 3**9
        True
    """
    graph = net.graph if isinstance(net, DAG) else net
    out = _targets(graph)
    ends = {*graph.outputs} - {*graph.inputs}
    counts = _starts([node for node in graph.inputs if node in out])
    for node in graph.nodes:
        if node not in out:
            continue
        after: dict[Frontier, int] = defaultdict(int)
        for frontier, count in counts.items():
            for leaving, ways in _leave(node, frontier, out[node], ends):
                after[leaving] += count * ways
        counts = after
        if len(counts) > _STATES:
            raise GraphError(
                f"{graph!r} is too wide: {len(counts):,} frontiers at node {node!r}; "
                f"count the subgraphs of its parts, or contract some arcs"
            )
    return sum(counts.values()) - 1  # without the empty one


def subgraphs(net: Graph | DAG) -> Iterator[frozenset[str]]:
    """All sub-architectures, as sets of names of arcs.

    Args:
        net: A graph or a network of up to 20 arcs.

    Raises:
        GraphError: If there are more arcs; `count_subgraphs` counts without a list.

    Example:
        >>> import dagjax as dj
        >>> [sorted(arcs) for arcs in subgraphs(dj.parallel(abs, dj.identity))]
        [['abs'], ['identity'], ['abs', 'identity']]
    """
    graph = net.graph if isinstance(net, DAG) else net
    names = [arc.name for arc in graph.arcs]
    if len(names) > _LISTED:
        raise GraphError(
            f"{len(names)} arcs have 2^{len(names)} subsets, up to {_LISTED} arcs are "
            "listed; count_subgraphs counts without a list"
        )
    for size in range(1, len(names) + 1):
        for arcs in itertools.combinations(names, size):
            closed = dict.fromkeys(set(names) - set(arcs), 0.0)
            if len(live_arcs(graph, closed)) == size:
                yield frozenset(arcs)


def _targets(graph: Graph) -> dict[str, Counter[str]]:
    """`{node: {target: number of arcs}}`, of arcs from which an output is reached."""
    alive = {*live_arcs(graph)}
    out: dict[str, Counter[str]] = defaultdict(Counter)
    for arc in graph.arcs:
        if arc.name in alive:
            out[arc.source][arc.target] += 1
    return out


def _starts(inputs: Collection[str]) -> dict[Frontier, int]:
    """Any set of inputs may be used."""
    sizes = range(len(inputs) + 1)
    return {frozenset(s): 1 for n in sizes for s in itertools.combinations(inputs, n)}


def _leave(
    node: str, frontier: Frontier, targets: Counter[str], ends: Collection[str]
) -> Iterator[tuple[Frontier, int]]:
    """The frontiers after a node, and the number of sets of its arcs that lead there.

    A node that is not reached is left out; a path may end at an output.
    """
    rest = frontier - {node}
    if node not in frontier or node in ends:
        yield rest, 1
    if node not in frontier:
        return
    for size in range(1, len(targets) + 1):
        for chosen in itertools.combinations(targets, size):
            ways = 1
            for target in chosen:
                ways *= 2 ** targets[target] - 1
            yield rest | {*chosen}, ways
