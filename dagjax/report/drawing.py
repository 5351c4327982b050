"""A graph as a drawing, its arcs colored by how much of them is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dagjax.graph.topology import Graph, live_arcs
from dagjax.report import naming
from dagjax.report.layout import RADIUS, Layout, layout
from dagjax.report.naming import Point
from dagjax.report.style import FAINT, INK, MUTED, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARGIN = 0.22  # around the drawing, inches
_BAR = 0.45  # below it, for the colorbar
_SMALL = 4.5  # points, the smallest text in a node
_DASHES = (0, (4, 2.5))


def draw(graph: Graph, kept: Mapping[str, float] | None = None) -> Figure:
    """The graph with its levels as columns from left to right.

    Sum nodes are circles, merge nodes squares; inputs and outputs are shaded.

    Args:
        graph: Any graph; nothing is initialized.
        kept: `{arc: share}` in [0, 1], what of each arc is kept: dark is all, pale is
            little, dashed gray is nothing. Arcs not named are kept.

    Raises:
        GraphError: An arc that is not in the graph.
        ValueError: A share outside [0, 1].

    Example:
        >>> import dagjax as dj
        >>> figure = draw(dj.zoo.lenet_300_100(), {"fc2": 0.2})
        >>> figure.savefig("graph.png", dpi=150)  # doctest: +SKIP
    """
    shares = _checked(graph, kept)
    places = layout(graph)
    low, high = _extent(places)
    bar = 0.0 if shares is None else _BAR
    width, height = high - low + (0, bar)
    wide = max(width, 2.6 if bar else 0.0)
    with canvas(wide, height) as figure:
        ax = figure.add_axes((0, bar / height, 1, 1 - bar / height))
        middle = (low[0] + high[0]) / 2
        ax.set(xlim=(middle - wide / 2, middle + wide / 2), ylim=(low[1], high[1]))
        ax.set_axis_off()
        _draw_arcs(ax, places, shares)
        _draw_nodes(ax, graph, places)
        if bar:
            _colorbar(figure, wide, height)
    return figure


def arc_shares(graph: Graph, mask: Any) -> dict[str, float]:
    """The share that a mask keeps of each arc, for `draw`.

    An arc off every path from an input to an output along arcs of which something is
    kept counts as 0, however much of its own is kept.

    Args:
        graph: The graph.
        mask: Of one seed, `{"params": {arc: tree} or None, "gates": {arc: bool} or
            None}`; an arc in which nothing can be pruned counts as 1.

    Raises:
        GraphError: A gate of an arc that is not in the graph.

    Example:
        >>> import dagjax as dj, jax.numpy as jnp
        >>> graph = dj.zoo.mlp((8, 3), input_shape=(4,))
        >>> arc_shares(graph, {"params": {"fc1": jnp.arange(4) < 1}, "gates": None})
        {'fc1': 0.25, 'fc2': 1.0}
    """
    params, gates = mask.get("params") or {}, mask.get("gates") or {}
    graph.select(gates)
    shares = {arc.name: _share(params.get(arc.name)) for arc in graph.arcs}
    shares |= {arc: 0.0 for arc, gate in gates.items() if not gate}
    live = {*live_arcs(graph, shares)}
    return {arc: s if arc in live else 0.0 for arc, s in shares.items()}


def _share(mask: Any) -> float:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(mask)]
    size = sum(leaf.size for leaf in leaves)
    return float(sum(leaf.sum() for leaf in leaves) / size) if size else 1.0


def _checked(graph: Graph, kept: Mapping[str, float] | None) -> dict[str, float] | None:
    if kept is None:
        return None
    graph.select(kept)
    for arc, share in kept.items():
        if not 0 <= share <= 1:
            raise ValueError(f"kept[{arc!r}] is {share}; give a share in [0, 1]")
    return {arc.name: float(kept.get(arc.name, 1.0)) for arc in graph.arcs}


def _extent(places: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Lower left and upper right corner of everything."""
    points = [np.array(list(places.nodes.values())), *places.curves.values()]
    for text, (x, y, _) in places.names.items():
        half = naming.width(text) / 2 - _MARGIN / 2
        points.append(np.array([[x - half, y], [x + half, y]]))
    corners = np.concatenate(points)
    least = np.array([RADIUS, RADIUS]) + 0.02
    nodes = points[0]
    low = np.minimum(corners.min(0), nodes.min(0) - least) - _MARGIN
    high = np.maximum(corners.max(0), nodes.max(0) + least) + _MARGIN
    return low, high


