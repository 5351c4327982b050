"""Which channels may go: no equation that consumes them may miss them.

A contraction does not miss an index at which one of its sides is zero, nor one at which
both are fixed, if their product may be frozen: it is added as a constant. A reduction
does not miss slices that are numbers, which are counted, or one kind of equal slices.
These conditions do not depend on what else is removed, so the largest removable set is
found in one pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dagjax.compaction.channels.coupling import Channels
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.wires import End, Same
from dagjax.compaction.removal.facts import UNKNOWN, UNTRAINED, Table
from dagjax.compaction.removal.propagation import Facts
from dagjax.jaxprs.program import Equation, backward_slice, is_literal


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
    channels: Channels, facts: Facts, equations: Sequence[Equation], prunable: int
) -> tuple[Array, Array]:
    """`[classes]`: what can go, and what of it leaves a constant.

    Args:
        channels: The program.
        facts: The facts of its values.
        equations: Those that are needed.
        prunable: How many of its arguments are parameters.
    """
    classes, units = channels.classes, units_of(channels, prunable)
    bad, folded, unmet = np.zeros((3, classes.count), bool)
    for equation in equations:
        for labels, fine, folds in consumed(channels, facts, equation):
            bad[classes.of[labels[~fine]]] = True
            folded[classes.of[labels[folds]]] = True
        for kernel, fine, _ in ties(channels, facts, equation):
            unmet[classes.of[kernel[~fine]]] = True
    removed = classes.close(units & ~classes.spoil(bad | unmet))
    if channels.untied:
        free = units & ~classes.spoil(bad)
        removed = _with_channels(channels, facts, equations, free, removed)
    folded = classes.close(classes.spoil(folded) | _valued(channels, facts, prunable))
    for equation in equations:
        for kernel, _, data in ties(channels, facts, equation):
            folded[classes.of[kernel[folded[classes.of[data]]]]] = True
    return removed, removed & folded


def _with_channels(
    channels: Channels, facts: Facts, equations: Any, units: Array, removed: Array
) -> Array:
    """Features of untied kernels whose channels are gone go too."""
    classes = channels.classes
    bad = np.zeros(classes.count, bool)
    for equation in equations:
        for kernel, fine, data in ties(channels, facts, equation):
            bad[classes.of[kernel[~(fine | removed[classes.of[data]])]]] = True
    return classes.close(units & ~classes.spoil(bad))


def ties(
    channels: Channels, facts: Facts, equation: Equation
) -> Iterator[tuple[Array, Array, Array]]:
    """Of an untied kernel: labels, which are zero, the labels they belong to."""
    if equation not in channels.untied:
        return
    side, wires = channels.untied[equation], channels.wires[equation]
    at = lambda end: channels.at[equation.eqn.invars[end[0]]][end[1]]
    along = lambda end: facts.along(equation.eqn.invars[end[0]], end[1])
    for pair in wires.contracted:
        kernel, data = sorted(pair, key=lambda end: end[0] != side)
        yield at(kernel), met(facts, along(kernel), along(data))[0], at(data)
    for axis, wire in enumerate(wires.outputs[0]):
        if isinstance(wire, Same) and {i for i, _ in wire.sources} == {side}:
            (end,) = wire.sources
            result = channels.at[equation.eqn.outvars[0]][axis]
            yield at(end), facts.table.is_zero(along(end)), result


def needed(channels: Channels, facts: Facts) -> list[Equation]:
    """The equations that are evaluated; what is one constant is not computed.

    Equations inside calls and loops are needed with them, and their derivative rules.
    """
    body = channels.body
    outermost = backward_slice(body.equations, body.outvars, stops=facts.constants)
    return [*channels.walk(outermost)]


def read_by(channels: Channels, facts: Facts) -> set[Any]:
    """The values that the outputs depend on, constants made of parameters too."""
    body, table = channels.body, facts.table
    is_untrained = lambda v: table[facts.of[v].whole].trained <= UNTRAINED
    constant = {v for v in facts.constants if is_untrained(v)}
    equations = backward_slice(body.equations, body.outvars, stops=constant)
    ends = {v for v in body.outvars if not is_literal(v)}
    return ends.union(*(equation.reads for equation in equations)) - constant


def consumed(
    channels: Channels, facts: Facts, equation: Equation
) -> Iterator[tuple[Array, Array, Array]]:
    """Of each axis that an equation consumes: labels, what may go, what is folded."""
    wires, table = channels.wires.get(equation), facts.table
    if wires is None:
        return
    at = lambda end: channels.at[equation.eqn.invars[end[0]]][end[1]]
    along = lambda end: facts.along(equation.eqn.invars[end[0]], end[1])
    for pair in wires.contracted:
        zero, folds = met(facts, *map(along, pair))
        folds = folds & may_fold(channels, equation, pair)
        data = pair[0] if channels.untied.get(equation) != pair[0][0] else pair[1]
        yield at(data), zero | folds, folds
    for end in wires.reduced:
        if is_literal(equation.eqn.invars[end[0]]):
            continue
        alone = all(channels.is_pinned(at(o)) for o in wires.reduced if o != end)
        fine = _countable(table, along(end)) if alone else table.is_zero(along(end))
        yield at(end), fine, np.zeros_like(fine)
    if equation.name == "conv_general_dilated" and not wires.contracted:
        yield from _grouped(channels, facts, equation)


def may_fold(channels: Channels, equation: Equation, pair: tuple[End, End]) -> bool:
    """Whether a constant can be added for removed indices of a contracted axis.

    Not in a loop, where it may be another one in each pass, and not if the other axes
    that are contracted lose indices too: theirs would be counted twice.
    """
    others = [p for p in channels.wires[equation].contracted if p is not pair]
    at = lambda end: channels.at[equation.eqn.invars[end[0]]][end[1]]
    plain = channels.is_outermost(equation) and len(equation.eqn.invars) == 2
    return plain and all(channels.is_pinned(at(end)) for end, _ in others)


def met(facts: Facts, one: Array, two: Array) -> tuple[Array, Array]:
    """Of contracted axes: where a side is zero; where the product may be frozen."""
    table = facts.table
    zero = table.is_zero(one) | table.is_zero(two)
    fixed = table.is_fixed(one) & table.is_fixed(two) & table.may_freeze(one, two)
    return zero, fixed & ~zero


def _valued(channels: Channels, facts: Facts, prunable: int) -> Array:
    """`[classes]`: those of which parameters make a constant that is not zero."""
    valued = np.zeros(channels.classes.count, bool)
    for var in channels.body.invars[:prunable]:
        for labels, slices in zip(channels.at[var], facts.of[var].axes, strict=True):
            if slices is not None:
                kept = facts.table.is_number(slices) & ~facts.table.is_zero(slices)
                valued[channels.classes.of[labels[kept]]] = True
    return valued


def _countable(table: Table, slices: Array) -> Array:
    """Constants, and of the other kinds of slices the most frequent one."""
    fine = table.is_constant(slices)
    of_data = ~table.is_fixed(slices) & (slices != UNKNOWN)
    kinds, counts = np.unique(slices[of_data], return_counts=True)
    if kinds.size:
        fine = fine | (slices == kinds[counts.argmax()]) & table.may_freeze(slices)
    return fine


def _grouped(channels: Channels, facts: Facts, equation: Equation) -> Iterator[Any]:
    """Inside the groups of a convolution channels are summed."""
    p, (lhs, rhs, *_) = equation.eqn.params, equation.eqn.invars
    numbers = p["dimension_numbers"]
    if p["batch_group_count"] > 1 or rhs.aval.shape[numbers.rhs_spec[1]] == 1:
        return
    inner = facts.along(rhs, numbers.rhs_spec[1])
    features = facts.along(lhs, numbers.lhs_spec[1]).reshape(-1, len(inner))
    is_zero = facts.table.is_zero
    fine = is_zero(inner) | is_zero(features).all(0)
    yield channels.at[rhs][numbers.rhs_spec[1]], fine, np.zeros_like(fine)
