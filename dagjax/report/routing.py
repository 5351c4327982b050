"""How the arcs of a drawing run: each along the cheapest of some bows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dagjax.graph.core.topology import Arc, Graph
from dagjax.report.naming import Point

if TYPE_CHECKING:
    from scipy.spatial import KDTree

RADIUS = 0.2  # of a node, half the side of a square
_LONG = 40  # arcs over several levels; more of them keep clear of the nodes only
_TRIES = 20  # bows for each of these
_CLEAR = RADIUS + 0.08  # of a curve from nodes that it does not touch
_APART = 0.1  # of a curve from another one
_SWEEPS = 2  # over all long arcs; the second time each sees all others
_GRID = 16  # points from level to level at which crossings are counted
_DOT = 0.04  # between points of a curve


class Router:
    """Lays the arcs, short ones first.

    `bows` are those of the arcs between neighboring levels, filled in for the others.
    """

    def __init__(self, graph: Graph, nodes: dict[str, Point], bows: dict[str, float]):
        self.graph, self.nodes, self.bows = graph, nodes, bows
        self.top = max(y for _, y in nodes.values())
        columns = np.zeros(graph.depth + 1)
        columns[list(graph.levels.values())] = [nodes[n][0] for n in graph.levels]
        levels = np.arange(_GRID * graph.depth + 1) / _GRID
        self.xs = np.interp(levels, np.arange(graph.depth + 1), columns)
        self.rows: dict[str, np.ndarray] = {}  # heights at every level, for crossings
        self.points: dict[str, np.ndarray] = {}  # outside the nodes, for distances

    def curves(self) -> dict[str, np.ndarray]:
        """`{arc: [point, 2]}`, from center to center."""
        order = sorted(self.graph.arcs, key=lambda arc: self._ends(arc)[1][0])
        order.sort(key=self._width)
        long = [arc for arc in order if arc.name not in self.bows]
        if len(long) > _LONG:
            self._bow_simply(long)
        else:
            self._bow_apart(order, long)
        return {arc.name: self._curve(arc, self.bows[arc.name]) for arc in order}

    def _bow_simply(self, long: list[Arc]) -> None:
        """Clear of the nodes; curves may run side by side."""
        from scipy.spatial import KDTree  # slow to import

        tree = KDTree(np.array(list(self.nodes.values())))
        side = {node: (-1) ** i for i, node in enumerate(self.nodes)}
        for arc in long:
            cost = lambda bow, arc=arc: (
                10 * self._near(arc, bow, tree, _CLEAR, every=3)
                + (bow * side[arc.source] < 0)
            )
            self.bows[arc.name] = self._cheapest(arc, cost, _TRIES)

    def _bow_apart(self, order: list[Arc], long: list[Arc]) -> None:
        """Clear of the nodes and of each other, with few crossings."""
        from scipy.spatial import KDTree

        for arc in order:
            if arc.name in self.bows:
                self._lay(arc)
        for arc in long * _SWEEPS:
            others = [name for name in self.rows if name != arc.name]
            tree = KDTree(np.concatenate([self.points[name] for name in others]))
            grid = np.stack([self.rows[name] for name in others])
            cost = lambda bow, a=arc, t=tree, g=grid: self._cost(a, bow, t, g)
            self.bows[arc.name] = self._cheapest(arc, cost)
            self._lay(arc)

    def _ends(self, arc: Arc) -> tuple[Point, Point]:
        return self.nodes[arc.source], self.nodes[arc.target]

    def _width(self, arc: Arc) -> float:
        return self.nodes[arc.target][0] - self.nodes[arc.source][0]

    def _curve(self, arc: Arc, bow: float) -> np.ndarray:
        return curve(*self._ends(arc), bow, self._power(arc, bow))

    def _power(self, arc: Arc, bow: float) -> float:
        """Of a tall bow between neighboring levels less: it is flat on top."""
        levels = self.graph.levels
        if levels[arc.target] - levels[arc.source] > 1:
            return 0.6
        flat = 0.35 * self._width(arc) / max(abs(bow), 1e-9)
        return 0.6 * min(max(flat, 0.6), 1)

    def _lay(self, arc: Arc) -> None:
        """Put the arc where its bow says."""
        bow = self.bows[arc.name]
        row = np.full(len(self.xs), np.nan)
        where, row[where] = self._on_grid(arc, bow)
        self.rows[arc.name] = row
        self.points[arc.name] = self._open(arc, self._curve(arc, bow))

    def _on_grid(self, arc: Arc, bow: float) -> tuple[slice, np.ndarray]:
        levels = self.graph.levels
        where = slice(_GRID * levels[arc.source], _GRID * levels[arc.target] + 1)
        start, end = self._ends(arc)
        share = (self.xs[where] - start[0]) / (end[0] - start[0])
        return where, _height(share, start, end, bow, self._power(arc, bow))

    def _open(self, arc: Arc, points: np.ndarray) -> np.ndarray:
        """The points outside the arc's own nodes."""
        away = [np.hypot(*(points - end).T) > RADIUS + 0.05 for end in self._ends(arc)]
        return points[away[0] & away[1]]

    def _cheapest(
        self, arc: Arc, cost: Callable[[float], float], tries: int | None = None
    ) -> float:
        """The bow of least cost, an unusual height counted in."""
        natural = min(0.12 + 0.16 * self._width(arc), 1.1)
        far = lambda bow: abs(abs(bow) - natural)
        best, least = 0.0, np.inf
        for bow in sorted(_choices(self._width(arc), self.top), key=far)[:tries]:
            if far(bow) >= least:
                break
            total = far(bow) + cost(bow)
            best, least = (bow, total) if total < least else (best, least)
        return best

    def _cost(self, arc: Arc, bow: float, tree: KDTree, grid: np.ndarray) -> float:
        """Nodes that it hits, curves that it runs beside or crosses."""
        points = self._curve(arc, bow)
        away = [p for n, p in self.nodes.items() if n not in (arc.source, arc.target)]
        hits = sum(np.hypot(*(points - p).T).min() < _CLEAR for p in away)
        where, row = self._on_grid(arc, bow)
        gaps = grid[:, where] - row
        crossings = np.sum(gaps[:, 1:] * gaps[:, :-1] < 0)
        beside = self._near(arc, bow, tree, _APART)
        return float(100 * hits + 10 * beside + 0.3 * crossings)

    def _near(
        self, arc: Arc, bow: float, tree: KDTree, reach: float, every: int = 1
    ) -> float:
        """How long it runs within reach of the points in a tree, near ones more."""
        points = self._open(arc, self._curve(arc, bow)[::every])
        distances, _ = tree.query(points, distance_upper_bound=reach)
        near = 1 - np.minimum(np.asarray(distances) / reach, 1)
        return float(every * _DOT * np.sum(near))


