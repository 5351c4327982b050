"""What all figures share: how they are made, their colors, how labels are spread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dagjax.types import Array

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

INK, MUTED, FAINT = "#222222", "#6b6b6b", "#b5b5b5"

# Okabe and Ito (2008): told apart with any color vision.
COLORS = {
    "dense": "#333333",
    "ticket": "#d55e00",
    "random": "#0072b2",
    "fresh": "#009e73",
    "transfer": "#cc79a7",
    "narrow": "#56b4e9",
}
MARKERS = {"ticket": "o", "random": "s", "fresh": "^", "transfer": "D", "narrow": "v"}

_STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.usetex": False,
    "text.color": INK,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.solid_capstyle": "round",
}


def pyplot() -> Any:
    """`matplotlib.pyplot`, imported at the first figure."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        message = "figures need matplotlib: pip install dagjax[report]"
        raise ImportError(message) from error
    return plt


@contextlib.contextmanager
def canvas(width: float, height: float, layout: str | None = None) -> Iterator[Figure]:
    """A figure in dagjax's style, closed in pyplot at the end: it shows only once."""
    plt = pyplot()
    from dagjax.report.svg import Picture

    with plt.rc_context(_STYLE):
        size = (width, height)
        figure = plt.figure(figsize=size, layout=layout, FigureClass=Picture)
        try:
            yield figure
            figure.draw_without_rendering()  # ticks take the style when first drawn
        finally:
            plt.close(figure)


def diverging(middle: str) -> Colormap:
    """From blue for negative numbers to orange for positive ones, `middle` at 0."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = ["#00395a", COLORS["random"], middle, COLORS["ticket"], "#7a3500"]
    return LinearSegmentedColormap.from_list("signed", colors)


def colorbar(
    figure: Figure,
    corner: tuple[float, float],
    length: float,
    scale: tuple[float, float, Colormap],
    ticks: Mapping[float, str],
) -> Any:
    """A thin horizontal bar; its lower left corner and its length in inches.

    The scale is its two ends and the colors between.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    width, height = figure.get_size_inches()
    low, high, colors = scale
    place = (corner[0] / width, corner[1] / height, length / width, 0.09 / height)
    shown, ax = ScalarMappable(Normalize(low, high), colors), figure.add_axes(place)
    bar = figure.colorbar(shown, cax=ax, orientation="horizontal")
    bar.set_ticks([*ticks], labels=[*ticks.values()])
    ax.tick_params(labelsize=7, length=2)
    return bar


def color(arm: str) -> str:
    """The color of an arm, gray for one that is not known."""
    return COLORS.get(arm, MUTED)


def spread(wanted: Array, gap: float) -> np.ndarray:
    """Positions at least a gap apart, as near to the wanted ones as can be.

    The least-squares solution: with `z_i = y_i - i gap` the constraints say that z does
    not fall, an isotonic regression.

    >>> spread([0.5, 0.0, 0.5], 0.1).round(2).tolist()
    [0.45, 0.0, 0.55]
    """
    from scipy.optimize import isotonic_regression

    values = np.asarray(wanted, np.float64)
    order = np.argsort(values, kind="stable")
    offsets = gap * np.arange(values.size)
    placed = np.empty_like(values)
    placed[order] = isotonic_regression(values[order] - offsets).x + offsets
    return placed
