"""The order in which units go, and how many of them a budget takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.units import Units
from dagjax.compaction.pruning.scores import best

_Measure = Callable[[Mapping[str, Array]], float]


class Removal:
    """An order of all units, and what is kept when the first of them go.

    Args:
        found: All units of the network.
        scores: `{group: [units]}`; a unit whose score is infinite never goes.
        scope: "global", "group" or "level": among which units scores are compared.
        multiples: `{group: n}`, a group keeps a multiple of `n` units.
        least: How many units a group keeps.
    """

    def __init__(
        self,
        found: Units,
        scores: dict[str, Array],
        scope: str,
        multiples: dict[str, int],
        least: int,
    ):
        self.found, self.scores, self.scope = found, scores, scope
        self.multiples, self.least = multiples, least
        self.names = [*scores]
        sizes = [len(s) for s in scores.values()]
        self.group = np.repeat(np.arange(len(sizes)), sizes)
        values = np.concatenate([*scores.values()])
        order = np.argsort(self._keys(values), kind="stable")
        self.order = order[values[order] < np.inf]

    def _keys(self, values: Array) -> Array:
        """What is compared: the score, or its rank among its group or level."""
        if self.scope == "global":
            return values
        levels = np.array([self.found[name].level for name in self.names])
        kind = self.group if self.scope == "group" else levels[self.group]
        keys = np.zeros(len(values))
        for k in np.unique(kind):
            mine = np.flatnonzero(kind == k)
            rank = np.argsort(np.argsort(values[mine], kind="stable"), kind="stable")
            keys[mine] = (rank + 0.5) / len(mine)
        return keys

    def kept(self, count: int) -> dict[str, Array]:
        """`{group: bools}` when the first units go, as far as each group allows."""
        goes = np.bincount(self.group[self.order[:count]], minlength=len(self.names))
        left = {
            name: self._allowed(name, len(self.scores[name]) - int(gone))
            for name, gone in zip(self.names, goes, strict=True)
        }
        return {name: best(self.scores[name], n) for name, n in left.items()}

    def _allowed(self, name: str, left: int) -> int:
        """The number of units nearest to `left` that a group may keep."""
        scores, step = self.scores[name], self.multiples[name]
        protected = int(np.isposinf(scores).sum())
        left = max(step, int(left / step + 0.5) * step)
        return min(len(scores), max(left, self.least, protected))

    def within(self, budget: str, share: float) -> dict[str, Array]:
        """`{group: bools}`: what is kept at a budget.

        Args:
            budget: "density", "flops" or "params".
            share: How much of it is left.

        Raises:
            CompactionError: If too much stays whatever goes.
        """
        if budget == "density" and self.scope != "global":  # each keeps its own share
            units = len(self.group)
            return self.kept(min(len(self.order), units - max(1, round(share * units))))
        measure = self.measure(budget)
        kept = self._nearest(measure, share)
        if not np.isclose(measure(kept), self._exactly(budget)(kept), rtol=1e-9):
            measure = self._exactly(budget)
            kept = self._nearest(measure, share)
        self._check_met(budget, share, measure)
        return kept

    def _check_met(self, budget: str, share: float, measure: _Measure) -> None:
        """The least that can be left is at most one step of units above the share."""
        least = self.kept(len(self.order))
        above = measure(least) - share
        if above > 0 and above > self._step(measure, least):
            raise CompactionError(
                f"budget {budget}={share} cannot be met: at most "
                f"{1 - measure(least):.3f} of it can be removed with "
                f"keep_at_least={self.least}, this round_to and these scores (an "
                "infinite one protects its unit); what is pinned stays (dj.explain)"
            )

    def _nearest(self, measure: _Measure, share: float) -> dict[str, Array]:
        """What brings the measure nearest to the share.

        The more units go, the less is left, also where a group keeps multiples or a
        least number, so it is found by halving.
        """
        low, high = 0, len(self.order)
        while high - low > 1:
            middle = (low + high) // 2
            less = measure(self.kept(middle)) <= share
            low, high = (low, middle) if less else (middle, high)
        both = self.kept(low), self.kept(high)
        return min(both, key=lambda kept: abs(measure(kept) - share))

    def _step(self, measure: _Measure, kept: dict[str, Array]) -> float:
        """What a group's next multiple of units would add, in the group of most."""
        more = {
            name: best(self.scores[name], int(k.sum()) + self.multiples[name])
            for name, k in kept.items()
        }
        own = measure(kept)
        return max(measure({**kept, name: k}) for name, k in more.items()) - own

    def measure(self, budget: str) -> _Measure:
        """The share that is left, by what goes with the units alone."""
        if budget == "density":
            return lambda kept: (
                sum(int(k.sum()) for k in kept.values()) / len(self.group)
            )
        place, whole = self._whole(budget)
        return lambda kept: self.found.estimate(kept)[place] / whole

    def _exactly(self, budget: str) -> _Measure:
        """The share that is left of the compacted network."""
        if budget == "density":
            return self.measure(budget)
        place, whole = self._whole(budget)
        return lambda kept: self.found.cost(kept)[place] / whole

    def _whole(self, budget: str) -> tuple[int, float]:
        place = ("flops", "params").index(budget)
        whole = self.found.total[place]
        if not whole:
            raise CompactionError(
                "flops=: this network has no products, so it has no operations to "
                "count; give density= or params="
            )
        return place, whole