def curve(start: Point, end: Point, bow: float, power: float = 0.6) -> np.ndarray:
    """Points `[point, 2]` at equal distances, from a center to one further right.

    The middle lies `bow` above the straight line; a power of 0.5 is half an ellipse,
    less is flatter on top.

    >>> [float(y.max().round(3)) for y in curve((0, 0), (2, 0), 0.5).T]
    [2.0, 0.5]
    """
    t = (1 - np.cos(np.linspace(0, np.pi, 200))) / 2
    y = _height(t, start, end, bow, power)
    x = start[0] + (end[0] - start[0]) * t
    length = np.append(0, np.hypot(np.diff(x), np.diff(y)).cumsum())
    at = np.linspace(0, length[-1], 2 + int(length[-1] / _DOT))
    return np.stack([np.interp(at, length, x), np.interp(at, length, y)], -1)


def _height(
    t: np.ndarray, start: Point, end: Point, bow: float, power: float
) -> np.ndarray:
    return start[1] + (end[1] - start[1]) * t + bow * (4 * t * (1 - t)) ** power


def _choices(width: float, top: float) -> list[float]:
    """Bows to try for a long arc, up before down, at last around all nodes."""
    sizes = np.arange(0.36, 0.9 + 0.3 * width + 1.3 * top, 0.1)
    return [0.0, *(float(sign * size) for size in sizes for sign in (1, -1))]
