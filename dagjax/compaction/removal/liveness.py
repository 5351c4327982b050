"""Which channels are dead or constant, from the values of masked parameters.

A channel can be removed exactly if nothing that reads it changes: every contraction
meets a zero on one of its sides (or two sides that do not depend on the data, whose
product is added once and for all), every sum over it knows what the slice holds. These
conditions do not depend on what else is removed, so the largest removable set is found
in one pass; entries that die with it may free others, to a fixpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.coupling import Channels
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.wiring import Same
from dagjax.compaction.removal.facts import (
    FIXED,
    UNKNOWN,
    ZERO,
    Fact,
    Known,
    Table,
    fact_of,
)
from dagjax.jaxprs.program import Step, is_literal


@dataclasses.dataclass(frozen=True, eq=False)
class Liveness:
    """What can go.

    Args:
        removed: `[classes]`.
        folded: `[classes]`, those of them that still emit a constant: zombies.
        facts: For each leaf and axis the constants that its slices are; NaN where they
            are fixed, infinity where they may be trained.
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
        self.prunable, self.units = len(masks), units_of(channels, len(masks))
        self.silent = np.zeros(self.classes.count, bool)

    def solve(self, constants: bool) -> Liveness:
        live = [None if m is None else np.asarray(m) for m in self.masks]
        while True:
            slices = [
                [_along(m, d, n) for d, n in enumerate(np.shape(x) or (1,))]
                for m, x in zip(live, self.leaves, strict=True)
            ]
            found = self._round(live, slices, constants)
            dead = found.removed & ~found.folded
            rows = zip(live, self.axes, slices, strict=True)
            left = [_cleared(m, axes, alive, dead) for m, axes, alive in rows]
            if all(a is b for a, b in zip(live, left, strict=True)):
                return found
            live = left

    def _round(self, live: list[Any], slices: list[Any], constants: bool) -> Liveness:
        for axes, alive in zip(self.axes, slices, strict=True):
            for of, any_alive in zip(axes, alive, strict=False):
                self.silent[of[~any_alive]] = True
        facts = [
            self._facts(place, alive, constants) for place, alive in enumerate(slices)
        ]
        known, reads, removed, folded = self._found(facts)
        while constants or folded.any():  # what stays may be trained: it is not fixed
            rows = zip(facts, slices, strict=True)
            facts = [self._frozen(i, *row, removed) for i, row in enumerate(rows)]
            before = removed
            known, reads, removed, folded = self._found(facts)
            if (removed == before).all():
                break
        inputs = self.channels.body.invars[: len(self.leaves)]
        unread = frozenset(i for i, v in enumerate(inputs) if v not in reads)
        return Liveness(removed, folded, facts, known, unread, live)

    def _found(self, facts: Any) -> Any:
        known = known_of(self.channels, facts)
        steps, reads = needed(self.channels, known)
        return known, reads, *removable(self.channels, known, steps, self.prunable)

    def _frozen(
        self, place: int, facts: Any, alive: Any, removed: Array
    ) -> tuple[Array, ...]:
        """The facts that hold while the parameters that stay are trained.

        What is zero by its mask stays so; a bias that happens to be zero need not.
        """
        other = np.inf if place < self.prunable else np.nan
        gone = [removed[of] for of in self.axes[place]] or [np.zeros(1, bool)]
        rows = zip(facts, alive, gone, strict=True)
        return tuple(np.where(g | ~a, f, other) for f, a, g in rows)

    def _facts(self, place: int, alive: Any, constants: bool) -> tuple[Array, ...]:
        facts = tuple(np.where(a, np.nan, 0.0) for a in alive)
        x = self.leaves[place]
        if constants and np.ndim(x) == 1 and _is_real(x):
            chosen = self.silent[self.axes[place][0]] & alive[0]
            facts[0][chosen] = np.asarray(x)[chosen].astype(np.float64)
        return facts


@functools.lru_cache(maxsize=16)
def units_of(channels: Channels, count: int) -> Array:
    """`[classes]`: what may go at all: indices of parameters, or products of them.

    Args:
        channels: The program.
        count: How many of its arguments are parameters.
    """
    classes = channels.classes
    touched = np.full(classes.count, not channels.coupled)
    for var in channels.body.invars[:count]:
        for labels in channels.at[var]:
            touched[classes.of[labels]] = True
    return classes.atoms() & classes.spoil(touched)


