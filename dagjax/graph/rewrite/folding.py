"""Repeated blocks of a graph folded to one: equal functions, equal wiring, in a row."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dagjax.graph.core.topology import Arc, Graph, natural

_PERIOD = 64  # segments of the longest block that is looked for

Run = tuple[int, int, int]  # first segment, segments of a block, number of blocks


class Folded(NamedTuple):
    """A smaller graph and what it stands for.

    Of every run of equal blocks the first one is left; it leads to the node at the end
    of the run.
    """

    graph: Graph
    counts: dict[tuple[str, str], int]  # {(first node, last node): blocks} of the runs
    copies: dict[str, tuple[str, ...]]  # {arc: what it stands for, itself first}


class Segment(NamedTuple):
    """What lies between two cut nodes that follow one another."""

    start: str
    end: str
    arcs: tuple[Arc, ...]  # equal segments have them in the same order
    key: Hashable  # equal for equal functions and equal wiring


def fold(graph: Graph) -> Folded:
    """Leave one of equal blocks that follow one another.

    Blocks begin and end at cut nodes. They are equal if their arcs carry equal
    functions and are wired alike. Names do not count, shapes do where all are known.

    >>> import dagjax as dj
    >>> folded = fold(dj.zoo.resnet(56))
    >>> folded.graph
    Graph(8 nodes, 12 arcs, 7 levels: in -> out)
    >>> folded.counts
    {('n1', 'n10'): 9, ('n11', 'n19'): 8, ('n20', 'n28'): 8}
    """
    small, counts, copies = whole(graph)
    parts = segments(graph)
    ends = {i for i, segment in enumerate(parts) if segment.end in graph.outputs}
    moved: dict[str, str] = {}  # end of a first block -> end of its run
    gone: dict[str, Arc] = {}
    for at, period, times in runs([segment.key for segment in parts], ends):
        run = parts[at : at + period * times]
        arcs = [arc for segment in run for arc in segment.arcs]
        size = len(arcs) // times
        for i, arc in enumerate(arcs[:size]):
            copies[arc.name] = tuple(copy.name for copy in arcs[i::size])
        gone |= {arc.name: arc for arc in arcs[size:]}
        moved[run[period - 1].end] = run[-1].end
        counts[run[0].start, run[-1].end] = times
    if counts:
        small = _without(graph, gone, moved)
    return Folded(small, counts, {arc.name: copies[arc.name] for arc in small.arcs})


def whole(graph: Graph) -> Folded:
    """A graph with nothing folded: every arc stands for itself."""
    return Folded(graph, {}, {arc.name: (arc.name,) for arc in graph.arcs})


def cut_nodes(graph: Graph) -> tuple[str, ...]:
    """Nodes alone on their level that no arc passes by: every path leads through them.

    >>> import dagjax as dj
    >>> cut_nodes(dj.zoo.resnet(8))
    ('in', 'n1', 'n2', 'n3', 'n4', 'out')
    >>> cut_nodes(dj.residual(dj.series(abs, abs)))
    ('in', 'out')
    """
    change = np.zeros(graph.depth + 2, int)  # of the number of arcs that pass by
    for arc in graph.arcs:
        change[graph.levels[arc.source] + 1] += 1
        change[graph.levels[arc.target]] -= 1
    passing = change.cumsum()
    width = collections.Counter(graph.levels.values())
    alone = {level for level, count in width.items() if count == 1}
    return tuple(n for n, i in graph.levels.items() if i in alone and not passing[i])


def segments(graph: Graph) -> list[Segment]:
    """The parts of a graph between its cut nodes, from the inputs to the outputs."""
    cuts = cut_nodes(graph)
    levels = [graph.levels[node] for node in cuts]
    parts: list[list[Arc]] = [[] for _ in range(len(cuts) + 1)]
    for arc in graph.arcs:
        parts[np.searchsorted(levels, graph.levels[arc.target])].append(arc)
    rank = _ranks(graph, {*cuts})
    between = []
    for (start, end), part in zip(itertools.pairwise(cuts), parts[1:-1], strict=True):
        arcs = tuple(sorted(part, key=rank.__getitem__))
        between.append(Segment(start, end, arcs, _key(graph, start, end, arcs)))
    return between


def runs(keys: Sequence[Hashable], ends: Collection[int] = ()) -> Iterator[Run]:
    """Runs of equal blocks; as few segments as possible are left.

    The last nodes of the segments `ends` must stay.

    >>> list(runs("xababab"))
    [(1, 2, 3)]
    >>> list(runs("baaaabaaaa"))
    [(1, 1, 4), (6, 1, 4)]
    """
    n, last = len(keys), len(keys) - 1
    left = [0] * (n + 1)  # segments that are left from the i-th on
    best: list[tuple[int, int]] = [(1, 1)] * n
    alike = collections.Counter()  # from the i-th on as many are equal to p further
    for i in reversed(range(n)):
        last = i if i in ends else last
        options = [(1 + left[i + 1], True, 1, 1)]
        for p in range(1, min(_PERIOD, n - 1 - i) + 1):
            alike[p] = alike[p] + 1 if keys[i] == keys[i + p] else 0
            times = min(1 + alike[p] // p, (last - i + 1) // p)
            if times > 1:
                options.append((p + left[i + p * times], False, p, times))
        left[i], _, *choice = min(options)
        best[i] = (choice[0], choice[1])
    i = 0
    while i < n:
        period, times = best[i]
        if times > 1:
            yield i, period, times
        i += period * times


def _ranks(graph: Graph, cuts: set[str]) -> dict[Arc, Any]:
    """A sort key of every arc: it orders arcs in equal places of segments alike."""
    number = _numbers(graph, cuts)
    return {
        arc: (
            number[arc.target],
            number[arc.source],
            hash((arc.fn.pattern, arc.port)),
            natural(arc.name),
        )
        for arc in graph.arcs
    }


def _numbers(graph: Graph, cuts: set[str]) -> dict[str, int]:
    """Nodes numbered by what lies around them; names decide between equals only."""
    up = _places(graph, cuts, graph.arcs, lambda arc: (arc.source, arc.target))
    back = reversed(graph.arcs)
    down = _places(graph, cuts, back, lambda arc: (arc.target, arc.source))
    number: dict[str, int] = {}

    def key(node: str) -> Any:
        into = graph.arcs_into(node)
        wires = sorted((number[a.source], hash((a.fn.pattern, a.port))) for a in into)
        return up[node], down[node], wires, natural(node)

    for _, level in itertools.groupby(graph.nodes, key=graph.levels.__getitem__):
        for node in sorted(level, key=key):
            number[node] = len(number)
    return number


def _places(
    graph: Graph, cuts: set[str], arcs: Iterable[Arc], ends: Any
) -> dict[str, int]:
    """A hash of all that lies between the last cut node and a node."""
    met: dict[str, list[int]] = {node: [] for node in graph.nodes}

    def place(node: str) -> int:
        if node in cuts:
            return 0
        return hash((_merge(graph, node), *sorted(met[node])))

    for arc in arcs:
        here, there = ends(arc)
        met[there].append(hash((arc.fn.pattern, arc.port, place(here))))
    return {node: place(node) for node in graph.nodes}


def _key(graph: Graph, start: str, end: str, arcs: Sequence[Arc]) -> Hashable:
    """The wiring, its nodes numbered as they come; with an output inside no other's."""
    number = {start: 0}
    for arc in arcs:
        for node in (arc.source, arc.target):
            number.setdefault(node, len(number))
    if any(node in graph.outputs for node in number if node not in (start, end)):
        return start
    shapes = graph.space_of if len(graph.spaces) == len(graph.nodes) else {}
    wires = [(number[a.source], number[a.target], a.port, a.fn.pattern) for a in arcs]
    nodes = [(shapes.get(n), n != start and _merge(graph, n)) for n in number]
    return (*nodes, *wires)


def _merge(graph: Graph, node: str) -> Hashable:
    """A merge as far as equal ones are alike."""
    merge = graph.merge_of.get(node)
    return getattr(merge, "pattern", merge)


def _without(graph: Graph, gone: dict[str, Arc], moved: dict[str, str]) -> Graph:
    """The graph with some arcs gone and others led to the end of their run."""
    arcs = [
        dataclasses.replace(arc, target=moved.get(arc.target, arc.target))
        for arc in graph.arcs
        if arc.name not in gone
    ]
    nodes = {arc.target for arc in gone.values()} | {*moved}
    nodes -= {*moved.values()}
    stay = lambda pairs: [pair for pair in pairs if pair[0] not in nodes]
    return graph.replace(
        arcs=arcs, merges=stay(graph.merges), spaces=stay(graph.spaces)
    )
