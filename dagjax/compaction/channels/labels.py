"""Labels: one for each index of each axis; equations unify them into classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray
PIN = 0  # the label of all that is never cut


class Labels:
    """Labels with what is known of them, to be solved once.

    `pins` holds `(labels, reason)` in the order of discovery.
    """

    def __init__(self) -> None:
        self.count = 1
        self.pins: list[tuple[Array, Any]] = []
        self._edges: list[tuple[Array, Array]] = []
        self._products: list[tuple[Array, list[Array]]] = []

    def fresh(self, size: int) -> Array:
        """New labels, one for each index; an axis of size 1 is pinned."""
        if size == 1:
            return np.zeros(1, np.int64)
        self.count += size
        return np.arange(self.count - size, self.count)

    def unify(self, one: Array, two: Array) -> None:
        """What is removed of one axis is removed of the other."""
        if one is not two and one.size:
            self._edges.append((one, two))

    def pin(self, labels: Array, reason: Any) -> None:
        """These indices are never removed."""
        if labels.size and labels.any():
            self._edges.append((labels, np.zeros_like(labels)))
            self.pins.append((labels, reason))

    def product(self, flat: Array, factors: Sequence[Array]) -> None:
        """A flat index (row-major) is removed if one of its factors is."""
        grid = np.meshgrid(*factors, indexing="ij")
        self._products.append((flat, [axis.ravel() for axis in grid]))

    def solve(self) -> Classes:
        """The classes of labels, to the fixpoint of the three rules of products.

        1. All factors of a pinned flat index are pinned. 2. A flat index is what its
        only factor is that is not pinned, and pinned if there is none. 3. Two products
        of one flat index have the same factors, or all of them are pinned.
        """
        edges = self._edges
        while True:
            of = _components(self.count, edges)
            flat, factors = self._rows(of)
            more = _consequences(flat, factors, of)
            news = [(a, b) for a, b in more if (of[a] != of[b]).any()]
            if not news:
                proper = (of[factors] != of[PIN]).sum(1) > 1
                return Classes(of, flat[proper], factors[proper])
            edges = [*edges, *news]

    def nearest(self, pinned: Array) -> Array:
        """`[labels]`: which of `pins` is the nearest to a pinned label, else -1.

        Args:
            pinned: `[labels]`, whether a label is pinned; paths go through these alone.
        """
        from scipy.sparse import csgraph

        related = [(flat, f) for flat, factors in self._products for f in factors]
        pin = np.zeros(1, np.int64)
        pairs = [(pin, pin), *self._edges, *related]
        ends = [np.concatenate(side) for side in zip(*pairs, strict=True)]
        through = (ends[0] != PIN) & (ends[1] != PIN)
        through &= pinned[ends[0]] & pinned[ends[1]]
        links = _links(self.count, ends[0][through], ends[1][through])
        first = np.full(self.count, -1)
        for number, (labels, _) in reversed([*enumerate(self.pins)]):
            first[labels] = number
        first[PIN] = -1
        sources = np.flatnonzero(first >= 0)
        if not sources.size:
            return first
        near = csgraph.dijkstra(
            links, False, sources, unweighted=True, min_only=True,
            return_predecessors=True,
        )[2]  # fmt: skip
        return np.where(near >= 0, first[np.maximum(near, 0)], -1)

    def _rows(self, of: Array) -> tuple[Array, Array]:
        """All products as rows: a flat label, and labels of its factors, pins last."""
        if not self._products:
            return np.zeros(0, np.int64), np.zeros((0, 1), np.int64)
        width = max(len(factors) for _, factors in self._products)
        rows = []
        for flat, factors in self._products:
            spare = [np.zeros_like(flat)] * (width - len(factors))
            rows.append(np.stack([flat, *factors, *spare], 1))
        table = np.concatenate(rows)
        flat, factors = table[:, 0], table[:, 1:]
        last = np.argsort(of[factors] == of[PIN], axis=1, kind="stable")
        return flat, np.take_along_axis(factors, last, 1)


def _links(count: int, rows: Array, columns: Array) -> Any:
    from scipy import sparse

    ones = np.ones(len(rows), np.int8)
    return sparse.coo_matrix((ones, (rows, columns)), (count, count)).tocsr()


def _components(count: int, edges: list[tuple[Array, Array]]) -> Array:
    from scipy.sparse import csgraph

    if not edges:
        return np.arange(count)
    rows = np.concatenate([a for a, _ in edges])
    columns = np.concatenate([b for _, b in edges])
    links = _links(count, rows, columns)
    return csgraph.connected_components(links, directed=False)[1]


def _consequences(flat: Array, factors: Array, of: Array) -> list[tuple[Array, Array]]:
    """What the three rules ask for, as pairs of labels."""
    free = of[factors] != of[PIN]
    said = (free.sum(1) == 1) & (of[flat] == of[factors[:, 0]])  # by rule 2
    flat, factors, free = flat[~said], factors[~said], free[~said]
    count, pins = free.sum(1), np.zeros_like(factors)
    held = of[flat] == of[PIN]
    found = [(factors[held].ravel(), pins[held].ravel())]
    found.append((flat[count == 0], pins[count == 0, 0]))
    found.append((flat[count == 1], factors[count == 1, 0]))
    order = np.argsort(of[flat], kind="stable")
    one, two = order[:-1], order[1:]
    alike = of[flat[one]] == of[flat[two]]
    one, two = one[alike], two[alike]
    same = count[one] == count[two]
    found.append((factors[one[same]].ravel(), factors[two[same]].ravel()))
    for side in (one[~same], two[~same]):
        found.append((factors[side].ravel(), pins[side].ravel()))
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Classes:
    """Labels in classes, each removed as a whole.

    Args:
        of: `[labels]`, the class of each label.
        flat: `[rows]`, labels that are products.
        factors: `[rows, factors]`, their factors; unused places hold the pin.
    """

    of: Array
    flat: Array
    factors: Array

    @property
    def pinned(self) -> int:
        """The class of all that is never removed."""
        return int(self.of[PIN])

    @property
    def count(self) -> int:
        """The number of classes."""
        return int(self.of.max()) + 1

    def close(self, removed: Array) -> Array:
        """`[classes]`: what goes when some classes go; products go with a factor."""
        removed = removed.copy()
        flat, factors = self.of[self.flat], self.of[self.factors]
        while True:
            gone = flat[removed[factors].any(1)]
            if removed[gone].all():
                return removed
            removed[gone] = True

    def atoms(self) -> Array:
        """`[classes]`: whether a class is no product and not pinned."""
        free = np.ones(self.count, bool)
        free[self.of[self.flat]] = False
        free[self.pinned] = False
        return free

    def spoil(self, bad: Array) -> Array:
        """`[classes]`: a class is bad if it is, or a product that goes with it is."""
        bad = bad.copy()
        flat, factors = self.of[self.flat], self.of[self.factors]
        while True:
            more = factors[bad[flat]].ravel()
            more = more[(more != self.pinned) & ~bad[more]]
            if not more.size:
                return bad
            bad[more] = True

    def causes(self, gone: Array, seen: Array) -> Array:
        """`[classes]`: what must have gone so that just these of the seen ones did.

        A factor went if all products that hold it did.
        """
        gone, seen = gone.copy(), seen.copy()
        flat, factors = self.of[self.flat], self.of[self.factors]
        whole = np.ones(self.count, bool)
        known = seen[flat]
        for column in factors[known].T:
            stays = column[~gone[flat[known]]]
            whole[stays] = False
        met = np.zeros(self.count, bool)
        met[factors[known].ravel()] = True
        gone |= met & whole & ~seen
        gone[self.pinned] = False
        return gone & self.atoms()
