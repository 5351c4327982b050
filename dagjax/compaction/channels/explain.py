"""For every axis of every parameter: with which group it is cut, or why it is not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dagjax.compaction.channels.coupling import Reason
from dagjax.compaction.channels.units import Units, units
from dagjax.graph.core.network import Network
from dagjax.jaxprs.versions import Atom
from dagjax.text import aligned

_ONE_UNIT = "all of it is one unit"
_ALSO_WRITTEN = "a constant or a state, which writes it too"
_LARGEST = 10  # pins that the summary shows
_ADVICE = {
    "an input": "the data has this size",
    "an output": "it keeps its size; return only what is used",
    "the output": "it keeps its size; leave it out of the result where nobody reads it",
    "scan runs": "the layers are cut alike, at the same indices; give them as a list, "
    "stack them inside the function and trace it with unroll=True: each has a width of "
    "its own then, and is an arc that may go",
    _ALSO_WRITTEN: "it would stay without these; as a parameter it is cut with them",
    "no rule": "register_primitive of compaction.channels.wiring gives it one",
    "random": "trace the network in inference mode",
}


class Axis(NamedTuple):
    """One axis of one parameter.

    Args:
        path: The parameter.
        axis: Which axis.
        size: Its length.
        groups: The groups that its indices belong to.
        reason: Why (the rest of) it is pinned, "" where nothing is.
        cut: How many of its indices lie in a unit.
        pinned: How many are pinned.
    """

    path: str
    axis: int
    size: int
    groups: tuple[str, ...]
    reason: str
    cut: int
    pinned: int


class Pin(NamedTuple):
    """What keeps parameters from being cut.

    Args:
        reason: The equation, input or output.
        entries: How many parameters have an axis that it pins.
        parameters: Their paths.
        advice: What to do, "" where nothing can be done.
    """

    reason: str
    entries: int
    parameters: tuple[str, ...]
    advice: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What can be cut of each parameter, and what stands in the way.

    Args:
        axes: Axis by axis.
        entries: How many numbers the parameters hold.
        free: How many of them lie in some unit, and can be cut.
        pins: What pins the others, the largest first.
    """

    axes: tuple[Axis, ...]
    entries: int
    free: int
    pins: tuple[Pin, ...]

    def __repr__(self) -> str:
        share = self.free / max(self.entries, 1)
        head = f"{share:.0%} of {self.entries:,} parameters lie in units"
        pins = [self._line(pin) for pin in self.pins[:_LARGEST]]
        return "\n".join([head, *pins, "", *self._table()])

    def _line(self, pin: Pin) -> str:
        rest = f" and {len(pin.parameters) - 2} more" * (len(pin.parameters) > 2)
        of = f"{', '.join(pin.parameters[:2])}{rest}"
        advice = f": {pin.advice}" if pin.advice else ""
        return f"{pin.entries:>11,} pinned by {pin.reason} ({of}){advice}"

    def _table(self) -> list[str]:
        rows = [("parameter", "axis", "size", "cut with / why not")]
        for a in self.axes:
            said = [", ".join(a.groups)] if a.groups else []
            said += [f"pinned: {a.reason}"] if a.reason else []
            rows.append((a.path, str(a.axis), str(a.size), "; ".join(said)))
        return aligned(rows, left=(0, 3))


def explain(net: Network) -> Explanation:
    """Which axes of the parameters can be cut, and why the others cannot.

    Args:
        net: A DAG, or a compacted network.

    Returns:
        A summary (what share can be cut; what pins most, and what to do), then a table:
        for each axis its groups, or the equation and the line that pin it.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.series(nn.Dense(8), nn.relu, nn.Dense(3))
        >>> dj.explain(dj.init(jax.random.key(0), graph, jnp.ones((1, 4))))
        96% of 67 parameters lie in units
                 32 pinned by an input (Dense/kernel): the data has this size
                 27 pinned by an output (Dense_1/bias, Dense_1/kernel): it keeps its ...
        <BLANKLINE>
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
    leaves = dict(zip(found.paths, found.source.body.invars, strict=False))
    axes = {path: _axes(path, var, names, found) for path, var in leaves.items()}
    entries = {path: math.prod(var.aval.shape) for path, var in leaves.items()}
    stay = sum(math.prod(a.size - a.cut for a in of) for of in axes.values())
    total, flat = sum(entries.values()), tuple(a for of in axes.values() for a in of)
    return Explanation(flat, total, total - stay, _pins(flat, entries))


def _axes(path: str, var: Atom, names: Mapping[int, str], found: Units) -> list[Axis]:
    """Each axis of a parameter."""
    axes, channels = [], found.source.channels
    unread = found.paths.index(path) in found.dense.unread
    for axis, labels in enumerate(channels.at[var]):
        of = channels.classes.of[labels]
        named = [names[c] for c in of.tolist() if c in names]
        stuck = labels[of == channels.classes.pinned]
        reason, count = "", len(stuck)
        if count:
            reason = _said(channels.reasons(stuck[:1])[0], len(of))
        elif unread or found.dense.removed[of].all():
            reason = "nothing reads it, so it goes without a mask"
        elif not named:
            whole = bool((of == of[0]).all())
            reason, count = (_ONE_UNIT, 0) if whole else (_ALSO_WRITTEN, len(of))
        groups = tuple(dict.fromkeys(named))
        axes.append(Axis(path, axis, len(of), groups, reason, len(named), count))
    return axes


def _pins(axes: Iterable[Axis], entries: Mapping[str, int]) -> tuple[Pin, ...]:
    """What pins most comes first."""
    pinned: dict[str, dict[str, int]] = {}
    for a in axes:
        if a.pinned and a.size > 1:
            of = pinned.setdefault(a.reason, {})
            held = entries[a.path] * a.pinned // a.size
            of[a.path] = max(of.get(a.path, 0), held)
    pins = [
        Pin(reason, sum(of.values()), tuple(of), _advice(reason))
        for reason, of in pinned.items()
    ]
    return tuple(sorted(pins, key=lambda pin: -pin.entries))


def _advice(reason: str) -> str:
    return next((advice for key, advice in _ADVICE.items() if key in reason), "")


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
