"""A product of block matrices as a picture: `L_n ... L_2 L_1 = (I - N)^-1`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dagjax.report.grid import FONT, SIGN, Grid
from dagjax.report.style import FAINT, INK, MUTED, canvas, colorbar, diverging

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BAR = 0.4  # for the colorbar, inches
_DOT = "\N{BULLET OPERATOR}"
_COLORS = 65  # few, so that pictures are small


class Blocks(Protocol):
    """A block matrix whose diagonal is the identity, such as `dagjax.BlockMatrix`."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """`{node: dimension}`, in level order."""
        ...

    @property
    def blocks(self) -> Mapping[tuple[str, str], Any]:
        """`{(row, column): array [rows, columns]}`; what is absent is 0."""
        ...


def draw_matrices(
    factors: Sequence[Blocks],
    *,
    product: Blocks | None = None,
    labels: Sequence[str] | None = None,
) -> Figure:
    """Block matrices in a row, as their product is written: the last factor first.

    Rows and columns are those of the nodes in level order, each as wide as the
    logarithm of its dimension. The thin diagonal is the identity, a white block is 0.
    Other blocks show their entries, blue for negative and orange for positive ones, on
    one scale for all matrices; it grows like a square root, so that small entries show
    beside large ones. Of entries that share a pixel the largest one in size is shown.

    Args:
        factors: `L_1, ..., L_n`, the one that is applied first first.
        product: What they multiply to, drawn behind an equals sign.
        labels: Under the matrices: one for each factor, in the order of `factors`, and
            one for the product if there is one; None: `L_1`, `L_2`, ..., `(I - N)^-1`.

    Raises:
        ValueError: No factors, factors of different nodes, a block that does not fit
            its nodes, another number of labels than of matrices.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> x = jnp.ones((1, 4))
        >>> graph = dj.series(nn.Dense(8), dj.residual(nn.Dense(8)), nn.Dense(3))
        >>> point = dj.linearize(dj.init(jax.random.key(0), graph, x), x)
        >>> figure = draw_matrices(point.matrices(), product=point.product())
        >>> figure.savefig("matrices.svg")  # doctest: +SKIP
    """
    matrices = [*factors] if product is None else [*factors, product]
    _check(factors, matrices, labels)
    if labels is None:
        labels = [f"$L_{{{i}}}$" for i in range(1, len(factors) + 1)]
        labels = [*labels, "$(I - N)^{-1}$"]
    n, high = len(factors), _largest(matrices)
    written = [("" if i == n - 1 else _DOT, i) for i in reversed(range(n))]
    written += [("=", n)] * (len(matrices) - n)
    grid = Grid.of(matrices[0].sizes)
    places = list(grid.places(len(written)))
    width, height = np.max([(x + grid.cell[0], y) for x, y in places], axis=0)
    with canvas(width, height + grid.cell[1] + _BAR) as figure:
        for (sign, i), (x, y) in zip(written, places, strict=True):
            ax = _axes(figure, x + grid.left, y + grid.top, grid.side)
            _paint(ax, matrices[i], grid, high)
            _caption(ax, labels[i], sign, grid)
        _bar(figure, high)
    return figure


def extremes(block: Any, shape: tuple[int, int]) -> np.ndarray:
    """A matrix as `shape` pixels; of the entries in a pixel the largest in size.

    >>> extremes(np.array([[1, -3, 0, 2]]), (2, 2))
    array([[-3.,  2.],
           [-3.,  2.]], dtype=float32)
    """
    high = low = np.asarray(block, np.float32)
    for axis, pixels in enumerate(shape):
        size = high.shape[axis]
        starts = np.arange(pixels) * size // pixels
        if size > pixels:
            high = np.maximum.reduceat(high, starts, axis)
            low = np.minimum.reduceat(low, starts, axis)
        else:
            high, low = np.take(high, starts, axis), np.take(low, starts, axis)
    return np.where(high >= -low, high, low)


def _check(factors: Sequence[Blocks], matrices: Sequence[Blocks], labels: Any) -> None:
    if not factors:
        raise ValueError("no factors to draw; give at least one block matrix")
    if labels is not None and len(labels) != len(matrices):
        raise ValueError(f"{len(labels)} labels for {len(matrices)} matrices")
    sizes = dict(matrices[0].sizes)
    for matrix in matrices:
        if list(matrix.sizes.items()) != list(sizes.items()):
            raise ValueError(
                f"the matrices are of different nodes: {sizes} and {dict(matrix.sizes)}"
            )
        for (row, column), block in matrix.blocks.items():
            shape = (sizes.get(row), sizes.get(column))
            if np.shape(block) != shape:
                raise ValueError(
                    f"block {row!r} <- {column!r} is {list(np.shape(block))}, "
                    f"its nodes ask for {list(shape)}"
                )


def _largest(matrices: Sequence[Blocks]) -> float:
    """The largest finite entry in size, 1 if there is none."""
    blocks = [np.asarray(b, np.float32) for m in matrices for b in m.blocks.values()]
    finite = [np.abs(block[np.isfinite(block)]).max(initial=0) for block in blocks]
    return float(max(finite, default=0)) or 1.0


def _axes(figure: Figure, left: float, top: float, side: float) -> Axes:
    width, height = figure.get_size_inches()
    ax = figure.add_axes(
        (left / width, 1 - (top + side) / height, side / width, side / height)
    )
    ax.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(visible=True, color=MUTED, linewidth=0.8)
    return ax


def _paint(ax: Axes, matrix: Blocks, grid: Grid, high: float) -> None:
    """The heat map, lines between nodes, the diagonal, names."""
    look: Any = {"extent": (0, 1, 1, 0), "interpolation": "none", "aspect": "auto"}
    ax.imshow(_picture(matrix, grid, high), **look)
    lines = grid.ends[1:-1] / grid.ends[-1]
    ax.hlines(lines, 0, 1, color=FAINT, linewidth=0.4)
    ax.vlines(lines, 0, 1, color=FAINT, linewidth=0.4)
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=0.7)
    gap = 0.05 / grid.side
    write: Any = {"fontsize": FONT, "color": MUTED, "parse_math": False}
    for name, at in grid.named():
        ax.text(-gap, at, name, ha="right", va="center", **write)
        turn: Any = {"rotation": 90} if grid.upright else {}
        ax.text(at, -gap, name, ha="center", va="bottom", **turn, **write)


def _picture(matrix: Blocks, grid: Grid, high: float) -> np.ndarray:
    """`[pixels, pixels, 4]`, bytes."""
    span = {
        name: slice(*ends)
        for name, *ends in zip(grid.names, grid.ends, grid.ends[1:], strict=False)
    }
    picture = np.zeros((grid.ends[-1], grid.ends[-1]), np.float32)
    for (row, column), block in matrix.blocks.items():
        if np.size(block):
            part = picture[span[row], span[column]]
            part[:] = extremes(block, part.shape)
    share = np.sign(picture) * np.sqrt(np.abs(picture) / high)
    return _colors()((share + 1) / 2, bytes=True)


def _colors() -> Any:
    return diverging("white").resampled(_COLORS).with_extremes(bad="#888888")


def _caption(ax: Axes, label: str, sign: str, grid: Grid) -> None:
    """The label under a matrix and the sign before it."""
    under = 1 + 0.06 / grid.side
    ax.text(0.5, under, label, ha="center", va="top", fontsize=9, color=INK)
    before = (0.5 * SIGN - grid.left) / grid.side
    ax.text(before, 0.5, sign, ha="center", va="center", fontsize=12, color=INK)


def _bar(figure: Figure, high: float) -> None:
    width = figure.get_size_inches()[0]
    length = min(1.6, 0.7 * width)
    ends = {-1: -high, -0.5: -high / 4, 0: 0.0, 0.5: high / 4, 1: high}
    ticks = {at: f"{value:.2g}" for at, value in ends.items()}
    corner = ((width - length) / 2, 0.24)
    bar = colorbar(figure, corner, length, (-1, 1, _colors()), ticks)
    bar.outline.set(linewidth=0.4, edgecolor=MUTED)
