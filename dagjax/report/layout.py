"""Where the nodes and arcs of a drawing go: pure geometry, in inches."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dagjax.graph.topology import Arc, Graph
from dagjax.report import naming
from dagjax.report.naming import Name, Point

if TYPE_CHECKING:
    from scipy.spatial import KDTree

RADIUS = 0.2  # of a node, half the side of a square
NAMED = 30  # arcs; beyond that they have no names
_ROW = 0.85  # between nodes of one level
_CLEAR = RADIUS + 0.08  # of a curve from nodes that it does not touch
_APART = 0.1  # of a curve from another one
_SWEEPS = 2  # over all long arcs; the second time each sees all others
_GRID = 16  # points from level to level at which crossings are counted
_DOT = 0.04  # between points of a curve


class Layout(NamedTuple):
    """Positions in inches; an arc without room for its name has none."""

    nodes: dict[str, Point]
    curves: dict[str, np.ndarray]  # [point, 2], from rim to rim
    names: dict[str, Name]


def layout(graph: Graph) -> Layout:
    """Levels are columns from left to right; curves keep clear of nodes and each other.

    Args:
        graph: Any graph; only names and levels are read.

    Example:
        >>> import dagjax as dj
        >>> layout(dj.zoo.mlp((8, 3), input_shape=(4,))).nodes["in"]
        (0.0, 0.0)
    """
    step, rows = _step(graph), _rows(graph)
    nodes = {node: (step * graph.levels[node], rows[node]) for node in graph.nodes}
    bows = _short_bows(graph)
    curves = _Router(graph, nodes, bows).curves()
    few = len(curves) <= NAMED
    names = naming.place(nodes, curves, bows, RADIUS) if few else {}
    cut = {arc.name: _cut(curves[arc.name], nodes, arc, graph) for arc in graph.arcs}
    return Layout(nodes, cut, names)


def _step(graph: Graph) -> float:
    """From level to level: as wide as names between neighbors need."""
    if len(graph.arcs) > NAMED:
        return 0.62
    bows = _short_bows(graph)
    needs = [
        naming.width(arc) + (0.14 if bows[arc] else 2 * RADIUS + 0.06) for arc in bows
    ]
    return min(max(0.95, *needs, 0), 1.8)


def _rows(graph: Graph) -> dict[str, float]:
    """Heights of the nodes; levels are ordered by the mean height of neighbors."""
    columns: list[list[str]] = [[] for _ in range(graph.depth + 1)]
    for node, level in graph.levels.items():
        columns[level].append(node)
    before: dict[str, list[str]] = {node: [] for node in graph.nodes}
    after: dict[str, list[str]] = {node: [] for node in graph.nodes}
    for arc in graph.arcs:
        before[arc.target].append(arc.source)
        after[arc.source].append(arc.target)
    rows = _stack(columns)
    for neighbors in (before, after) * 4:
        mean = {n: np.mean([rows[m] for m in neighbors[n] or [n]]) for n in rows}
        columns = [
            sorted(column, key=mean.__getitem__, reverse=True) for column in columns
        ]
        rows = _stack(columns)
    return rows


def _stack(columns: list[list[str]]) -> dict[str, float]:
    """The first node of a column on top, the column centered."""
    return {
        node: _ROW * ((len(column) - 1) / 2 - i)
        for column in columns
        for i, node in enumerate(column)
    }


def _short_bows(graph: Graph) -> dict[str, float]:
    """Arcs between neighboring levels: straight, parallel ones bowed symmetrically."""
    groups: dict[tuple[str, str], list[str]] = {}
    for arc in graph.arcs:
        if graph.levels[arc.target] - graph.levels[arc.source] == 1:
            groups.setdefault((arc.source, arc.target), []).append(arc.name)
    bows = {}
    for names in groups.values():
        gap = 0.46 if len(names) == 2 else 0.34
        for i, name in enumerate(names):
            bows[name] = gap * ((len(names) - 1) / 2 - i)
    return bows


class _Router:
    """Lays the arcs, short ones first, each along the cheapest of some bows.

    Args:
        graph: The graph.
        nodes: Positions of the nodes.
        bows: Of the arcs between neighboring levels; filled in for the others.
    """

    def __init__(self, graph: Graph, nodes: dict[str, Point], bows: dict[str, float]):
        self.graph, self.nodes, self.bows = graph, nodes, bows
        self.rows: dict[str, np.ndarray] = {}  # heights at every level, for crossings
        self.points: dict[str, np.ndarray] = {}  # outside the nodes, for distances

    def curves(self) -> dict[str, np.ndarray]:
        """`{arc: [point, 2]}`, from center to center."""
        order = sorted(self.graph.arcs, key=lambda arc: self._ends(arc)[1][0])
        order.sort(key=self._width)
        long = [arc for arc in order if arc.name not in self.bows]
        for arc in order:
            if arc.name in self.bows:
                self._lay(arc)
        for arc in long * _SWEEPS:
            self.bows[arc.name] = self._best(arc)
            self._lay(arc)
        return {arc.name: self._curve(arc, self.bows[arc.name]) for arc in order}

    def _ends(self, arc: Arc) -> tuple[Point, Point]:
        return self.nodes[arc.source], self.nodes[arc.target]

    def _width(self, arc: Arc) -> float:
        return self.nodes[arc.target][0] - self.nodes[arc.source][0]

    def _curve(self, arc: Arc, bow: float) -> np.ndarray:
        return _curve(*self._ends(arc), bow)

    def _lay(self, arc: Arc) -> None:
        """Put the arc where its bow says."""
        bow = self.bows[arc.name]
        row = np.full(_GRID * self.graph.depth + 1, np.nan)
        where, row[where] = self._on_grid(arc, bow)
        self.rows[arc.name] = row
        self.points[arc.name] = self._open(arc, self._curve(arc, bow))

    def _on_grid(self, arc: Arc, bow: float) -> tuple[slice, np.ndarray]:
        levels = self.graph.levels
        start, stop = _GRID * levels[arc.source], _GRID * levels[arc.target] + 1
        (_, low), (_, high) = self._ends(arc)
        row = _height(np.linspace(0, 1, stop - start), low, high, bow)
        return slice(start, stop), row

    def _open(self, arc: Arc, curve: np.ndarray) -> np.ndarray:
        """The points outside the arc's own nodes."""
        away = [np.hypot(*(curve - end).T) > RADIUS + 0.05 for end in self._ends(arc)]
        return curve[away[0] & away[1]]

    def _best(self, arc: Arc) -> float:
        """The cheapest bow among all other arcs."""
        from scipy.spatial import KDTree  # slow to import

        others = [name for name in self.rows if name != arc.name]
        tree = KDTree(np.concatenate([self.points[name] for name in others]))
        grid = np.stack([self.rows[name] for name in others])
        cost = lambda bow: self._cost(arc, bow, tree, grid)
        top = max(y for _, y in self.nodes.values())
        return min(_choices(self._width(arc), top), key=cost)

    def _cost(self, arc: Arc, bow: float, tree: KDTree, grid: np.ndarray) -> float:
        """Nodes it hits, curves it runs beside or crosses, and an unusual height."""
        curve = self._curve(arc, bow)
        away = [p for n, p in self.nodes.items() if n not in (arc.source, arc.target)]
        hits = sum(np.hypot(*(curve - p).T).min() < _CLEAR for p in away)
        where, row = self._on_grid(arc, bow)
        gaps = grid[:, where] - row
        crossings = np.sum(gaps[:, 1:] * gaps[:, :-1] < 0)
        distances, _ = tree.query(self._open(arc, curve))
        beside = _DOT * np.sum(1 - np.minimum(np.asarray(distances) / _APART, 1))
        natural = min(0.12 + 0.16 * self._width(arc), 1.1)
        far = abs(abs(bow) - natural)
        return float(100 * hits + 10 * beside + 0.3 * crossings + far)


