"""Which units to keep: scores of units, and the largest set within a budget."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from dagjax.compaction.channels import cost_model
from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.mask_checks import leaves_like, named
from dagjax.compaction.channels.units import ARCS, Units, units
from dagjax.jaxprs.gc_paused import gc_paused

_REDUCTIONS = ("l1", "l2", "mean", "max")
_SCOPES = ("global", "group", "level")
_NORMALIZATIONS = ("none", "mean", "lamp")


class CompactionWarning(UserWarning):
    """A request that is legal and likely not meant."""


@gc_paused()
def prune_units(
    net: Any,
    scores: Any = "l2",
    *,
    density: float | None = None,
    flops: float | None = None,
    params: float | None = None,
    scope: str = "global",
    round_to: int | Mapping[str, int] = 1,
    keep_at_least: int = 1,
    reduce: str = "l2",
    normalize: str = "mean",
    only: str | Iterable[str] | Callable[[str], bool] | None = None,
) -> Any:
    """The mask that keeps the units of the highest scores at a budget.

    The cost comes as near to the budget as whole units (and `round_to`) allow; that may
    be a little above it.

    Args:
        net: A DAG, or a compacted network.
        scores: "l1", "l2", "mean" or "max" of the weights' magnitudes; a tree of scores
            of every weight, like `net.params`; `{group: [units]}`; or `{arc: score}`.
        density: The share of units to keep, in (0, 1].
        flops: The share of operations to keep.
        params: The share of parameters to keep.
        scope: "global" (all units compete), "group" or "level" (the same share each).
        round_to: Keep multiples of so many units of a group; `{group: multiple}` for
            some of them (kernels of some widths are much quicker than of others).
        keep_at_least: Units that stay in every group.
        reduce: How the scores of weights become that of their unit.
        normalize: "none", "mean" (a group's scores over their mean: groups then compare
            with each other) or "lamp" (Lee et al. 2021).
        only: Names of the groups to prune, or a function of a name; the others stay.

    Returns:
        A mask like `net.params`: `dj.compact(net, mask)` cuts it out.

    Raises:
        CompactionError: If not exactly one budget is given, or it cannot be met.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.series(nn.Dense(8), nn.relu, nn.Dense(3))
        >>> dag = dj.init(jax.random.key(0), graph, jnp.ones((1, 4)))
        >>> mask = dj.prune_units(dag, "l2", flops=0.5)
        >>> int(mask["Dense"]["bias"].sum())
        4
    """
    budget, share = _budget(density=density, flops=flops, params=params)
    _check_choice("scope", scope, _SCOPES)
    found = units(net)
    steps = _multiples(found, round_to)
    _check_count("keep_at_least", keep_at_least)
    per_unit = unit_scores(net, scores, found, reduce, normalize)
    if not per_unit:
        raise CompactionError(
            "nothing of this network can be removed; dj.explain(net) says why"
        )
    per_unit = _chosen(per_unit, found, only)
    plan = _Plan(found, per_unit, scope, steps, keep_at_least)
    count = plan.count(density) if density is not None else plan.search(budget, share)
    kept = plan.kept(count)
    if share < 1 and all(k.all() for k in kept.values()):
        warnings.warn(
            f"nothing is removed at {budget}={share}: no unit is small enough, or "
            f"round_to={round_to} and keep_at_least={keep_at_least} hold all",
            CompactionWarning,
            stacklevel=2,
        )
    return found.mask(kept)


def _multiples(found: Units, round_to: Any) -> dict[str, int]:
    """`{group: multiple}` of all groups."""
    whole = not isinstance(round_to, Mapping)
    given: dict[str, Any] = dict.fromkeys(found, round_to) if whole else {**round_to}
    for name, multiple in given.items():
        _check_count("round_to" if whole else f"round_to of {found[name]}", multiple)
    return {name: given.get(name, 1) for name in found}


def _check_count(what: str, value: Any) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < 1:
        raise CompactionError(f"{what} is a whole number from 1 on, got {value!r}")


def _check_choice(what: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise CompactionError(f"{what} {value!r}; it is one of {', '.join(known)}")


def _budget(**given: float | None) -> tuple[str, float]:
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        raise CompactionError(
            "give exactly one of density=, flops=, params= (each a kept share), got "
            f"{', '.join(named) or 'none'}"
        )
    ((name, value),) = named.items()
    if not isinstance(value, numbers.Real) or not 0 < value <= 1:
        raise CompactionError(f"{name} is a kept share in (0, 1], got {value!r}")
    return name, float(value)


def _chosen(scores: dict[str, Array], found: Units, only: Any) -> dict[str, Array]:
    if only is None:
        return scores
    names = [only] if isinstance(only, str) else only
    wanted = names if callable(names) else {*names}.__contains__
    if not callable(names):
        for name in names:
            _ = found[name]
    chosen = {name: s for name, s in scores.items() if wanted(name)}
    if not chosen:
        raise CompactionError(f"only= picks none of the groups {', '.join(scores)}")
    return chosen


class _Plan:
    """An order of all units, and what is kept when the first of them go."""

    def __init__(
        self, found: Units, scores: dict, scope: str, steps: dict[str, int], least: int
    ):
        self.found, self.scores, self.steps, self.least = found, scores, steps, least
        self.names = [*scores]
        sizes = [len(s) for s in scores.values()]
        self.group = np.repeat(np.arange(len(sizes)), sizes)
        values = np.concatenate([*scores.values()])
        self.order = np.argsort(self._keys(values, scope), kind="stable")

    def _keys(self, values: Array, scope: str) -> Array:
        """What is compared: the score, or its rank among its group or level."""
        if scope == "global":
            return values
        levels = np.array([self.found[name].level for name in self.names])
        kind = self.group if scope == "group" else levels[self.group]
        keys = np.zeros(len(values))
        for k in np.unique(kind):
            mine = np.flatnonzero(kind == k)
            rank = np.argsort(np.argsort(values[mine], kind="stable"), kind="stable")
            keys[mine] = (rank + 0.5) / len(mine)
        return keys

    def count(self, density: float) -> int:
        """How many units go at a density."""
        return len(self.order) - max(1, round(density * len(self.order)))

    def kept(self, count: int) -> dict[str, Array]:
        """`{group: bools}` when the first units go, as far as each group allows."""
        goes = np.bincount(self.group[self.order[:count]], minlength=len(self.names))
        found = {}
        for place, name in enumerate(self.names):
            scores, size = self.scores[name], len(self.scores[name])
            left = size - int(goes[place])
            step = self.steps[name]
            left = max(step, int(left / step + 0.5) * step)
            left = min(size, max(left, self.least))
            best = np.argsort(-scores, kind="stable")[:left]
            found[name] = np.isin(np.arange(size), best)
        return found

    def search(self, budget: str, share: float) -> int:
        """The count of units that brings the cost nearest to its budget."""
        place = ("flops", "params").index(budget)
        whole = self.found.total[place]
        cost = lambda count: self.found.cost(self.kept(count))[place] / whole
        low, high = 0, len(self.order)
        least = cost(high)
        if least > share * 1.02:
            raise CompactionError(
                f"{budget}={share} cannot be met: {least:.3f} is the least that is "
                f"left with keep_at_least={self.least} and this round_to; what is "
                "pinned stays (dj.explain)"
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle) > share else (low, middle)
        return min((low, high), key=lambda count: abs(cost(count) - share))


# --- scores of units ------------------------------------------------------------------


def unit_scores(
    net: Any,
    scores: Any,
    found: Units | None = None,
    reduce: str = "l2",
    normalize: str = "mean",
) -> dict[str, Array]:
    """`{group: [units]}`: the scores of weights as scores of units.

    Args:
        net: The network.
        scores: As for `prune_units`.
        found: Its units, if they are known already.
        reduce: "l1", "l2", "mean" or "max" over a unit's weights.
        normalize: "none", "mean" or "lamp".
    """
    found = units(net) if found is None else found
    _check_choice("reduce", reduce, _REDUCTIONS)
    _check_choice("normalize", normalize, _NORMALIZATIONS)
    if isinstance(scores, str):
        if scores not in _REDUCTIONS:
            raise CompactionError(
                f"no score {scores!r}; by name there are {', '.join(_REDUCTIONS)}, and "
                "dj.scores has others, as trees like net.params"
            )
        reduce, scores = scores, net.params
    if isinstance(scores, Mapping) and scores and {*scores} <= {*found.groups}:
        given = {k: np.asarray(v, float) for k, v in scores.items()}
        return {k: _numbers(k, _checked(k, v, found)) for k, v in given.items()}
    if isinstance(scores, Mapping) and scores and _are_arcs(scores, found):
        group = found[ARCS]
        return {ARCS: np.array([float(scores.get(a, np.inf)) for a in group.classes])}
    raw = _aggregated(found, _leaves(net, scores), reduce)
    return {
        name: _normalized(_numbers(name, raw[g.classes]), normalize)
        for name, g in found.channels.items()
    }


def _are_arcs(scores: Mapping[str, Any], found: Units) -> bool:
    scalars = all(
        np.ndim(v) == 0 for v in scores.values() if not isinstance(v, Mapping)
    )
    flat = not any(isinstance(v, (Mapping, list, tuple)) for v in scores.values())
    return flat and scalars and bool({*scores} & {*found.arcs})


def _checked(name: str, scores: Array, found: Units) -> Array:
    if scores.shape != (found[name].size,):
        raise CompactionError(
            f"group {name!r} has {found[name].size} units, got scores of shape "
            f"{scores.shape}"
        )
    return scores


def _numbers(name: str, scores: Array) -> Array:
    if np.isnan(scores).any():
        raise CompactionError(
            f"the scores of {int(np.isnan(scores).sum())} units of group {name!r} are "
            "NaN: look for NaN among the weights or scores"
        )
    return scores


def _leaves(net: Any, scores: Any) -> list[Any]:
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


def _aggregated(found: Units, leaves: list[Any], reduce: str) -> Array:
    """`[classes]`: the scores of a unit's weights in all its parameters."""
    channels = found.source.channels
    total, count = np.zeros((2, channels.classes.count))
    put = np.maximum if reduce == "max" else np.add
    for leaf, var in zip(leaves, found.source.body.invars, strict=False):
        if leaf is None:
            continue
        x = np.asarray(leaf)
        x = np.asarray(np.abs(x) if np.iscomplexobj(x) else x, dtype=np.float32)
        x = np.square(x) if reduce == "l2" else np.abs(x)
        for axis, of in enumerate(channels.classes_at(var)):
            if channels.is_pinned(channels.at[var][axis]):
                continue
            others = tuple(d for d in range(x.ndim) if d != axis)
            slices = x.max(others) if reduce == "max" else x.sum(others)
            put.at(total, of, slices)
            np.add.at(count, of, x.size / len(of))
    total = cost_model.spread(channels, total, put)
    count = np.maximum(cost_model.spread(channels, count), 1)
    return {"l2": np.sqrt(total), "mean": total / count}.get(reduce, total)


def _normalized(scores: Array, how: str) -> Array:
    if how == "mean":
        return scores / (scores.mean() or 1)
    if how == "lamp":
        order = np.argsort(scores, kind="stable")
        squares = np.square(scores[order])
        left = np.cumsum(squares[::-1])[::-1]
        found = np.empty_like(scores)
        found[order] = squares / np.where(left > 0, left, 1)
        return found
    return scores
