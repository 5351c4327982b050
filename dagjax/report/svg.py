"""Figures whose SVG is small, has text as text and is the same at every run.

Imports matplotlib; itself imported only when the first figure is made.
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure


class Picture(Figure):
    """A figure that brings its SVG settings with it, wherever it is saved or shown.

    Matplotlib reads these settings when it draws, long after a style was left.
    """

    def draw(self, renderer: Any) -> None:
        """Draw with text as text."""
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dagjax"}):
            super().draw(renderer)
