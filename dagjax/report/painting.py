"""How a laid-out graph is painted: arrows, circles and squares, names, brackets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from dagjax.graph.core.topology import Graph
from dagjax.report import naming
from dagjax.report.layout import RADIUS, Bracket, Layout
from dagjax.report.naming import Point
from dagjax.report.scale import Scale
from dagjax.report.style import INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Painter(NamedTuple):
    """Paints on axes in inches; text and lines shrink with `zoom`."""

    ax: Axes
    graph: Graph
    places: Layout
    zoom: float = 1.0

    def arcs(self, scale: Scale) -> None:
        """An arrow for each arc, with its name where there is room."""
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path

        for arc, curve in self.places.curves.items():
            look: dict[str, Any] = scale.look(arc)
            look["linewidth"] *= self.zoom
            head = "-|>,head_length=3.2,head_width=1.6"
            arrow = FancyArrowPatch(
                path=Path(curve), arrowstyle=head, mutation_scale=1.4 * self.zoom,
                zorder=2, gid=arc, capstyle="butt", **look,
            )  # fmt: skip
            self.ax.add_artist(arrow)
            if arc in self.places.names:
                x, y, angle = self.places.names[arc]
                ink = MUTED if arc in scale.off else INK
                self._write((x, y), arc, naming.SIZE, ink, angle)

    def nodes(self) -> None:
        """Circles for sums, squares for merges; inputs and outputs shaded."""
        from matplotlib.patches import Circle, Rectangle

        for node, (x, y) in self.places.nodes.items():
            ends = node in self.graph.inputs or node in self.graph.outputs
            look: dict[str, Any] = {
                "facecolor": "#e6e6e6" if ends else "white", "edgecolor": INK,
                "linewidth": self.zoom, "zorder": 4, "gid": node,
            }  # fmt: skip
            if node in self.graph.merge_of:
                corner, side = (x - RADIUS, y - RADIUS), 2 * RADIUS
                self.ax.add_artist(Rectangle(corner, side, side, **look))
            else:
                self.ax.add_artist(Circle((x, y), RADIUS, **look))
            for label in self.places.labels[node]:
                self._write((x, y + label.shift), label.text, label.size)

    def brackets(self, brackets: Mapping[Any, Bracket]) -> None:
        """Under each run of equal blocks how many it stands for."""
        for left, right, y, times in brackets.values():
            corners = [(left, y + 0.06), (left, y), (right, y), (right, y + 0.06)]
            self.ax.plot(*zip(*corners, strict=True), color=MUTED, lw=0.9 * self.zoom)
            self._write(
                ((left + right) / 2, y - 0.12), f"\N{MULTIPLICATION SIGN} {times}", 8.0
            )

    def _write(
        self, at: Point, text: str, size: float, ink: str = INK, angle: float = 0.0
    ) -> None:
        self.ax.text(
            *at, text, fontsize=size * self.zoom, ha="center", va="center", color=ink,
            rotation=angle, rotation_mode="anchor", zorder=5, parse_math=False,
        )  # fmt: skip
