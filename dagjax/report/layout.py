"""Where the nodes and arcs of a drawing go: pure geometry, in inches."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from dagjax.graph.core.topology import Arc, Graph
from dagjax.report import naming
from dagjax.report.naming import Label, Name, Point
from dagjax.report.routing import RADIUS, Router

NAMED = 40  # arcs; beyond that they have no names
_ROW = 0.85  # between nodes of one level
_NEAR, _FAR = 0.95, 3.0  # from level to level, where there are names
_DENSE = 0.62  # from level to level, where there are none

Ends = tuple[str, str]  # the first and the last node of a part


class Bracket(NamedTuple):
    """Under a run of equal blocks."""

    left: float
    right: float
    y: float
    times: int


class Layout(NamedTuple):
    """Positions in inches; an arc without room for its name has none."""

    nodes: dict[str, Point]
    curves: dict[str, np.ndarray]  # [point, 2], from rim to rim
    names: dict[str, Name]
    labels: dict[str, list[Label]]  # of the nodes, relative to their centers

    def boxes(self) -> Iterator[tuple[str, np.ndarray]]:
        """Corners `[2, 2]` of all that is drawn, with the node or arc that it is of."""
        for arc, curve in self.curves.items():
            if len(curve):
                yield arc, np.stack([curve.min(0), curve.max(0)])
        for arc, (x, y, angle) in self.names.items():
            yield arc, _box((x, y), naming.width(arc), naming.LINE, angle)
        for node, (x, y) in self.nodes.items():
            yield node, _box((x, y), 2 * RADIUS, 2 * RADIUS)
            for text, size, shift in self.labels[node]:
                yield node, _box((x, y + shift), naming.width(text, size), size / 72)

    def brackets(self, graph: Graph, counts: Mapping[Ends, int]) -> dict[Ends, Bracket]:
        """Brackets under parts of the graph, `{ends: number}`, all at one height."""
        levels = [(graph.levels[a], graph.levels[b]) for a, b in counts]
        under = {n for n, i in graph.levels.items()
                 if any(a <= i <= b for a, b in levels)}  # fmt: skip
        under |= {arc.name for arc in graph.arcs if {arc.source, arc.target} <= under}
        low = min((box[0, 1] for name, box in self.boxes() if name in under), default=0)
        x = lambda node: self.nodes[node][0]
        return {
            (a, b): Bracket(x(a) + 0.1, x(b) - 0.1, float(low) - 0.16, count)
            for (a, b), count in counts.items()
        }


def layout(graph: Graph) -> Layout:
    """Levels are columns from left to right; curves keep clear of nodes and each other.

    >>> import dagjax as dj
    >>> layout(dj.zoo.mlp((8, 3), input_shape=(4,))).nodes["in"]
    (0.0, 0.0)
    """
    few = len(graph.arcs) <= NAMED
    bows = _short_bows(graph)
    rows = _rows(graph, bows)
    steps = _steps(graph, rows, bows) if few else [_DENSE] * graph.depth
    columns = np.cumsum([0.0, *steps]).tolist()
    nodes = {node: (columns[graph.levels[node]], rows[node]) for node in graph.nodes}
    curves = Router(graph, nodes, bows).curves()
    names = naming.place(nodes, curves, bows, RADIUS) if few else {}
    cut = {arc.name: _cut(curves[arc.name], nodes, arc, graph) for arc in graph.arcs}
    room = _FAR if few else 0.0
    labels = {n: naming.labels(n, graph.merge_of.get(n), RADIUS, room) for n in nodes}
    return Layout(nodes, cut, names, labels)


def _box(center: Point, width: float, height: float, angle: float = 0.0) -> np.ndarray:
    """The corners of the upright box around a turned one."""
    cos, sin = np.cos(np.radians(angle)), abs(np.sin(np.radians(angle)))
    half = np.array([width * cos + height * sin, width * sin + height * cos]) / 2
    return np.stack([center - half, center + half])


def _steps(graph: Graph, rows: dict[str, float], bows: dict[str, float]) -> list[float]:
    """From each level to the next: as wide as names and steep arcs need."""
    steps = [_NEAR] * graph.depth
    for name, bow in bows.items():
        arc = graph.by_name[name]
        rise = abs(rows[arc.target] - rows[arc.source])
        room = 0.14 + 0.7 * abs(bow) if bow else 2 * RADIUS + 0.06
        need = max(naming.width(name) + room, 1.1 * rise)
        level = graph.levels[arc.source]
        steps[level] = min(max(steps[level], need), _FAR)
    return _with_room(graph, steps)


def _with_room(graph: Graph, steps: list[float]) -> list[float]:
    """Steps that leave room for names of nodes that stand beside the node."""
    wide = [0.0] * (graph.depth + 1)
    for node, level in graph.levels.items():
        for label in naming.labels(node, graph.merge_of.get(node), RADIUS, _FAR):
            wide[level] = max(wide[level], naming.width(label.text, label.size))
    needs = [(a + b) / 2 + 0.1 for a, b in itertools.pairwise(wide)]
    return [max(s, min(need, _FAR)) for s, need in zip(steps, needs, strict=True)]


def _rows(graph: Graph, bows: dict[str, float]) -> dict[str, float]:
    """Heights of the nodes; levels are ordered by the mean height of neighbors."""
    columns: list[list[str]] = [[] for _ in range(graph.depth + 1)]
    for node, level in graph.levels.items():
        columns[level].append(node)
    gaps = _gaps(graph, bows)
    before: dict[str, list[str]] = {node: [] for node in graph.nodes}
    after: dict[str, list[str]] = {node: [] for node in graph.nodes}
    for arc in graph.arcs:
        before[arc.target].append(arc.source)
        after[arc.source].append(arc.target)
    rows = _stack(columns, gaps)
    for neighbors in (before, after) * 4:
        mean = {n: np.mean([rows[m] for m in neighbors[n] or [n]]) for n in rows}
        columns = [
            sorted(column, key=mean.__getitem__, reverse=True) for column in columns
        ]
        rows = _stack(columns, gaps)
    return rows


def _gaps(graph: Graph, bows: dict[str, float]) -> list[float]:
    """Between the nodes of each level: parallel arcs to one must not cross others."""
    gaps = [_ROW] * (graph.depth + 1)
    for name, bow in bows.items():
        arc = graph.by_name[name]
        for level in (graph.levels[arc.source], graph.levels[arc.target]):
            gaps[level] = min(max(gaps[level], 4 * abs(bow) + 0.25), 2 * _ROW)
    return gaps


def _stack(columns: list[list[str]], gaps: list[float]) -> dict[str, float]:
    """The first node of a column on top, the column centered."""
    return {
        node: gap * ((len(column) - 1) / 2 - i)
        for column, gap in zip(columns, gaps, strict=True)
        for i, node in enumerate(column)
    }


def _short_bows(graph: Graph) -> dict[str, float]:
    """Arcs between neighboring levels: straight, parallel ones bowed symmetrically."""
    groups: dict[Ends, list[str]] = {}
    for arc in graph.arcs:
        if graph.levels[arc.target] - graph.levels[arc.source] == 1:
            groups.setdefault((arc.source, arc.target), []).append(arc.name)
    out = collections.Counter(source for source, _ in groups)
    into = collections.Counter(target for _, target in groups)
    bows = {}
    for (source, target), names in groups.items():
        fan = out[source] > 1 or into[target] > 1
        gap = (0.46 if len(names) == 2 else 0.34) - 0.1 * fan
        for i, name in enumerate(names):
            bows[name] = gap * ((len(names) - 1) / 2 - i)
    return bows


def _cut(
    curve: np.ndarray, nodes: dict[str, Point], arc: Arc, graph: Graph
) -> np.ndarray:
    """What of a curve lies outside its two nodes."""

    def away(node: str) -> np.ndarray:
        gaps = np.abs(curve - nodes[node])
        return gaps.max(-1) if node in graph.merge_of else np.hypot(*gaps.T)

    rim = RADIUS + 0.01
    return curve[(away(arc.source) > rim) & (away(arc.target) > rim)]
