"""Masks as pictures: black is kept, white is cut, gray is the mean of a block."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dagjax.experiments.result import Record
from dagjax.graph.topology import natural
from dagjax.report.style import MUTED, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROWS = 6  # leaves in a figure
_PIXELS = (96, 192)  # of a picture; larger masks are averaged over blocks
_NAMES = 48  # gates that can be named in a strip


def mask_pictures(record: Record, seed: int = 0) -> Figure:
    """The tickets' masks of one seed: a row for each leaf, a column for each density.

    Matrices lie on the longer side, convolution kernels `[h, w, in, out]` stand as
    `[h w in, out]`, vectors and gates are strips. Over each picture stands the share
    that it keeps.

    Args:
        record: What an experiment found.
        seed: Index of the seed.

    Example:
        >>> figure = mask_pictures(record)  # doctest: +SKIP
    """
    leaves = _leaves(record.masks, seed)
    shown = _choice(leaves)
    rest = [name for name in leaves if name not in shown]
    heights = [_height(mask) for mask in shown.values()]
    columns = len(record.densities)
    width = max(1.95 * columns + _names_width(shown), 4.0)
    note = textwrap.fill(_note(rest), int(width * 17))
    below = 0.15 * (1 + note.count("\n")) if note else 0.0
    with canvas(width, sum(heights) + 0.5 + below, "constrained") as figure:
        options = {"height_ratios": heights, "squeeze": False}
        grid: Any = figure.subplots(len(shown), columns, **options)
        for axes, (name, mask) in zip(grid, shown.items(), strict=True):
            for ax, one in zip(axes, mask[1:], strict=True):
                _picture(ax, one)
            _name(axes, name, mask)
        _heads(grid[0], record)
        if note:
            figure.supxlabel(note, x=0.01, ha="left", fontsize=7, color=MUTED)
    return figure


def _leaves(masks: Any, seed: int) -> dict[str, np.ndarray]:
    """`{name: [round, ...]}` of one seed; gates are one leaf `[round, arc]`."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(masks["params"]):
        found[" ".join(map(_key, path))] = np.asarray(leaf)[:, seed]
    found = dict(sorted(found.items(), key=lambda item: natural(item[0])))
    if masks.get("gates"):
        gates = _sorted_gates(masks)
        found["gates"] = np.stack([np.asarray(g)[:, seed] for g in gates.values()], 1)
    return found


def _sorted_gates(masks: Any) -> dict[str, Any]:
    return dict(sorted(masks["gates"].items(), key=lambda item: natural(item[0])))


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
