"""Where names stand in a drawing: in nodes, along curves where it is free."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

SIZE = 6.5  # of a name, points
LINE = 0.115  # height of such text, inches
_LETTER = 0.59 / 72  # width of a letter for each point of its size, inches
_SMALL = 4.5  # points, the smallest text in a node
_BESIDE = 6.0  # points, text beside a node
_PLACES = (0.5, 0.42, 0.58, 0.34, 0.66, 0.27, 0.73)  # along the curve
_STEEP = 60  # degrees; steeper names are hard to read
_LEVEL = 3  # degrees; flatter names are level

Point = tuple[float, float]


class Name(NamedTuple):
    """The center of a name and its rotation in degrees."""

    x: float
    y: float
    angle: float


class Label(NamedTuple):
    """Text in a node, or above or below it."""

    text: str
    size: float  # points
    shift: float  # above the center of the node, inches


def width(name: str, size: float = SIZE) -> float:
    """Of a text, inches."""
    return _LETTER * size * len(name)


def labels(node: str, merge: Any, radius: float, room: float) -> list[Label]:
    """The name of a node and of its merge, as large as they fit.

    What is too long for the node stands below it, the merge above it; what is too long
    for its column (`room`; 0 keeps all names in their nodes) stands in the node without
    its beginning.

    >>> [labels("attention_12", None, 0.2, room)[0].text for room in (1.0, 0.0)]
    ['attention_12', '…ntion_12']
    """
    if merge is None:
        return [_label(node, 7.0, 0.0, -1, radius, room)]
    called = getattr(merge, "__name__", getattr(merge, "word", type(merge).__name__))
    called = called.lower()
    return [
        _label(node, 6.5, 0.07, -1, radius, room),
        _label(called, 5.5, -0.07, 1, radius, room),
    ]


def _label(
    text: str, size: float, shift: float, side: int, radius: float, room: float
) -> Label:
    most = int(1.8 * radius / (_LETTER * _SMALL))  # letters in the node
    if len(text) > most and width(text, _BESIDE) + 0.08 < room:
        return Label(text, _BESIDE, side * (radius + 0.09))
    text = text if len(text) <= most else f"…{text[1 - most :]}"
    fits = 1.8 * radius / (_LETTER * max(len(text), 1))
    return Label(text, min(size, fits), shift)


def place(
    nodes: dict[str, Point],
    curves: dict[str, np.ndarray],
    bows: dict[str, float],
    radius: float,
) -> dict[str, Name]:
    """Names beside their curves `[point, 2]`, on the outer side where that is free.

    Names without room are left out; `bows` say how far curves are bowed, positive
    upwards.
    """
    lines = np.concatenate([np.zeros((0, 2)), *curves.values()])
    centers = np.array(list(nodes.values()))
    taken, names = np.zeros((0, 2)), {}
    for name, curve in curves.items():
        half = width(name) / 2
        for spot in _spots(curve, -1 if bows[name] < 0 else 1):
            free = (
                not _under(spot, lines, half, LINE / 2)
                and not _under(spot, centers, half + radius, LINE / 2 + radius)
                and not _under(spot, taken, half + 0.05, LINE)
            )
            if free:
                names[name] = spot
                taken = np.concatenate([taken, _middle(spot, half)])
                break
    return names


def _spots(curve: np.ndarray, side: int) -> list[Name]:
    """Places to try, the outer side of the curve first."""
    spots = []
    for sign in (side, -side):
        for share in _PLACES:
            i = round(share * (len(curve) - 1))
            x, y = curve[min(i + 1, len(curve) - 1)] - curve[max(i - 1, 0)]
            angle = np.arctan2(y, x)
            x, y = curve[i] + sign * 0.1 * np.array([-np.sin(angle), np.cos(angle)])
            degrees = float(np.degrees(angle))
            if abs(degrees) <= _STEEP:
                level = abs(degrees) < _LEVEL
                spots.append(Name(float(x), float(y), 0.0 if level else degrees))
    return spots


def _under(spot: Name, points: np.ndarray, half: float, high: float) -> bool:
    """Whether a point lies in a rotated box."""
    cos, sin = np.cos(np.radians(spot.angle)), np.sin(np.radians(spot.angle))
    gaps = (points - spot[:2]) @ np.array([[cos, -sin], [sin, cos]])
    return bool(np.any(np.all(np.abs(gaps) < (half, high), -1)))


def _middle(spot: Name, half: float) -> np.ndarray:
    """Points along a name."""
    angle = np.radians(spot.angle)
    along = np.linspace(-half, half, 2 + int(half / 0.03))[:, None]
    return np.asarray(spot[:2]) + along * np.array([np.cos(angle), np.sin(angle)])