def _palette() -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    shades = colormaps["Blues"](np.linspace(0.28, 1, 64))
    return LinearSegmentedColormap.from_list("kept", shades)


def _look(share: float | None) -> dict[str, Any]:
    if share is None:
        return {"color": MUTED, "linewidth": 1.2}
    if share == 0:
        return {"color": FAINT, "linewidth": 1.0, "linestyle": _DASHES}
    return {"color": _palette()(share), "linewidth": 1.0 + 1.2 * share}


def _draw_arcs(ax: Axes, places: Layout, shares: dict[str, float] | None) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    for name, curve in places.curves.items():
        share = None if shares is None else shares[name]
        look: dict[str, Any] = _look(share)
        head = "-|>,head_length=3.2,head_width=1.6"
        arrow = FancyArrowPatch(
            path=Path(curve), arrowstyle=head, mutation_scale=1.4, zorder=2,
            gid=name, capstyle="butt", **look,
        )  # fmt: skip
        ax.add_patch(arrow)
        if name in places.names:
            faint = MUTED if share == 0 else INK
            x, y, angle = places.names[name]
            ax.text(
                x, y, name, fontsize=naming.SIZE, ha="center", va="center", color=faint,
                rotation=angle, rotation_mode="anchor", zorder=3, parse_math=False,
            )  # fmt: skip


def _draw_nodes(ax: Axes, graph: Graph, places: Layout) -> None:
    from matplotlib.patches import Circle, Rectangle

    for node, (x, y) in places.nodes.items():
        merge = graph.merge_of.get(node)
        ends = node in graph.inputs or node in graph.outputs
        fill = "#e6e6e6" if ends else "white"
        look: dict[str, Any] = {"facecolor": fill, "edgecolor": INK, "linewidth": 1.0}
        look |= {"zorder": 4, "gid": node}
        if merge is None:
            ax.add_patch(Circle((x, y), RADIUS, **look))
            _write(ax, (x, y), node, 7.0, 0.0, -1)
            continue
        side = 2 * RADIUS
        ax.add_patch(Rectangle((x - RADIUS, y - RADIUS), side, side, **look))
        _write(ax, (x, y), node, 6.5, 0.07, -1)
        _write(ax, (x, y), _called(merge), 5.5, -0.07, 1)


def _write(
    ax: Axes, center: Point, text: str, size: float, shift: float, side: int
) -> None:
    """Text in a node as large as fits; long text above (1) or below (-1) the node."""
    fits = 72 * 1.8 * RADIUS / (0.6 * max(len(text), 1))
    if fits < _SMALL:
        fits, shift = 6.0, side * (RADIUS + 0.09)
    ax.text(
        center[0], center[1] + shift, text, fontsize=min(size, fits), ha="center",
        va="center", zorder=5, parse_math=False,
    )  # fmt: skip


def _called(merge: Any) -> str:
    return getattr(merge, "__name__", type(merge).__name__).lower()


def _colorbar(figure: Figure, width: float, height: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.lines import Line2D

    start, base = (width - 2.2) / 2, 0.3
    at = lambda x, y: (x / width, y / height)
    ax = figure.add_axes((*at(start + 0.75, base), *at(1.25, 0.09)))
    bar = figure.colorbar(
        ScalarMappable(cmap=_palette()), cax=ax, orientation="horizontal"
    )
    bar.set_ticks([0, 0.5, 1], labels=["0", "50", "100% kept"])
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    ax.tick_params(labelsize=7, length=2)
    (left, y), (right, _) = at(start, base + 0.045), at(start + 0.4, 0)
    figure.add_artist(Line2D([left, right], [y, y], color=FAINT, linestyle=_DASHES))
    figure.text(
        *at(start + 0.2, base - 0.04), "pruned", fontsize=7, ha="center", va="top",
        color=MUTED,
    )  # fmt: skip
