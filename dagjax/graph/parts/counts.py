"""How many paths and sub-architectures a graph has: exact, in Python integers."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator

from dagjax.graph.core.network import Network
from dagjax.graph.core.topology import Graph, GraphError, live_arcs
from dagjax.graph.tracing.as_dag import graph_of

_STATES = 2**17  # of the frontier; beyond it the count takes minutes and gigabytes
_LISTED = 20  # arcs whose subsets are listed one by one

Frontier = frozenset[str]  # nodes that are reached and not left yet
Steps = dict[str, dict[str, int]]  # {node: {target: sub-architectures between}}


def count_paths(net: Graph | Network) -> int:
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
    graph = graph_of(net)
    paths = dict.fromkeys(graph.nodes, 0) | dict.fromkeys(graph.inputs, 1)
    for arc in graph.arcs:
        paths[arc.target] += paths[arc.source]
    return sum(paths[node] for node in graph.outputs)


def count_subgraphs(net: Graph | Network) -> int:
    """The number of sub-architectures: non-empty sets of arcs, each on a path within.

    A set is one choice of out-arcs, not none, at each node that it reaches, so the
    count is a sum over frontiers (nodes reached and not left yet), level by level, of
    what is left of the graph when parts in series (counts multiply) and in parallel
    (`1 + count` do) are put together: exponential in the width of that only.

    Args:
        net: A graph or a network.

    Raises:
        GraphError: If the graph is too wide to be counted.

    Example:
        >>> import dagjax as dj
        >>> count_subgraphs(dj.zoo.resnet(20)) == 3**9
        True
    """
    graph = graph_of(net)
    ends = {*graph.outputs} - {*graph.inputs}
    steps = _reduced(_steps(graph), {*graph.inputs, *graph.outputs})
    counts: dict[Frontier, int] = {frozenset(): 1}
    for node in graph.nodes:
        if node not in steps:
            continue
        after: dict[Frontier, int] = defaultdict(int)
        for frontier, count in counts.items():
            may_stop = node in ends or node not in frontier
            for leaving, ways in _leave(
                frontier - {node}, steps[node], may_stop,
                node in frontier or node in graph.inputs,
            ):  # fmt: skip
                after[leaving] += count * ways
                if len(after) > _STATES:
                    raise GraphError(
                        f"{graph!r} is too wide: more than {_STATES:,} frontiers at "
                        f"node {node!r}; count its parts, or contract some arcs"
                    )
        counts = after
    return sum(counts.values()) - 1  # without the empty one


def subgraphs(net: Graph | Network) -> Iterator[frozenset[str]]:
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
    graph = graph_of(net)
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


def _steps(graph: Graph) -> Steps:
    """Arcs from which an output is reached, parallel ones together."""
    alive, steps = {*live_arcs(graph)}, {}
    for arc in graph.arcs:
        if arc.name in alive:
            _add(steps.setdefault(arc.source, {}), arc.target, 1)
    return steps


def _add(targets: dict[str, int], target: str, count: int) -> None:
    """In parallel: any of one, any of the other, or none, but not both none."""
    targets[target] = (1 + targets.get(target, 0)) * (1 + count) - 1


def _reduced(steps: Steps, ends: set[str]) -> Steps:
    """In series: nodes with one way in and one way out are passed over."""
    into: dict[str, set[str]] = defaultdict(set)
    for source, targets in steps.items():
        for target in targets:
            into[target].add(source)
    waiting = [node for node in steps if node not in ends]
    while waiting:
        node = waiting.pop()
        if node not in steps or len(into[node]) != 1 or len(steps[node]) != 1:
            continue
        (source,), ((target, after),) = into[node], steps.pop(node).items()
        _add(steps[source], target, steps[source].pop(node) * after)
        into[target] = (into[target] - {node}) | {source}
        waiting += [n for n in (source, target) if n not in ends]
    return steps


def _leave(
    rest: Frontier, targets: dict[str, int], may_stop: bool, reached: bool
) -> Iterator[tuple[Frontier, int]]:
    """The frontiers after a node, and the number of sets of its arcs that lead there.

    A node that is not reached is left out; a path may end at an output.
    """
    if may_stop:
        yield rest, 1
    if not reached:
        return
    for size in range(1, len(targets) + 1):
        for chosen in itertools.combinations(targets, size):
            yield rest | {*chosen}, math.prod(targets[target] for target in chosen)
