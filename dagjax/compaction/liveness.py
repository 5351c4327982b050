"""Which channels are dead or constant, from the values of masked parameters.

A channel can be removed exactly if nothing that reads it changes: every contraction
meets a zero on one of its sides (or two sides that do not depend on the data, whose
product is added once and for all), every sum over it knows what the slice holds. These
conditions do not depend on what else is removed, so the largest removable set is found
in one pass; entries that die with it may free others, to a fixpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels import Channels
from dagjax.compaction.known import FIXED, ZERO, Fact, Known, Table, fact_of
from dagjax.compaction.labels import Array
from dagjax.compaction.program import Step, is_literal


@dataclasses.dataclass(frozen=True, eq=False)
class Liveness:
    """What can go.

    Args:
        removed: `[classes]`.
        folded: `[classes]`, those of them that still emit a constant: zombies.
        facts: For each leaf and axis the constants that its slices are, NaN where
            nothing is known.
        known: The facts of all values.
        unread: Places of leaves that nothing needs.
        live: For each leaf which entries are alive, None where all are.
    """

    removed: Array
    folded: Array
    facts: list[tuple[Array, ...]]
    known: Known
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
    problem = _Problem(channels, leaves, masks)
    found = problem.solve(constants=False)
    if (problem.silent & problem.units & ~found.removed).any():
        found = problem.solve(constants=True)
    return found


class _Problem:
    """What is asked, and what stays the same between rounds."""

    def __init__(self, channels: Channels, leaves: Sequence[Any], masks: Sequence[Any]):
        self.channels, self.leaves = channels, leaves
        self.classes = channels.classes
        ends = channels.body.invars[: len(leaves)]
        self.axes = [[self.classes.of[a] for a in channels.at[v]] for v in ends]
        spare = [None] * (len(leaves) - len(masks))
        self.masks = [*masks, *spare]
        touched = np.zeros(self.classes.count, bool)
        for of in (of for axes in self.axes[: len(masks)] for of in axes):
            touched[of] = True
        self.units = self.classes.atoms() & self.classes.spoil(touched)
        self.silent = np.zeros(self.classes.count, bool)

    def solve(self, constants: bool) -> Liveness:
        live = [None if m is None else np.array(m, bool) for m in self.masks]
        while True:
            found = self._round(live, constants)
            dead = found.removed & ~found.folded
            pairs = zip(live, self.axes, strict=True)
            if not any([_clear(m, axes, dead) for m, axes in pairs]):
                return found

    def _round(self, live: list[Any], constants: bool) -> Liveness:
        slices = [
            [_along(m, d, n) for d, n in enumerate(np.shape(x))]
            for m, x in zip(live, self.leaves, strict=True)
        ]
        for axes, alive in zip(self.axes, slices, strict=True):
            for of, any_alive in zip(axes, alive, strict=True):
                self.silent[of[~any_alive]] = True
        facts = [
            self._facts(place, alive, constants) for place, alive in enumerate(slices)
        ]
        known = known_of(self.channels, facts)
        steps, reads = needed(self.channels, known)
        removed, folded = self._removable(known, steps)
        if constants:  # of what stays nothing is known: it may be trained
            facts = [
                tuple(
                    np.where(removed[of] | (f == 0), f, np.nan)
                    for f, of in zip(fact, axes, strict=True)
                )
                for fact, axes in zip(facts, self.axes, strict=True)
            ]
            known = known_of(self.channels, facts)
            steps, reads = needed(self.channels, known)
        inputs = self.channels.body.invars[: len(self.leaves)]
        unread = frozenset(i for i, v in enumerate(inputs) if v not in reads)
        return Liveness(removed, folded, facts, known, unread, live)

    def _facts(self, place: int, alive: Any, constants: bool) -> tuple[Array, ...]:
        facts = tuple(np.where(a, np.nan, 0.0) for a in alive)
        x = self.leaves[place]
        if constants and np.ndim(x) == 1 and jnp.issubdtype(x.dtype, jnp.number):
            chosen = self.silent[self.axes[place][0]] & alive[0]
            facts[0][chosen] = np.asarray(x)[chosen].astype(np.float64)
        return facts

    def _removable(self, known: Known, steps: list[Step]) -> tuple[Array, Array]:
        bad, folded = np.zeros((2, self.classes.count), bool)
        for step in steps:
            for labels, fine, folds in consumed(self.channels, known, step):
                bad[self.classes.of[labels[~fine]]] = True
                folded[self.classes.of[labels[folds]]] = True
        removed = self.classes.close(self.units & ~self.classes.spoil(bad))
        return removed, removed & self.classes.spoil(folded)


def known_of(channels: Channels, facts: Sequence[tuple[Array, ...]]) -> Known:
    """The facts of all values, from the constants that slices of the leaves are."""
    table, inputs = Table(), channels.body.invars
    given = []
    for fact in facts:
        axes = tuple(table.constants(f) if len(f) > 1 else None for f in fact)
        zero = any((f == 0).all() for f in fact)
        given.append(Fact(axes, ZERO if zero else FIXED))
    blank = [Fact((None,) * len(v.aval.shape)) for v in inputs[len(facts) :]]
    return Known(channels, [*given, *blank], fact_of, table)


def needed(channels: Channels, known: Known) -> tuple[list[Step], set[Any]]:
    """The steps that are evaluated, and the values that they read.

    What is one constant is not computed. Steps inside calls and loops are needed with
    them.
    """
    gone = {v for v, f in known.of.items() if known.table.is_number(f.whole)}
    wanted = {v for v in channels.body.outvars if not is_literal(v)} - gone
    steps: list[Step] = []
    for step in reversed(channels.body.steps):
        if wanted.intersection(step.eqn.outvars):
            wanted.update(v for v in step.reads if v not in gone)
            steps.append(step)
            steps.extend(s for b in step.bodies for s in b.walk())
    return steps, wanted


def consumed(
    channels: Channels, known: Known, step: Step
) -> Iterator[tuple[Array, Array, Array]]:
    """For each axis that a step consumes: labels, what may go, what must be folded."""
    wires = channels.wires.get(step)
    if wires is None:
        return
    at = lambda end: channels.at[step.eqn.invars[end[0]]][end[1]]
    facts = lambda end: known.along(step.eqn.invars[end[0]], end[1])
    for pair in wires.contracted:
        zero, both = met(known, *map(facts, pair))
        alone = channels.is_outermost(step) and all(
            channels.is_pinned(at(other[0])) for other in wires.contracted
            if other is not pair
        )  # fmt: skip
        yield at(pair[0]), zero | (both & alone), both & ~zero
    for end in wires.reduced:
        if is_literal(step.eqn.invars[end[0]]):
            continue
        alone = all(channels.is_pinned(at(o)) for o in wires.reduced if o != end)
        fine = _countable(known.table, facts(end)) if alone else facts(end) == ZERO
        yield at(end), fine, np.zeros_like(fine)
    if step.name == "conv_general_dilated" and not wires.contracted:
        yield from _grouped(channels, known, step)


def met(known: Known, one: Array, two: Array) -> tuple[Array, Array]:
    """Of two contracted axes: where a side is zero, and where both are fixed."""
    fixed = known.table.is_fixed
    return (one == ZERO) | (two == ZERO), fixed(one) & fixed(two)


def _countable(table: Table, facts: Array) -> Array:
    """Constants, and of the other kinds of slices the most frequent one."""
    fine = table.is_constant(facts)
    others = facts[~table.is_fixed(facts) & (facts > FIXED)]
    if others.size:
        kinds, counts = np.unique(others, return_counts=True)
        fine = fine | (facts == kinds[counts.argmax()])
    return fine


def _grouped(channels: Channels, known: Known, step: Step) -> Iterator[Any]:
    """Inside the groups of a convolution channels are summed."""
    numbers, p = step.eqn.params["dimension_numbers"], step.eqn.params
    lhs, rhs = step.eqn.invars[:2]
    if p["batch_group_count"] > 1 or rhs.aval.shape[numbers.rhs_spec[1]] == 1:
        return
    inner = known.along(rhs, numbers.rhs_spec[1])
    features = known.along(lhs, numbers.lhs_spec[1]).reshape(-1, len(inner))
    fine = (inner == ZERO) | (features == ZERO).all(0)
    yield channels.at[rhs][numbers.rhs_spec[1]], fine, np.zeros_like(fine)


# --- leaves ---------------------------------------------------------------------------


def _along(mask: Array | None, axis: int, size: int) -> Array:
    """Which slices have an entry that is alive."""
    if mask is None:
        return np.ones(size, bool)
    return np.asarray(mask.any(tuple(d for d in range(mask.ndim) if d != axis)))


def _clear(mask: Array | None, axes: Sequence[Array], dead: Array) -> bool:
    """Forget the entries of dead channels; whether any was alive."""
    changed = False
    if mask is None:
        return changed
    for place, of in enumerate(axes):
        gone = dead[of]
        if gone.any():
            index = (slice(None),) * place + (gone,)
            changed = changed or bool(mask[index].any())
            mask[index] = False
    return changed
