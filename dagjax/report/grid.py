"""Where the blocks of a drawn matrix lie, and where matrices stand on a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from dagjax.report import naming

SIGN = 0.26  # between two matrices, inches
FONT = 5.5  # of nodes' names, points
_SIDE = (1.6, 3.0)  # of a matrix, at least and at most, inches
_NODE = 0.18  # of a node, where that is enough, inches
_PIXELS = 256  # of a heat map, each way
_FEWEST = 4  # of a node
_FOOT = 0.34  # under a matrix, with its label, inches
_WIDEST = 11.0  # of a row, inches


class Grid(NamedTuple):
    """How the nodes share a matrix, and its size in inches with what stands around."""

    names: list[str]
    ends: np.ndarray  # pixels from the corner to the end of each node, 0 before
    side: float
    left: float  # for signs and names
    top: float  # for names
    upright: bool  # the names on top

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Grid:
        """As wide as the logarithms of the dimensions, `{node: dimension}`.

        >>> Grid.of({"x": 784, "y": 10}).ends.tolist()
        [0, 188, 256]
        """
        weights = np.log2(1.0 + np.array([*sizes.values()]))
        pixels = np.round(_PIXELS * weights / max(weights.sum(), 1.0)).astype(int)
        ends = np.append(0, np.maximum(pixels, _FEWEST).cumsum())
        side = float(np.clip(_NODE * len(sizes), *_SIDE))
        wide = [naming.width(name, FONT) for name in sizes]
        upright = bool(np.any(np.array(wide) > 0.9 * np.diff(ends) * side / ends[-1]))
        most = max(wide) + 0.1
        top = most if upright else 0.2
        return cls([*sizes], ends, side, SIGN + most, top, upright)

    @property
    def cell(self) -> tuple[float, float]:
        """Width and height of a matrix with all that stands around it."""
        return self.left + self.side + 0.06, self.top + self.side + _FOOT

    @property
    def middles(self) -> np.ndarray:
        """Of the nodes, as shares of the side."""
        return (self.ends[1:] + self.ends[:-1]) / 2 / self.ends[-1]

    def named(self) -> Iterator[tuple[str, float]]:
        """Nodes with room for a line of text, and their middles."""
        room = np.diff(self.ends) * self.side / self.ends[-1]
        for name, at, high in zip(self.names, self.middles, room, strict=True):
            if high > 1.1 * FONT / 72:
                yield name, at

    def places(self, count: int) -> Iterator[tuple[float, float]]:
        """Upper left corners of cells in rows of one length, inches from the top."""
        width, height = self.cell
        rows = math.ceil(count / max(int(_WIDEST / width), 1))
        across = math.ceil(count / rows)
        for i in range(count):
            yield i % across * width, i // across * height
