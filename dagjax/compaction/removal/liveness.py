"""What masks make dead: channels that no equation misses, and leaves that none reads.

Entries of parameters die with their channel, which may free other channels, and so on
to a fixpoint. Values of parameters are never evidence that something is dead; they are
read only for the constant that is left of a unit when the mask has cut it off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.coupling import Channels
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.removal.consumption import (
    needed,
    read_by,
    removable,
    units_of,
)
from dagjax.compaction.removal.facts import (
    LEAVES,
    MASKED,
    STAYS,
    UNTRAINED,
    Fact,
    Table,
    same_axes,
)
from dagjax.compaction.removal.propagation import Facts
from dagjax.types import PyTree

# Of each axis of a leaf `[2, n]`: the number that a slice is (or NaN), its origin.
Given = tuple[Array, ...]


class Round(NamedTuple):
    """A round of the search for what is dead.

    Args:
        given: For each leaf and axis what its slices are.
        keeps: For each leaf and axis the indices that it leaves.
        unread: Indices of leaves that nothing needs.
    """

    given: tuple[Given, ...]
    keeps: tuple[tuple[Array | None, ...], ...]
    unread: frozenset[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Liveness:
    """What can go.

    Args:
        removed: `[classes]`.
        folded: `[classes]`, those of them that leave a constant: constant units.
        rounds: How this was found, in the order in which entries died.
        facts: The facts of all values.
        unread: Indices of leaves that nothing needs.
        live: For each leaf which entries are alive, None where all are.
    """

    removed: Array
    folded: Array
    rounds: tuple[Round, ...]
    facts: Facts
    unread: frozenset[int]
    live: list[Array | None]


def liveness(
    channels: Channels, leaves: Sequence[Any], masks: Sequence[Any]
) -> Liveness:
    """The largest set of channels that can be removed exactly.

    Args:
        channels: The program of the network.
        leaves: The network's leaves, parameters first.
        masks: For each parameter a bool array, or None if all of it is kept.
    """
    search = _Search(channels, leaves, masks)
    dead = search.fixpoint(constants=False)
    if (search.silent & search.units & ~dead.removed).any():
        dead = search.fixpoint(constants=True)
    return dead


def dead_of_masks(channels: Channels, masks: Sequence[Any]) -> Liveness:
    """What masks make dead whatever the parameters are, if biases are masked too.

    Args:
        channels: The program of the network.
        masks: For each parameter a bool array, or None if all of it is kept.
    """
    shapes = [v.aval for v in channels.body.invars[: channels.free]]
    return _Search(channels, shapes, masks).fixpoint(constants=False)


def replayed(
    channels: Channels, rounds: Sequence[Round], prunable: int
) -> tuple[Facts, Array] | None:
    """The facts and the removed classes of the same search at other shapes.

    An entry may be dead because of the shapes (an index that a slice leaves out): what
    died in a round must die in the same one here.

    Args:
        channels: The program at other shapes of its inputs.
        rounds: Those of the search.
        prunable: How many of its arguments are parameters.

    Returns:
        None if something else is removed at these shapes.
    """
    facts, removed = None, np.zeros(channels.classes.count, bool)
    for number, (given, keeps, unread) in enumerate(rounds, 1):
        facts = facts_of(channels, given)
        reads, equations = read_by(channels, facts), needed(channels, facts)
        removed, folded = removable(channels, facts, equations, prunable)
        dead = removed & ~folded if number < len(rounds) else removed
        kept = map(channels.kept(dead), channels.body.invars)
        read = any(channels.body.invars[leaf] in reads for leaf in unread)
        if read or not all(map(same_axes, kept, keeps)):
            return None
    return None if facts is None else (facts, removed)


def facts_of(channels: Channels, given: Sequence[Given]) -> Facts:
    """The facts of all values, from what slices of the leaves are.

    Args:
        channels: The program.
        given: For each leaf and axis what its slices are.
    """
    table, inputs = Table(), channels.body.invars
    rows = zip(inputs, given, strict=False)
    of_leaves = [_leaf_fact(table, axes, len(v.aval.shape)) for v, axes in rows]
    data = [Fact((None,) * len(v.aval.shape)) for v in inputs[len(given) :]]
    return Facts(channels, [*of_leaves, *data], table)


def _leaf_fact(table: Table, axes: Given, rank: int) -> Fact:
    """The facts of one leaf; an entry stays only if it stays along all axes."""
    slices = [table.entries(*axis) for axis in axes]
    if any(table.is_zero(facts).all() for facts in slices):
        by_mask = min(int(axis[1].min(initial=UNTRAINED)) for axis in axes)
        whole = table.entry(0.0, by_mask)
    else:
        trained = min(int(axis[1].max(initial=UNTRAINED)) for axis in axes)
        whole = table.entry(np.nan, trained)
    alone = rank == 1 and len(slices[0]) and (slices[0] == slices[0][0]).all()
    whole = int(slices[0][0]) if alone or not rank else whole
    long = [facts if len(facts) > 1 else None for facts in slices[:rank]]
    return Fact(tuple(long), whole)


class _Search:
    """The search for the largest removable set under given masks."""

    def __init__(self, channels: Channels, leaves: Sequence[Any], masks: Sequence[Any]):
        self.channels, self.leaves = channels, leaves
        self.classes = channels.classes
        inputs = channels.body.invars[: len(leaves)]
        self.axes = [[self.classes.of[a] for a in channels.at[v]] for v in inputs]
        self.masks = [*masks, *[None] * (len(leaves) - len(masks))]
        self.prunable, self.units = len(masks), units_of(channels, len(masks))
        self.silent = np.zeros(self.classes.count, bool)

    def fixpoint(self, constants: bool) -> Liveness:
        """Until no more entries die; it ends because each round kills some.

        Args:
            constants: Whether the numbers of kept biases in units that are cut off are
                looked at.
        """
        live = [None if m is None else np.asarray(m) for m in self.masks]
        rounds: list[Round] = []
        while True:
            alive = [
                [_along(m, d, n) for d, n in enumerate(np.shape(x) or (1,))]
                for m, x in zip(live, self.leaves, strict=True)
            ]
            result, given = self._round(live, alive, constants)
            dead = result.removed & ~result.folded
            rows = zip(live, self.axes, alive, strict=True)
            left = [_cleared(m, axes, slices, dead) for m, axes, slices in rows]
            settled = all(a is b for a, b in zip(live, left, strict=True))
            keeps = self._keeps(result.removed if settled else dead)
            rounds.append(Round(given, keeps, result.unread))
            if settled:
                return dataclasses.replace(result, rounds=tuple(rounds))
            live = left

    def _keeps(self, removed: Array) -> tuple[Any, ...]:
        inputs = self.channels.body.invars[: len(self.leaves)]
        return tuple(map(self.channels.kept(removed), inputs))

    def _round(
        self, live: list[Any], alive: list[Any], constants: bool
    ) -> tuple[Liveness, tuple[Given, ...]]:
        """The removable set of one state of the masks, a greatest fixpoint.

        At first all parameters count as leaving with their unit. Those that turn out to
        stay may be trained, so what was made of them is not frozen, which keeps more.
        The set only shrinks, so this ends; at the end what was assumed is true.
        """
        for axes, slices in zip(self.axes, alive, strict=True):
            for of, any_alive in zip(axes, slices, strict=False):
                self.silent[of[~any_alive]] = True
        removed = np.ones(self.classes.count, bool)
        while True:
            given = tuple(
                self._given(leaf, slices, removed, constants)
                for leaf, slices in enumerate(alive)
            )
            facts = facts_of(self.channels, given)
            equations = needed(self.channels, facts)
            less, folded = removable(self.channels, facts, equations, self.prunable)
            less = less & removed
            if (less == removed).all():
                break
            removed = less
        inputs = self.channels.body.invars[: len(self.leaves)]
        reads = read_by(self.channels, facts)
        unread = frozenset(i for i, v in enumerate(inputs) if v not in reads)
        return Liveness(removed, removed & folded, (), facts, unread, live), given

    def _given(
        self, leaf: int, alive: PyTree, removed: Array, constants: bool
    ) -> Given:
        """What slices of a leaf are while the parameters that stay are trained."""
        stays = STAYS if leaf < self.prunable else LEAVES
        values = self._numbers(leaf, alive[0]) if constants else None
        axes = []
        for axis, slices in enumerate(alive):
            by_mask = _touched(self.masks[leaf], axis, len(slices))
            zero = np.where(by_mask, MASKED, UNTRAINED)
            leaves = (
                removed[self.axes[leaf][axis]] if self.axes[leaf] else np.zeros(1, bool)
            )
            number = np.full(len(slices), np.nan) if values is None else values
            number = np.where(leaves, number, np.nan)
            trained = np.where(leaves, LEAVES, stays)
            dead = np.stack(
                [np.where(slices, number, 0.0), np.where(slices, trained, zero)]
            )
            axes.append(dead)
        return tuple(axes)

    def _numbers(self, leaf: int, alive: Array) -> Array | None:
        """The entries of a vector in units that the mask has cut off."""
        x = self.leaves[leaf]
        if np.ndim(x) != 1 or not _is_real(x):
            return None
        silent = self.silent[self.axes[leaf][0]] & alive
        return np.where(silent, np.asarray(x).astype(np.float64), np.nan)


def _is_real(x: Array) -> bool:
    number = jnp.issubdtype(x.dtype, jnp.number)
    return number and not jnp.issubdtype(x.dtype, jnp.complexfloating)


def _along(mask: Array | None, axis: int, size: int) -> Array:
    """Which slices have an entry that is alive."""
    if mask is None:
        return np.ones(size, bool)
    return np.atleast_1d(mask.any(tuple(d for d in range(mask.ndim) if d != axis)))


def _touched(mask: Array | None, axis: int, size: int) -> Array:
    """Which slices have an entry that is masked."""
    if mask is None:
        return np.zeros(size, bool)
    return _along(~np.asarray(mask), axis, size)


def _cleared(
    mask: Array | None, axes: Sequence[Array], alive: Sequence[Array], dead: Array
) -> Array | None:
    """The mask without the entries of dead channels; itself if none was alive."""
    if mask is None:
        return mask
    left = mask
    for axis, of in enumerate(axes):
        gone = dead[of] & alive[axis]
        if gone.any():
            left = left.copy() if left is mask else left
            left[(slice(None),) * axis + (gone,)] = False
    return left
