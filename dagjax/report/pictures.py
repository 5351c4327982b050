"""Masks as pictures: black is kept, white is cut, gray is the mean of a block."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from dagjax.experiments.result import Record
from dagjax.graph.topology import natural
from dagjax.report.style import FAINT, MUTED, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROWS = 6  # leaves in a figure
_PIXELS = (96, 192)  # of a picture; larger masks are averaged over blocks
_LISTED = 16  # leaves that are named without being shown


class Leaf(NamedTuple):
    """One row of pictures; `names` are those of the entries, for gates."""

    name: str
    mask: np.ndarray  # [round, ...]
    names: tuple[str, ...] = ()

    @property
    def height(self) -> float:
        """Of its pictures, in inches."""
        if self.names:
            return max(0.5, 0.165 * len(self.names))
        return 1.0 if self.mask.ndim > 2 else 0.16


def mask_pictures(record: Record, seed: int = 0) -> Figure:
    """The tickets' masks of one seed: a row for each leaf, a column for each density.

    Matrices lie on the longer side, convolution kernels `[h, w, in, out]` stand as
    `[h w in, out]`, vectors are strips, gates a column with the names of their arcs.
    Over each picture stands the share that it keeps.

    Args:
        record: What an experiment found.
        seed: Index of the seed.

    Example:
        >>> figure = mask_pictures(record)  # doctest: +SKIP
    """
    leaves = _leaves(record.masks, seed)
    shown = _choice(leaves)
    heights = [leaf.height for leaf in shown]
    columns, indent = len(record.densities), _indent(shown)
    width = max(1.95 * columns, 3.2) + indent
    note = textwrap.fill(_note(leaves, shown), int(width * 16))
    lines = note.count("\n") + bool(note)
    with canvas(
        width, sum(heights) + 0.34 * len(shown) + 0.35 + 0.14 * lines, "constrained"
    ) as figure:
        grid: Any = figure.subplots(
            len(shown), columns, height_ratios=heights, squeeze=False
        )
        for axes, leaf in zip(grid, shown, strict=True):
            for ax, mask in zip(axes, leaf.mask[1:], strict=True):
                _picture(ax, mask, column=bool(leaf.names))
            axes[0].set_title(leaf.name, loc="left", fontsize=7.5, pad=3)
            if leaf.names:
                axes[0].set_yticks(range(len(leaf.names)), leaf.names, fontsize=7)
        _heads(grid[0], record)
        if note:
            figure.supxlabel(note, x=0.01, ha="left", fontsize=7, color=MUTED)
    return figure


def image(mask: np.ndarray, pixels: tuple[int, int] = _PIXELS) -> np.ndarray:
    """A mask as a picture of kept shares, lying on its longer side.

    Args:
        mask: `[...]`, bool; all axes but the last are joined.
        pixels: The largest picture; beyond it entries are averaged in equal blocks,
            the last ones of what is left.

    Example:
        >>> image(np.eye(4, dtype=bool), (2, 2))
        array([[0.5, 0. ],
               [0. , 0.5]])
    """
    flat = np.asarray(mask, np.float64)
    flat = flat[None] if flat.ndim < 2 else flat.reshape(-1, flat.shape[-1])
    flat = flat.T if flat.shape[0] > flat.shape[1] else flat
    for axis, limit in enumerate(pixels):
        block = math.ceil(flat.shape[axis] / limit)
        starts = np.arange(0, flat.shape[axis], block)
        sizes = np.diff(np.append(starts, flat.shape[axis]))
        sums = np.add.reduceat(flat, starts, axis)
        flat = sums / (sizes[:, None] if axis == 0 else sizes)
    return flat


def _leaves(masks: Any, seed: int) -> list[Leaf]:
    """The prunable leaves of one seed; the gates are one leaf `[round, arc, 1]`."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(masks["params"]):
        found.append(Leaf(" ".join(map(_key, path)), np.asarray(leaf)[:, seed]))
    found.sort(key=lambda leaf: natural(leaf.name))
    gates = masks.get("gates") or {}
    names = tuple(sorted(gates, key=natural))
    if names:
        each = [np.asarray(gates[name])[:, seed] for name in names]
        found.append(Leaf("gates", np.stack(each, 1)[..., None], names))
    return found


def _key(entry: Any) -> str:
    kinds = ("key", "name", "idx")
    return next((str(getattr(entry, k)) for k in kinds if hasattr(entry, k)), "")


def _choice(leaves: list[Leaf]) -> list[Leaf]:
    """At most six, evenly over the network; matrices before vectors."""
    if len(leaves) <= _ROWS:
        return leaves
    some = [leaf for leaf in leaves if leaf.mask.ndim > 2] or leaves
    picked = np.linspace(0, len(some) - 1, min(_ROWS, len(some))).round().astype(int)
    return [some[i] for i in picked]


def _note(leaves: list[Leaf], shown: list[Leaf]) -> str:
    there = {leaf.name for leaf in shown}
    rest = [leaf.name for leaf in leaves if leaf.name not in there]
    if not rest:
        return ""
    more = f" and {len(rest) - _LISTED} more" if len(rest) > _LISTED else ""
    return f"Not shown: {', '.join(rest[:_LISTED])}{more}."


def _indent(shown: list[Leaf]) -> float:
    return 0.06 * max((len(name) for leaf in shown for name in leaf.names), default=0)


def _picture(ax: Axes, mask: np.ndarray, column: bool) -> None:
    """One mask; a column stands, everything else lies."""
    picture = np.asarray(mask, np.float64) if column else image(mask)
    ax.imshow(picture, cmap="gray_r", vmin=0, vmax=1, aspect="auto")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(f"{100 * mask.mean():.3g}%", loc="right", fontsize=7.5, pad=3)
    for spine in ax.spines.values():
        spine.set(visible=True, color=FAINT, linewidth=0.6)


def _heads(axes: Any, record: Record) -> None:
    """The density over each column."""
    prune = record.settings.get("prune", "weights")
    for ax, density in zip(axes, record.densities, strict=True):
        ax.annotate(
            f"{100 * density:.3g}% of {prune}", (0.5, 1), (0, 17), "axes fraction",
            "offset points", ha="center", va="bottom", weight="bold",
        )  # fmt: skip
