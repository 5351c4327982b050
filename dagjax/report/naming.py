"""Where the names of arcs stand in a drawing: along their curves, where it is free."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SIZE = 6.5  # of a name, points
_LETTER, _LINE = 0.059, 0.115  # of such text, wide and high, inches
_PLACES = (0.5, 0.42, 0.58, 0.34, 0.66, 0.27, 0.73)  # along the curve
_STEEP = 60  # degrees; steeper names are hard to read

Point = tuple[float, float]


class Name(NamedTuple):
    """The center of a name and its rotation in degrees."""

    x: float
    y: float
    angle: float


def width(name: str) -> float:
    """Of a name, inches."""
    return _LETTER * len(name)


def place(
    nodes: dict[str, Point],
    curves: dict[str, np.ndarray],
    bows: dict[str, float],
    radius: float,
) -> dict[str, Name]:
    """Names beside their curves, on the outer side where that is free.

    Args:
        nodes: Centers.
        curves: `[point, 2]`, from center to center.
        bows: How far each is bowed, positive upwards.
        radius: Of the nodes.

    Returns:
        Those names for which there is room.
    """
    lines = np.concatenate([np.zeros((0, 2)), *curves.values()])
    centers = np.array(list(nodes.values()))
    taken, names = np.zeros((0, 2)), {}
    for name, curve in curves.items():
        half = width(name) / 2
        for spot in _spots(curve, -1 if bows[name] < 0 else 1):
            free = (
                not _under(spot, lines, half, _LINE / 2)
                and not _under(spot, centers, half + radius, _LINE / 2 + radius)
                and not _under(spot, taken, half + 0.05, _LINE)
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
            if abs(np.degrees(angle)) <= _STEEP:
                spots.append(Name(float(x), float(y), float(np.degrees(angle))))
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
