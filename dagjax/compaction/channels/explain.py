"""For every axis of every parameter: with which group it is cut, or why it is not."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from dagjax.compaction.channels.coupling import Reason
from dagjax.compaction.channels.units import Units, units
from dagjax.text import aligned


class Axis(NamedTuple):
    """One axis of one parameter.

    Args:
        path: The parameter.
        axis: Which axis.
        size: Its length.
        groups: The groups that its indices belong to.
        reason: Why (the rest of) it is pinned, "" where nothing is.
    """

    path: str
    axis: int
    size: int
    groups: tuple[str, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What can be cut of each parameter, and what stands in the way."""

    axes: tuple[Axis, ...]

    def __repr__(self) -> str:
        rows = [("parameter", "axis", "size", "cut with / why not")]
        for a in self.axes:
            said = [", ".join(a.groups)] if a.groups else []
            said += [f"pinned: {a.reason}"] if a.reason else []
            rows.append((a.path, str(a.axis), str(a.size), "; ".join(said)))
        return "\n".join(aligned(rows, left=(0, 3)))


def explain(net: Any) -> Explanation:
    """Which axes of the parameters can be cut, and why the others cannot.

    Args:
        net: A DAG, or a compacted network.

    Returns:
        A table: for each axis its groups, or the equation and the line that pin it.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.series(nn.Dense(8), nn.relu, nn.Dense(3))
        >>> dj.explain(dj.init(jax.random.key(0), graph, jnp.ones((1, 4))))
        parameter       axis  size  cut with / why not
        Dense/bias         0     8  Dense
        Dense/kernel       0     4  pinned: an input
        Dense/kernel       1     8  Dense
        Dense_1/bias       0     3  pinned: an output
        Dense_1/kernel     0     8  Dense
        Dense_1/kernel     1     3  pinned: an output
    """
    found = units(net)
    names = _names(found)
    channels = found.source.channels
    axes = []
    for path, var in zip(found.paths, found.source.body.invars, strict=False):
        for axis, labels in enumerate(channels.at[var]):
            of = channels.classes.of[labels]
            groups = dict.fromkeys(names[c] for c in of.tolist() if c in names)
            stuck = labels[of == channels.classes.pinned]
            reason = (
                _said(channels.reasons(stuck[:1])[0], len(of)) if len(stuck) else ""
            )
            if not groups and not reason:
                reason = "all of it is one unit"
            axes.append(Axis(path, axis, len(of), (*groups,), reason))
    return Explanation(tuple(axes))


def _names(found: Units) -> dict[int, str]:
    """`{class: group}`, of products the groups of their factors."""
    names = {
        int(c): name for name, group in found.channels.items() for c in group.classes
    }
    classes = found.source.channels.classes
    flat, factors = classes.of[classes.flat], classes.of[classes.factors]
    for row, parts in zip(flat.tolist(), factors.tolist(), strict=True):
        known = dict.fromkeys(names[p] for p in parts if p in names)
        if known and row not in names:
            names[row] = " x ".join(known)
    return names


def _said(reason: Reason | None, size: int) -> str:
    if size == 1:
        return "of size 1"
    if reason is None:
        return "it is tied to indices that are pinned"
    return reason.text + (reason.step.where if reason.step is not None else "")
