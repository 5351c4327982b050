"""A graph as a drawing: levels are columns, colors say what an arc is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dagjax.graph.core.network import Network
from dagjax.graph.core.topology import Graph, live_arcs
from dagjax.graph.rewrite import folding
from dagjax.graph.rewrite.folding import Folded
from dagjax.graph.tracing.as_dag import graph_of
from dagjax.report import scale
from dagjax.report.layout import Bracket, Layout, layout
from dagjax.report.painting import Painter
from dagjax.report.style import canvas
from dagjax.types import Mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARGIN = 0.22  # around the drawing, inches
_LARGEST = 40.0  # of a figure, inches; larger drawings are zoomed out
_MANY = 40  # arcs; beyond that repeats are folded


def draw(
    net: Graph | Network,
    gates: Mapping[str, Any] | None = None,
    *,
    contributions: Mapping[str, Any] | None = None,
    fold: bool | None = None,
) -> Figure:
    """The network with its levels as columns from left to right.

    Sum nodes are circles, merge nodes squares; inputs and outputs are shaded. Equal
    blocks that follow one another can be drawn once, with their number under them; an
    arc of such a block shows the mean over its copies.

    Args:
        net: A graph or a network; nothing is initialized.
        gates: `{arc: gate}`, what of each arc is kept: dark is all (1), pale is little,
            dashed gray is nothing (0, in all copies). Arcs not named count as 1. With
            gates above 1 the scale ends at the largest; with negative ones it has two
            colors, gray at 0.
        contributions: `{arc: number}`, drawn instead of the gates: blue is negative,
            orange positive, wide is much. Arcs not named are plain gray, those of gate
            0 dashed.
        fold: Whether to draw equal blocks once; None: in a graph of more than 40 arcs
            without gates and contributions.

    Returns:
        A matplotlib figure; `savefig("graph.svg")` writes text as text.

    Raises:
        GraphError: An arc that is not in the graph.
        ValueError: A gate or contribution that is not one finite number.

    Example:
        >>> import dagjax as dj
        >>> figure = draw(dj.zoo.lenet_300_100(), {"fc2": 0.2})
        >>> figure.savefig("graph.png", dpi=150)  # doctest: +SKIP
    """
    graph = graph_of(net)
    bare = gates is None and contributions is None
    folds = bare and len(graph.arcs) > _MANY if fold is None else fold
    folded = folding.fold(graph) if folds else folding.whole(graph)
    colors = scale.scale_of(graph, gates, contributions, folded.copies)
    return _painted(folded, colors)


def arc_shares(graph: Graph, mask: Mask) -> dict[str, float]:
    """The share that a mask of one seed keeps of each arc, for `draw`.

    An arc off every path from an input to an output along arcs of which something is
    kept counts as 0, however much of its own is kept; one in which nothing can be
    pruned as 1.

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


def _share(mask: Mask) -> float:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(mask)]
    size = sum(leaf.size for leaf in leaves)
    return float(sum(leaf.sum() for leaf in leaves) / size) if size else 1.0


def _painted(folded: Folded, colors: scale.Scale) -> Figure:
    graph, places = folded.graph, layout(folded.graph)
    brackets = places.brackets(graph, folded.counts)
    low, high = _extent(places, brackets)
    width, height = high - low
    zoom = min(1.0, _LARGEST / width, _LARGEST / height)
    bar = colors.height
    wide, tall = max(width * zoom, scale.WIDTH if bar else 0.0), height * zoom + bar
    with canvas(wide, tall) as figure:
        ax = figure.add_axes((0, bar / tall, 1, 1 - bar / tall))
        middle, half = (low[0] + high[0]) / 2, wide / zoom / 2
        ax.set(xlim=(middle - half, middle + half), ylim=(low[1], high[1]))
        ax.set_axis_off()
        painter = Painter(ax, graph, places, zoom)
        painter.arcs(colors)
        painter.nodes()
        painter.brackets(brackets)
        if bar:
            colors.explain(figure)
    return figure


def _extent(
    places: Layout, brackets: Mapping[Any, Bracket]
) -> tuple[np.ndarray, np.ndarray]:
    """Lower left and upper right corner of everything, with a margin."""
    corners = [box for _, box in places.boxes()]
    corners += [np.array([[b.left, b.y - 0.2]]) for b in brackets.values()]
    every = np.concatenate(corners)
    return every.min(0) - _MARGIN, every.max(0) + _MARGIN