def _choices(width: float, top: float) -> list[float]:
    """Bows to try for a long arc, up before down, at last around all nodes."""
    sizes = np.arange(0.36, 0.9 + 0.3 * width + 1.3 * top, 0.1)
    return [0.0, *(float(sign * size) for size in sizes for sign in (1, -1))]


def _height(t: np.ndarray, low: float, high: float, bow: float) -> np.ndarray:
    """From low to high, bowed somewhat less than half an ellipse."""
    return low + (high - low) * t + bow * (4 * t * (1 - t)) ** 0.6


def _curve(start: Point, end: Point, bow: float) -> np.ndarray:
    """Points `[point, 2]` at equal distances."""
    t = (1 - np.cos(np.linspace(0, np.pi, 200))) / 2
    y = _height(t, start[1], end[1], bow)
    x = start[0] + (end[0] - start[0]) * t
    length = np.append(0, np.hypot(np.diff(x), np.diff(y)).cumsum())
    at = np.linspace(0, length[-1], 2 + int(length[-1] / _DOT))
    return np.stack([np.interp(at, length, x), np.interp(at, length, y)], -1)


def _cut(
    curve: np.ndarray, nodes: dict[str, Point], arc: Arc, graph: Graph
) -> np.ndarray:
    """What of a curve lies outside its two nodes."""

    def away(node: str) -> np.ndarray:
        gaps = np.abs(curve - nodes[node])
        return gaps.max(-1) if node in graph.merge_of else np.hypot(*gaps.T)

    rim = RADIUS + 0.01
    return curve[(away(arc.source) > rim) & (away(arc.target) > rim)]
