"""Masks as pictures: black is kept, white is cut, gray is the mean of a block."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from dagjax.experiments.result import Record
from dagjax.graph.core.topology import natural
from dagjax.report.style import FAINT, MUTED, canvas
from dagjax.types import Mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROWS = 6  # leaves in a figure
_PIXELS = (72, 160)  # of a picture; larger masks are averaged over blocks
_COLUMNS = 8  # densities in a figure
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

    Matrices lie on the longer side, convolution kernels `[h, w, in, out]` stand as `[h
    w in, out]`, vectors are strips, gates a column with the names of their arcs. Over
    each picture stands the share that it keeps.
    """
    leaves = _leaves(record.masks, seed)
    shown, rounds = _choice(leaves), _even(len(record.densities), _COLUMNS)
    heights = [leaf.height for leaf in shown]
    note = _note(record, leaves, shown, rounds)
    width = _width(shown, len(rounds))
    note = textwrap.fill(note, int(width * 17))
    below = 0.14 * (note.count("\n") + bool(note))
    height = sum(heights) + 0.34 * len(shown) + 0.35 + below
    with canvas(width, height, "constrained") as figure:
        options = {"height_ratios": heights, "squeeze": False}
        grid: Any = figure.subplots(len(shown), len(rounds), **options)
        for axes, leaf in zip(grid, shown, strict=True):
            for ax, i in zip(axes, rounds, strict=True):
                _picture(ax, leaf.mask[i + 1], leaf.names)
            _name(axes[0], leaf)
        _heads(grid[0], record, rounds)
        if note:
            figure.supxlabel(note, x=0.01, ha="left", fontsize=7, color=MUTED)
    return figure


def image(mask: np.ndarray, pixels: tuple[int, int] = _PIXELS) -> np.ndarray:
    """A mask as a picture of kept shares, lying on its longer side.

    All axes but the last are joined; beyond `pixels` entries are averaged in equal
    blocks, the last ones of what is left.

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


def _leaves(masks: Mask, seed: int) -> list[Leaf]:
    """The prunable leaves of one seed; the gates are one leaf `[round, arc, 1]`."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=" ")
    paths = jax.tree_util.tree_leaves_with_path(masks["params"])
    leaves = [Leaf(name(path), np.asarray(leaf)[:, seed]) for path, leaf in paths]
    leaves.sort(key=lambda leaf: natural(leaf.name))
    gates = masks.get("gates") or {}
    names = tuple(sorted(gates, key=natural))
    if names:
        each = [np.asarray(gates[name])[:, seed] for name in names]
        leaves.append(Leaf("gates", np.stack(each, 1)[..., None], names))
    return leaves


def _even(count: int, most: int) -> list[int]:
    """Indices of at most so many, evenly over all."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def _choice(leaves: list[Leaf]) -> list[Leaf]:
    """At most six, evenly over the network; matrices before vectors."""
    matrices = [leaf for leaf in leaves if leaf.mask.ndim > 2]
    some = matrices if matrices and len(leaves) > _ROWS else leaves
    return [some[i] for i in _even(len(some), _ROWS)]


def _note(
    record: Record, leaves: list[Leaf], shown: list[Leaf], rounds: list[int]
) -> str:
    """What is not shown."""
    there = {leaf.name for leaf in shown}
    rest = [leaf.name for leaf in leaves if leaf.name not in there]
    more = [f"and {len(rest) - _LISTED} more"] if len(rest) > _LISTED else []
    parts = [", ".join([*rest[:_LISTED], *more])] if rest else []
    left_out = [d for i, d in enumerate(record.densities) if i not in rounds]
    if left_out:
        parts.append("densities " + ", ".join(f"{100 * d:.3g}%" for d in left_out))
    return f"Not shown: {'; '.join(parts)}." if parts else ""


def _width(shown: list[Leaf], columns: int) -> float:
    names = [len(name) for leaf in shown for name in leaf.names]
    each = 1.05 if all(leaf.names for leaf in shown) else 1.95
    return max(each * columns, 2 * each) + 0.06 * max(names, default=0)


def _picture(ax: Axes, mask: np.ndarray, names: tuple[str, ...]) -> None:
    """One mask; gates stand with a line between them, everything else lies."""
    picture = np.asarray(mask, np.float64) if names else image(mask)
    look = {"cmap": "gray_r", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    ax.imshow(picture, aspect="auto", **look)
    for i in range(1, len(names)):
        ax.axhline(i - 0.5, color="white", linewidth=1.5)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(f"{100 * mask.mean():.3g}%", loc="right", fontsize=7.5, pad=3)
    for spine in ax.spines.values():
        spine.set(visible=True, color=FAINT, linewidth=0.6)


def _name(ax: Axes, leaf: Leaf) -> None:
    """The name over the first picture of a row, as large as fits beside the share."""
    title = leaf.name.removesuffix(" kernel")
    size = min(7.5, 7.5 * 25 / max(len(title), 1))
    ax.set_title(title, loc="left", fontsize=size, pad=3)
    if leaf.names:
        ax.set_yticks(range(len(leaf.names)), leaf.names, fontsize=7)
        ax.tick_params(axis="y", length=0)


def _heads(axes: Any, record: Record, rounds: list[int]) -> None:
    """The density over each column."""
    prune = record.settings.get("prune", "weights")
    for ax, i in zip(axes, rounds, strict=True):
        ax.annotate(
            f"{100 * record.densities[i]:.3g}% of {prune}", (0.5, 1), (0, 16),
            "axes fraction", "offset points", ha="center", va="bottom",
            weight="bold", fontsize=8.5,
        )  # fmt: skip
