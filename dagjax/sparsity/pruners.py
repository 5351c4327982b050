"""Pruners: the (init, update) pair that turns trained parameters into the next mask.

Schedules are optax schedules, `round -> density`; the density is handed to `update`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dagjax.sparsity import masks
from dagjax.sparsity.scores import Score
from dagjax.sparsity.selection import Selection
from dagjax.types import Mask, Params, PyTree, Scalar, State


class Update(Protocol):
    """Find the next mask."""

    def __call__(
        self,
        key: jax.Array,
        state: State,
        params: Params,
        mask: Mask,
        batch: PyTree,
        density: Scalar,
    ) -> tuple[Mask, Any]:
        """A mask of the wanted density within the old one, and the new state."""
        ...


class Pruner(NamedTuple):
    """A pruning method: `init(params) -> state` and `update(...) -> (mask, state)`."""

    init: Callable[[Params], PyTree]
    update: Update


def one_shot(score: Score, select: Selection) -> Pruner:
    """Score once, select once.

    Args:
        score: From `dagjax.scores`.
        select: From `dagjax.selection`.

    Example:
        >>> import dagjax as dj, jax, jax.numpy as jnp
        >>> pruner = one_shot(dj.scores.magnitude, dj.selection.global_topk)
        >>> w = {"kernel": jax.random.normal(jax.random.key(0), (10, 10))}
        >>> mask, _ = pruner.update(None, (), w, dj.masks.full(w), None, 0.8)
        >>> dj.masks.kept(mask).item()
        80
    """

    def update(
        key: jax.Array,
        state: State,
        params: Params,
        mask: Mask,
        batch: PyTree,
        density: Scalar,
    ) -> tuple[Mask, Any]:
        scores = score(key, masks.apply(mask, params), mask, batch)
        return select(scores, mask, density), state

    return Pruner(lambda params: (), update)


def iterative(score: Score, select: Selection, steps: int) -> Pruner:
    """Score and select several times, with densities in geometric steps.

    Step `i` of `n` goes to `d_0 (d / d_0)^(i / n)`, as in SynFlow (Tanaka et al. 2020).

    Args:
        score: From `dagjax.scores`.
        select: From `dagjax.selection`.
        steps: How often the scores are computed anew.

    Raises:
        ValueError: If there is no step.
    """
    if steps < 1:
        raise ValueError(f"steps {steps}: expected at least 1")
    once = one_shot(score, select)

    def update(
        key: jax.Array,
        state: State,
        params: Params,
        mask: Mask,
        batch: PyTree,
        density: Scalar,
    ) -> tuple[Mask, Any]:
        start = masks.density(mask)
        for i in range(1, steps + 1):
            # The last step takes the density as it is, so that the count is exact.
            goal = start * (density / start) ** (i / steps) if i < steps else density
            # Units may count otherwise than entries: no step goes below the density.
            goal = jnp.maximum(goal, density) if i < steps else density
            step_key = jax.random.fold_in(key, i)
            mask, state = once.update(step_key, state, params, mask, batch, goal)
        return mask, state

    return Pruner(once.init, update)
