"""The figure of a sensitivity analysis: one line a group, labels at their ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dagjax.compaction.pruning.sensitivity import Sensitivity
from dagjax.report.style import FAINT, MUTED, canvas, diverging, spread
from dagjax.types import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GAP = 0.06  # between labels, in heights of the axes


def draw_sensitivity(found: Sensitivity, metric: str = "accuracy") -> Figure:
    """The metric against the density of the one group that is pruned.

    Colors go from the input (blue) to the output (orange); the dashed line is the
    whole network. Density falls from left to right.

    Args:
        found: What `dj.sensitivity` returned.
        metric: Its name, for the axis.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(1), (64, 4))
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(8), nn.Dense(3)), x)
        >>> found = dj.sensitivity(dag, (x, dag(x).argmax(-1)), densities=[1.0, 0.5])
        >>> dj.draw_sensitivity(found).axes[0].get_ylabel()  # .savefig("a.png")
        'accuracy'
    """
    count = len(found.groups)
    height = max(3.4, 0.23 * count + 1.2)
    with canvas(6.4, height, "constrained") as figure:
        ax = figure.add_subplot()
        ax.axhline(found.dense[0], color=FAINT, linestyle="--", linewidth=1, zorder=0)
        order = np.argsort(-np.asarray(found.densities))
        x = np.asarray(found.densities)[order]
        colors = _colors(count)
        for row, color in zip(found.metric, colors, strict=True):
            ax.plot(x, row[order], color=color, marker="o", markersize=3, linewidth=1.4)
        _axes(ax, x, metric)
        _labels(ax, found, order, colors)
    return figure


def _colors(count: int) -> list[Any]:
    """Along the network, without the pale middle of the map."""
    shades = diverging("#b9b3a7")(np.linspace(0.12, 0.88, max(count, 2)))
    return [*shades][:count]


def _axes(ax: Axes, x: Any, metric: str) -> None:
    ax.set_xticks(x, [f"{d:g}" for d in x])
    wide = float(np.ptp(x)) or 1.0
    ax.set_xlim(x[0] + 0.04 * wide, x[-1] - 0.04 * wide)
    ax.set_xlabel("share of the group's units that is kept")
    ax.set_ylabel(metric)
    ax.grid(axis="y", color="#ececec", linewidth=0.8)
    note = "one group is pruned at a time; dashed: the whole network"
    ax.set_title(note, loc="left", color=MUTED, fontsize=8)


def _labels(ax: Axes, found: Sensitivity, order: Array, colors: list[Any]) -> None:
    """Names beside the last points, apart from each other."""
    ax.margins(y=0.08)
    low, high = ax.get_ylim()
    ends = (found.metric[:, order[-1]] - low) / (high - low)
    gap = min(_GAP, 1.0 / max(len(ends), 1))
    for name, y, at, color in zip(
        found.groups, ends, spread(ends, gap), colors, strict=True
    ):
        ax.annotate(
            name, (1.0, y), (1.04, at), "axes fraction", va="center", fontsize=8,
            color=color, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.5},
        )  # fmt: skip