def removable(
    channels: Channels, known: Known, steps: Sequence[Step], prunable: int
) -> tuple[Array, Array]:
    """`[classes]`: what can go, and what of it must be folded as a constant.

    Args:
        channels: The program.
        known: The facts of its values.
        steps: Those that are needed.
        prunable: How many of its arguments are parameters.
    """
    classes, units = channels.classes, units_of(channels, prunable)
    bad, folded = np.zeros((2, classes.count), bool)
    loose = np.zeros(classes.count, bool)  # ties of kernels: they go with channels
    for step in steps:
        for labels, fine, folds in consumed(channels, known, step):
            bad[classes.of[labels[~fine]]] = True
            folded[classes.of[labels[folds]]] = True
        for own, fine, _ in ties(channels, known, step):
            loose[classes.of[own[~fine]]] = True
    removed = classes.close(units & ~classes.spoil(bad | loose))
    if channels.loose:
        removed = _with_channels(
            channels, known, steps, units & ~classes.spoil(bad), removed
        )
    folded = classes.close(classes.spoil(folded) | _valued(channels, known, prunable))
    for step in steps:
        for own, _, data in ties(channels, known, step):
            folded[classes.of[own[folded[classes.of[data]]]]] = True
    return removed, removed & folded


def _with_channels(
    channels: Channels, known: Known, steps: Any, units: Array, removed: Array
) -> Array:
    """Features of kernels whose channels are gone go too."""
    classes = channels.classes
    bad = np.zeros(classes.count, bool)
    for step in steps:
        for own, fine, data in ties(channels, known, step):
            bad[classes.of[own[~(fine | removed[classes.of[data]])]]] = True
    return classes.close(units & ~classes.spoil(bad))


def ties(
    channels: Channels, known: Known, step: Step
) -> Iterator[tuple[Array, Array, Array]]:
    """Of a loose kernel: labels, which of them are zero, the labels they belong to."""
    if step not in channels.loose:
        return
    kernel, wires = channels.loose[step], channels.wires[step]
    at = lambda end: channels.at[step.eqn.invars[end[0]]][end[1]]
    facts = lambda end: known.along(step.eqn.invars[end[0]], end[1])
    for pair in wires.contracted:
        own, data = sorted(pair, key=lambda end: end[0] != kernel)
        yield at(own), met(known, facts(own), facts(data))[0], at(data)
    for axis, wire in enumerate(wires.outputs[0]):
        if isinstance(wire, Same) and {i for i, _ in wire.sources} == {kernel}:
            (end,) = wire.sources
            made = channels.at[step.eqn.outvars[0]][axis]
            yield at(end), facts(end) == ZERO, made


def known_of(channels: Channels, facts: Sequence[tuple[Array, ...]]) -> Known:
    """The facts of all values, from the constants that slices of the leaves are."""
    table, inputs = Table(), channels.body.invars
    given = []
    for var, fact in zip(inputs, facts, strict=False):
        rank = len(var.aval.shape)
        axes = tuple(table.constants(f) if len(f) > 1 else None for f in fact[:rank])
        zero = any((f == 0).all() for f in fact)
        fixed = any((~np.isinf(f)).all() for f in fact)
        given.append(Fact(axes, ZERO if zero else FIXED if fixed else UNKNOWN))
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
        data = pair[0] if channels.loose.get(step) != pair[0][0] else pair[1]
        yield at(data), zero | (both & alone), both & ~zero
    for end in wires.reduced:
        if is_literal(step.eqn.invars[end[0]]):
            continue
        alone = all(channels.is_pinned(at(o)) for o in wires.reduced if o != end)
        fine = _countable(known.table, facts(end)) if alone else facts(end) == ZERO
        yield at(end), fine, np.zeros_like(fine)
    if step.name == "conv_general_dilated" and not wires.contracted:
        yield from _grouped(channels, known, step)


def _valued(channels: Channels, known: Known, prunable: int) -> Array:
    """`[classes]`: those of which parameters make a constant that is not zero."""
    found = np.zeros(channels.classes.count, bool)
    for var in channels.body.invars[:prunable]:
        for labels, facts in zip(channels.at[var], known.of[var].axes, strict=True):
            if facts is not None:
                held = known.table.is_constant(facts) & (facts != ZERO)
                found[channels.classes.of[labels[held]]] = True
    return found


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


def _is_real(x: Any) -> bool:
    number = jnp.issubdtype(x.dtype, jnp.number)
    return number and not jnp.issubdtype(x.dtype, jnp.complexfloating)


def _along(mask: Array | None, axis: int, size: int) -> Array:
    """Which slices have an entry that is alive."""
    if mask is None:
        return np.ones(size, bool)
    return np.asarray(mask.any(tuple(d for d in range(mask.ndim) if d != axis)))


def _cleared(
    mask: Array | None, axes: Sequence[Array], alive: Sequence[Array], dead: Array
) -> Array | None:
    """The mask without the entries of dead channels; itself if none was alive."""
    if mask is None:
        return mask
    left = mask
    for place, of in enumerate(axes):
        gone = dead[of] & alive[place]
        if gone.any():
            left = left.copy() if left is mask else left
            left[(slice(None),) * place + (gone,)] = False
    return left
