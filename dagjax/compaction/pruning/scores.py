"""Scores of units from scores of weights, of groups or of arcs.

They are compared as float64, which all integers up to 2^53 and all smaller floats are
exactly (larger integers by their ranks), and checked once, after every step that can
make them NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.arc_units import ARCS
from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.mask_checks import leaves_like, named, with_values
from dagjax.compaction.channels.units import Units, units
from dagjax.graph.core.network import Network
from dagjax.types import Params, PyTree

REDUCTIONS = ("l1", "l2", "mean", "max")
NORMALIZATIONS = ("none", "mean", "lamp")


def unit_scores(
    net: Network,
    scores: PyTree,
    known: Units | None = None,
    reduce: str = "l2",
    normalize: str = "mean",
) -> dict[str, Array]:
    """`{group: [units]}`: the scores of weights as scores of units.

    Args:
        net: The network.
        scores: As for `prune_units`.
        known: Its units, if they are known already.
        reduce: "l1", "l2", "mean" or "max" over a unit's weights.
        normalize: "none", "mean" or "lamp".
    """
    known = units(net) if known is None else known
    check_choice("reduce", reduce, REDUCTIONS)
    check_choice("normalize", normalize, NORMALIZATIONS)
    if isinstance(scores, str):
        if scores not in REDUCTIONS:
            raise CompactionError(
                f"no score {scores!r}; by name there are {', '.join(REDUCTIONS)}, and "
                "dj.scores has others, as trees like net.params"
            )
        reduce, scores = scores, with_values(net).params
    if _are_of_groups(scores, known, net.params):
        by_group = _of_groups(scores, known)
    elif _are_of_arcs(scores, known):
        by_group = {ARCS: _of_arcs(scores, known)}
    else:
        sums = _aggregated(known, _leaves(net, scores), reduce)
        by_group = {k: _normalized(v, normalize) for k, v in sums.items()}
    return {name: _numbers(name, values) for name, values in by_group.items()}


def best(scores: Array, count: int) -> Array:
    """`[units]` bools: the `count` highest scores, of equal ones the first."""
    keep = np.zeros(len(scores), bool)
    keep[np.argsort(-scores, kind="stable")[:count]] = True
    return keep


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is none of the choices."""
    if value not in choices:
        raise CompactionError(f"{what} {value!r}; it is one of {', '.join(choices)}")


# --- what was given -------------------------------------------------------------------


def _are_of_groups(scores: PyTree, known: Units, params: Params) -> bool:
    """Whether scores are `{group: [units]}` and no tree like the parameters."""
    if not isinstance(scores, Mapping) or not scores or _is_like(scores, params):
        return False
    vectors = all(map(_is_vector, scores.values()))
    return vectors and {*scores} <= {*known.groups}


def _is_like(scores: PyTree, params: Params) -> bool:
    same = jax.tree.structure(scores) == jax.tree.structure(params)
    pairs = zip(jax.tree.leaves(scores), jax.tree.leaves(params), strict=False)
    return same and all(np.shape(s) == np.shape(x) for s, x in pairs)


def _is_vector(value: PyTree) -> bool:
    if isinstance(value, list | tuple):
        return all(np.ndim(x) == 0 and not isinstance(x, Mapping) for x in value)
    return hasattr(value, "shape")


def _are_of_arcs(scores: PyTree, known: Units) -> bool:
    """Whether scores are `{arc: number}`, some of them of arcs that can go."""
    if not isinstance(scores, Mapping):
        return False
    numbers = all(
        not isinstance(v, Mapping | list | tuple) and np.ndim(v) == 0
        for v in scores.values()
    )
    return numbers and bool({*scores} & {*known.arcs.leaves})


def _of_arcs(scores: Mapping[str, Any], known: Units) -> Array:
    """Of arcs that can go; those without a score stay."""
    if wrong := {*scores} - known.arcs.names:
        raise CompactionError(
            f"no arc {', '.join(map(repr, sorted(wrong)))}; arcs that can go are "
            f"{', '.join(known.arcs.leaves)}"
        )
    return np.array([float(scores.get(a, np.inf)) for a in known[ARCS].classes])


