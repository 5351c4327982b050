"""Which units to keep, and the mask that keeps them."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.units import Units, units
from dagjax.compaction.pruning.order import Removal
from dagjax.compaction.pruning.scores import check_choice, unit_scores
from dagjax.graph.core.network import Network
from dagjax.jaxprs.gc_paused import gc_paused
from dagjax.types import PyTree

_SCOPES = ("global", "group", "level")


class CompactionWarning(UserWarning):
    """A request that is legal and likely not meant."""


@gc_paused()
def prune_units(
    net: Network,
    scores: PyTree = "l2",
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
) -> PyTree:
    """The mask that keeps the units of the highest scores at a budget.

    The cost of the compacted network comes as near to the budget as whole units (and
    `round_to`) allow, at most one step of units above it. A unit whose score is
    infinite stays.

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
    check_choice("scope", scope, _SCOPES)
    found = units(net)
    steps = _multiples(found, round_to)
    _check_count("keep_at_least", keep_at_least)
    per_unit = unit_scores(net, scores, found, reduce, normalize)
    if not per_unit:
        raise CompactionError(
            "nothing of this network can be removed; dj.explain(net) says why"
        )
    per_unit = _chosen(per_unit, found, only)
    order = Removal(found, per_unit, scope, steps, keep_at_least)
    kept = order.within(budget, share)
    if all(k.all() for k in kept.values()) and share < order.measure(budget)(kept):
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
    given: dict[str, PyTree] = dict.fromkeys(found, round_to) if whole else {**round_to}
    for name, multiple in given.items():
        _check_count("round_to" if whole else f"round_to of {found[name]}", multiple)
    return {name: given.get(name, 1) for name in found}


def _check_count(what: str, value: int) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < 1:
        raise CompactionError(f"{what} is a whole number from 1 on, got {value!r}")


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
