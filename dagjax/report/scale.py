"""What numbers on arcs look like: colors, widths, and a bar that explains them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dagjax.graph.core.topology import Graph
from dagjax.report.style import FAINT, MUTED, colorbar, diverging
from dagjax.types import PyTree

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Copies = Mapping[str, tuple[str, ...]]  # {arc: arcs that it stands for}

WIDTH = 2.6  # of the bar with all around it, inches
_LENGTH = 1.25  # of the bar alone
_DASHES = (0, (4, 2.5))
_PERCENT = {0.0: "0", 0.5: "50", 1.0: "100% kept"}


class Scale(NamedTuple):
    """Colors and widths of arcs."""

    values: Mapping[str, float] = {}  # an arc without one is plain gray
    off: frozenset[str] = frozenset()  # arcs that deliver nothing, dashed
    low: float = 0.0  # left end of the bar: 0, or `-high` where signs count
    high: float = 1.0  # right end of the bar
    label: str = ""  # under the bar; without one it shows shares in percent

    def look(self, arc: str) -> dict[str, Any]:
        """How matplotlib is to draw an arc."""
        if arc in self.off:
            return {"color": FAINT, "linewidth": 1.0, "linestyle": _DASHES}
        if arc not in self.values:
            return {"color": MUTED, "linewidth": 1.2}
        value = self.values[arc]
        color = self.palette((value - self.low) / (self.high - self.low))
        return {"color": color, "linewidth": 1.0 + 1.2 * abs(value) / self.high}

    @property
    def palette(self) -> Colormap:
        """From pale to dark, or from blue over gray to orange."""
        from matplotlib import colormaps
        from matplotlib.colors import LinearSegmentedColormap

        if self.low < 0:
            return diverging("#cccccc")
        shades = colormaps["Blues"](np.linspace(0.28, 1, 64))
        return LinearSegmentedColormap.from_list("share", shades)

    @property
    def height(self) -> float:
        """Of the bar with its labels, inches."""
        return 0.6 if self.label else 0.45 if self.values else 0.0

    def explain(self, figure: Figure) -> None:
        """Draw the bar in the middle of the lower edge."""
        dashed = bool(self.off) or not self.label
        left = (figure.get_size_inches()[0] - _LENGTH) / 2 + 0.37 * dashed
        base, scale = self.height - 0.15, (self.low, self.high, self.palette)
        bar = colorbar(figure, (left, base), _LENGTH, scale, self._ticks)
        bar.set_label(self.label, fontsize=7.5, labelpad=1)
        bar.outline.set_visible(False)
        if dashed:
            self._explain_dashes(figure, left - 0.55, base)

    @property
    def _ticks(self) -> dict[float, str]:
        if not self.label:
            return _PERCENT
        inner = 0.0 if self.low < 0 else 1.0
        return {x: f"{x:.3g}" for x in (self.low, inner, self.high)}

    def _explain_dashes(self, figure: Figure, middle: float, base: float) -> None:
        from matplotlib.lines import Line2D

        width, height = figure.get_size_inches()
        x = np.array([middle - 0.2, middle + 0.2]) / width
        y = (base + 0.045) / height
        figure.add_artist(Line2D(x, [y, y], color=FAINT, linestyle=_DASHES))
        figure.text(
            middle / width, (base - 0.04) / height, "off" if self.label else "pruned",
            fontsize=7, ha="center", va="top", color=MUTED,
        )  # fmt: skip


def scale_of(
    graph: Graph,
    gates: Mapping[str, Any] | None,
    contributions: Mapping[str, Any] | None,
    copies: Copies,
) -> Scale:
    """Colors by contributions where there are any, else by gates, else none.

    Numbers are `{arc: number}` of the whole graph, gates 1 where not named; the arcs
    that are drawn show the mean over their copies.

    >>> import dagjax as dj
    >>> graph = dj.series(abs, abs)
    >>> scale = scale_of(graph, {"abs": 0}, None, {"abs": ("abs", "abs_1")})
    >>> scale.values, scale.off
    ({'abs': 0.5}, frozenset())
    """
    given = _numbers(graph, "gates", gates or {})
    full = {arc.name: given.get(arc.name, 1.0) for arc in graph.arcs}
    off = frozenset(a for a, own in copies.items() if not any(full[c] for c in own))
    if contributions is not None:
        parts = _numbers(graph, "contributions", contributions)
        return _signed(_means(parts, copies), off, "contribution")
    if gates is None:
        return Scale()
    values = _means(full, copies)
    if all(0 <= gate <= 1 for gate in full.values()):
        return Scale(values, off)
    if min(full.values()) < 0:
        return _signed(values, off, "gate")
    return Scale(values, off, 0.0, max(values.values()), "gate")


def _signed(values: dict[str, float], off: frozenset[str], label: str) -> Scale:
    high = max(map(abs, values.values()), default=0) or 1.0
    return Scale(values, off, -high, high, label)


def _means(values: Mapping[str, float], copies: Copies) -> dict[str, float]:
    """Over what is known of the copies."""
    known = {a: [values[c] for c in own if c in values] for a, own in copies.items()}
    return {arc: float(np.mean(some)) for arc, some in known.items() if some}


def _numbers(graph: Graph, what: str, given: Mapping[str, Any]) -> dict[str, float]:
    graph.select(given)
    return {arc: _number(f"{what}[{arc!r}]", value) for arc, value in given.items()}


def _number(where: str, value: PyTree) -> float:
    try:
        number = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is {value!r}; give one finite number") from error
    if number.ndim:
        raise ValueError(
            f"{where} is an array {list(number.shape)}; give one number, "
            "its sum or its norm for example"
        )
    if not np.isfinite(number):
        raise ValueError(f"{where} is {number}; give one finite number")
    return float(number)