def _of_groups(scores: Mapping[str, Any], known: Units) -> dict[str, Array]:
    """As float64 where that is exact; else all by their ranks."""
    given = {name: _of_group(name, x, known) for name, x in scores.items()}
    if all(np.array_equal(x.astype(np.float64).astype(object), x.astype(object))
           for x in given.values() if x.dtype.kind in "iu"):  # fmt: skip
        return {name: x.astype(np.float64) for name, x in given.items()}
    exact = {name: _numbers(name, x).tolist() for name, x in given.items()}
    ranks = {x: i for i, x in enumerate(sorted({*itertools.chain(*exact.values())}))}
    return {name: np.array([*map(ranks.get, x)], float) for name, x in exact.items()}


def _of_group(name: str, scores: PyTree, known: Units) -> Array:
    values = np.asarray(scores)
    if values.shape != (known[name].size,):
        raise CompactionError(
            f"group {name!r} has {known[name].size} units, got scores of shape "
            f"{values.shape}"
        )
    if values.dtype.kind in "iu":
        return values
    if not jnp.issubdtype(values.dtype, jnp.floating) and values.dtype.kind != "b":
        raise CompactionError(
            f"scores are real numbers, got {values.dtype} for group {name!r}"
        )
    return values.astype(np.float64)


def _numbers(name: str, scores: Array) -> Array:
    if np.isnan(scores).any():
        raise CompactionError(
            f"the scores of {int(np.isnan(scores).sum())} units of group {name!r} are "
            "NaN: look for NaN among the weights or scores"
        )
    return scores


def _leaves(net: Network, scores: PyTree) -> list[PyTree]:
    """The scores leaf by leaf; None where there are none."""
    leaves = leaves_like(
        scores, net.params, "if not {group: [units]} or {arc: score}, scores"
    )
    if all(s is None for s in leaves):
        raise CompactionError("there are no scores: all that was given is None")
    for s, (name, x) in zip(leaves, named(net.params).items(), strict=True):
        if s is not None and np.shape(s) != np.shape(x):
            raise CompactionError(
                f"scores of shape {np.shape(s)} for {name} of {np.shape(x)}"
            )
    return leaves


# --- from weights to units ------------------------------------------------------------


def _aggregated(known: Units, leaves: list[PyTree], reduce: str) -> dict[str, Array]:
    """`{group: [units]}`: the scores of a unit's weights in all its parameters."""
    size = known.source.channels.classes.count
    total, count = np.zeros((2, size))
    put = np.maximum if reduce == "max" else np.add
    whole = [*map(_magnitudes, leaves)]
    unit = _scale(whole) if reduce == "l2" else 1.0  # squares neither vanish nor burst
    for leaf, axis, of in known.extent.axes:
        if (x := whole[leaf]) is None:
            continue
        x = np.square(x / unit) if reduce == "l2" else x
        others = tuple(d for d in range(x.ndim) if d != axis)
        slices = x.max(others, initial=0) if reduce == "max" else x.sum(others)
        put.at(total, of, slices)
        np.add.at(count, of, x.size / len(of))
    totals, counts = known.of_units(total, put), known.of_units(count)
    change = {
        "l2": lambda t, n: np.sqrt(t) * unit,
        "mean": lambda t, n: t / np.maximum(n, 1),
    }.get(reduce, lambda t, n: t)
    return {name: change(t, counts[name]) for name, t in totals.items()}


def _magnitudes(x: Array) -> Array | None:
    """None of what has none: a key."""
    if x is None or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return None
    x = np.asarray(x)
    return np.abs(x) if np.iscomplexobj(x) else np.abs(x.astype(np.float64))


def _scale(leaves: list[Array | None]) -> float:
    """The largest finite magnitude, 1 if there is none."""
    finite = (x[np.isfinite(x)] for x in leaves if x is not None)
    return max((float(x.max(initial=0)) for x in finite), default=0.0) or 1.0


def _normalized(scores: Array, how: str) -> Array:
    """Scores that groups can be compared by; infinite ones stay what they are."""
    finite = np.isfinite(scores)
    if how == "none" or not finite.any():
        return scores
    change = {"mean": _over_the_mean, "lamp": _lamp}[how]
    normalized = scores.copy()
    normalized[finite] = change(scores[finite])
    return normalized


def _over_the_mean(scores: Array) -> Array:
    largest = np.abs(scores).max() or 1.0
    scaled = scores / largest
    return scaled / (scaled.mean() or 1.0)


def _lamp(scores: Array) -> Array:
    order = np.argsort(scores, kind="stable")
    squares = np.square(scores[order] / (np.abs(scores).max() or 1.0))
    left = np.cumsum(squares[::-1])[::-1]
    lamp = np.empty_like(scores)
    lamp[order] = squares / np.where(left > 0, left, 1)
    return lamp
