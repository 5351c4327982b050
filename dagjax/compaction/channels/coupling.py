"""Every axis of every value of a program: which indices are cut together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dagjax.compaction.channels.labels import Array, Classes, Labels
from dagjax.compaction.channels.wiring import (
    NEW,
    Joined,
    New,
    Pinned,
    Ref,
    Same,
    Wiring,
    wiring,
)
from dagjax.jaxprs.program import CALLS, Body, Step, is_literal

Axes = tuple[Array, ...]  # labels, axis by axis
# Whose pinned outputs are positions, of which nobody asks why.
_SPATIAL = frozenset(
    """
    conv_general_dilated reduce_window_sum reduce_window_max reduce_window_min
    """.split()
)


class CompactionError(ValueError):
    """A cut that cannot be made exactly; the message names what stands in the way."""


class Reason(NamedTuple):
    """Why an axis is pinned.

    Args:
        text: In words.
        step: The step that pins it, None for arguments and results.
        unknown: Whether the step's primitive has no rule.
    """

    text: str
    step: Step | None = None
    unknown: bool = False


class Channels:
    """The labels of a program's values, and their classes.

    Args:
        body: The program.
        free: How many of its arguments may be cut; the others hold data.
        outputs: Whether its outputs are to stay whole.
        coupled: Whether the features of a kernel go only with the channels that they
            make or read. If not, such contractions are in `loose`, with the operand
            that is the kernel.

    `at[value]` holds the labels of its axes, `wires[step]` its wiring.
    """

    def __init__(
        self, body: Body, free: int, outputs: bool = True, coupled: bool = True
    ):
        self.body, self.free, self.labels = body, free, Labels()
        self.coupled, self.loose = coupled, {}
        self._own = {*body.invars[:free]}
        self.at: dict[Any, Axes] = {}
        self.wires: dict[Step, Wiring] = {}
        for var in body.invars:
            self.at[var] = self._fresh(var)
        for var in body.invars[free:]:
            self._pin(self.at[var], Reason("an input"))
        self._run(body)
        for atom in body.outvars:
            if outputs and not is_literal(atom):
                self._pin(self.at[atom], Reason("an output"))

    @functools.cached_property
    def classes(self) -> Classes:
        """Which labels go together."""
        return self.labels.solve()

    def reasons(self, labels: Array) -> list[Reason | None]:
        """For each label why it is pinned, None where it is not."""
        pins = self.labels.pins
        return [pins[i][1] if i >= 0 else None for i in self._nearest[labels]]

    @functools.cached_property
    def _nearest(self) -> Array:
        return self.labels.nearest(self.classes.of == self.classes.pinned)

    def classes_at(self, var: Any) -> tuple[Array, ...]:
        """The classes of the indices of a value's axes."""
        of = self.classes.of
        return tuple(of[labels] for labels in self.at[var])

    def kept(self, removed: Array) -> Callable[[Any], tuple[Array | None, ...]]:
        """Of removed classes: `value -> kept indices of each axis`, None for all.

        Args:
            removed: `[classes]`, closed under products.
        """
        of = self.classes.of

        @functools.cache
        def places(var: Any) -> tuple[Array | None, ...]:
            gone = (removed[of[labels]] for labels in self.at[var])
            return tuple(np.flatnonzero(~g) if g.any() else None for g in gone)

        return places

    @functools.cached_property
    def _outermost(self) -> set[Step]:
        return {*self.body.steps}

    def is_outermost(self, step: Step) -> bool:
        """Whether a step is in no call or loop."""
        return step in self._outermost

    def is_pinned(self, labels: Array) -> bool:
        """Whether none of these can be removed."""
        return bool((self.classes.of[labels] == self.classes.pinned).all())

    def removed(self, keeps: dict[Any, tuple[Array | None, ...]]) -> Array:
        """`[classes]`: what is gone if of some values these indices are kept.

        Args:
            keeps: `{value: kept indices of each axis}`, None for all.

        Raises:
            CompactionError: If no removal explains them.
        """
        classes, seen, gone = self.classes, *np.zeros((2, self.classes.count), bool)
        for var, axes in keeps.items():
            for labels, kept in zip(self.at[var], axes, strict=True):
                of = classes.of[labels]
                seen[of] = True
                gone[np.delete(of, kept) if kept is not None else of[:0]] = True
        found = classes.close(classes.causes(gone, seen))
        if (found[seen] != gone[seen]).any():
            raise CompactionError(
                "the program has other channels at these shapes than where it was cut; "
                "compact the network again with inputs of these shapes"
            )
        return found

    def _fresh(self, var: Any) -> Axes:
        return tuple(self.labels.fresh(n) for n in var.aval.shape)

    def _pin(self, axes: Sequence[Array], reason: Reason) -> None:
        for labels in axes:
            self.labels.pin(labels, reason)

    def _run(self, body: Body) -> None:
        for var in body.consts:
            self.at[var] = self._fresh(var)
        for step in body.steps:
            if step.reads and self._own.issuperset(step.reads):
                self._own.update(step.eqn.outvars)
            if step.bodies:
                self._call(step)
            else:
                self._step(step)

    # --- one equation ----------------------------------------------------------------

    def _step(self, step: Step) -> None:
        wires = self.wires[step] = wiring(step.eqn)
        if not wires.known:
            reason = Reason(f"{step.name} has no rule", step, unknown=True)
        else:
            reason = Reason(f"{step.name} mixes this axis", step)
        operands = [self._of(atom) for atom in step.eqn.invars]
        kernel = self._kernel(step, wires)
        for var, axes in zip(step.eqn.outvars, wires.outputs, strict=True):
            self.at[var] = tuple(
                self._wired(step, NEW if _is_of(wire, kernel) else wire, operands, n)
                for wire, n in zip(axes, var.aval.shape, strict=True)
            )
        for operand, axis in wires.pinned:
            self.labels.pin(operands[operand][axis], reason)
        for (i, a), (j, b) in wires.contracted if kernel is None else ():
            self.labels.unify(operands[i][a], operands[j][b])
        self._related(step, wires, operands)

    def _kernel(self, step: Step, wires: Wiring) -> int | None:
        """The operand that is made of parameters alone, if its ties are to be loose."""
        if self.coupled or not wires.contracted or not self.is_outermost(step):
            return None
        own = [i for i, v in enumerate(step.eqn.invars) if v in self._own]
        if len(own) == 1:
            self.loose[step] = own[0]
        return own[0] if len(own) == 1 else None

    def _of(self, atom: Any) -> Axes:
        return () if is_literal(atom) else self.at[atom]

    def _wired(self, step: Step, wire: Any, operands: list[Axes], size: int) -> Array:
        if size == 1 and isinstance(wire, Joined):  # what one entry is taken of stays
            taken = Reason("one index of this axis is taken alone", step)
            self.labels.pin(self._joined(wire, operands), taken)
        if size == 1 or (isinstance(wire, Pinned) and step.name in _SPATIAL):
            return np.zeros(size, np.int64)
        if isinstance(wire, Pinned):
            return self._pinned(step, size)
        if isinstance(wire, New) or (isinstance(wire, Same) and not wire.sources):
            return self.labels.fresh(size)
        if isinstance(wire, Joined):
            return self._joined(wire, operands)
        first, *rest = (operands[i][a] for i, a in wire.sources)
        for other in rest:
            self.labels.unify(first, other)
        return first

    def _pinned(self, step: Step, size: int) -> Array:
        """Labels of a new axis that cannot be cut, so that messages find the step."""
        labels = self.labels.fresh(size)
        self.labels.pin(labels, Reason(f"{step.name} makes this axis", step))
        return labels

    def _joined(self, wire: Joined, operands: list[Axes]) -> Array:
        parts = [
            self.labels.fresh(part)
            if isinstance(part, int)
            else operands[part[0]][part[1]][part[2]]
            for part in wire.parts
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _related(self, step: Step, wires: Wiring, operands: list[Axes]) -> None:
        news: dict[Ref, Array] = {}

        def labels(ref: Ref) -> Array:
            if ref.kind == "in":
                return operands[ref.place][ref.axis]
            if ref.kind == "out":
                return self.at[step.eqn.outvars[ref.place]][ref.axis]
            return news.setdefault(ref, self.labels.fresh(ref.axis))

        for one, two in wires.equal:
            self.labels.unify(labels(one), labels(two))
        for flat, factors in wires.products:
            self.labels.product(labels(flat), [labels(f) for f in factors])

    # --- calls, loops, conditions ----------------------------------------------------

    def _call(self, step: Step) -> None:
        if step.name in CALLS:
            self._inner(step.bodies[0], [self._of(atom) for atom in step.eqn.invars])
            results = step.bodies[0].outvars
            self._deliver(step, [self._of(atom) for atom in results])
        elif step.name == "cond":
            self._branches(step)
        elif step.name == "scan":
            self._scan(step)
        else:
            self._loop(step)

    def _inner(self, body: Body, given: Sequence[Axes]) -> None:
        self.at |= dict(zip(body.invars, given, strict=True))
        self._run(body)

    def _deliver(self, step: Step, results: Sequence[Axes]) -> None:
        for var, axes in zip(step.eqn.outvars, results, strict=True):
            fits = len(axes) == len(var.aval.shape)
            self.at[var] = axes if fits else self._fresh(var)

    def _unify(self, one: Axes, two: Axes) -> None:
        for a, b in zip(one, two, strict=True):
            self.labels.unify(a, b)

    def _branches(self, step: Step) -> None:
        given = [self._of(atom) for atom in step.eqn.invars[1:]]
        for body in step.bodies:
            self._inner(body, given)
        first, *rest = ([self._of(a) for a in body.outvars] for body in step.bodies)
        for other in rest:
            for one, two in zip(first, other, strict=True):
                self._unify(one, two)
        self._deliver(step, first)

    def _scan(self, step: Step) -> None:
        """Constants and carries pass; the axis that is scanned is pinned."""
        parts, (body,) = scan_parts(step), step.bodies
        reason = Reason("scan runs along this axis", step)
        given = [self._of(atom) for atom in step.eqn.invars]
        for axes in given[parts.carried.stop :]:
            self._pin(axes[:1], reason)
        self._inner(
            body,
            [
                *given[: parts.carried.stop],
                *(a[1:] for a in given[parts.carried.stop :]),
            ],
        )
        results = [self._of(atom) for atom in body.outvars]
        carries = given[parts.carried]
        for one, two in zip(carries, results, strict=False):
            self._unify(one, two)
        pin = (np.zeros(parts.length, np.int64),)
        stacked = [(*pin, *axes) for axes in results[len(carries) :]]
        self._deliver(step, [*carries, *stacked])

    def _loop(self, step: Step) -> None:
        test, body = step.bodies
        counts = (step.eqn.params["cond_nconsts"], step.eqn.params["body_nconsts"])
        given = [self._of(atom) for atom in step.eqn.invars]
        tests, bodies = given[: counts[0]], given[counts[0] : sum(counts)]
        carries = given[sum(counts) :]
        self._inner(test, [*tests, *carries])
        self._inner(body, [*bodies, *carries])
        for one, atom in zip(carries, body.outvars, strict=True):
            self._unify(one, self._of(atom))
        self._deliver(step, carries)


def _is_of(wire: Any, operand: int | None) -> bool:
    """Whether a wire comes from one operand alone."""
    sources = wire.sources if isinstance(wire, Same) else ()
    return operand is not None and {i for i, _ in sources} == {operand}


class ScanParts(NamedTuple):
    """Which operands of a scan are carried, and its length."""

    carried: slice
    length: int


def scan_parts(step: Step) -> ScanParts:
    """The parts of a scan, from shapes: its parameters have other names by version."""
    eqn, (body,) = step.eqn, step.bodies
    rank = lambda atom: len(atom.aval.shape)
    stacked = lambda outer, inner: rank(outer) > rank(inner)
    ys = sum(map(stacked, eqn.outvars, body.outvars))
    xs = sum(map(stacked, eqn.invars, body.invars))
    stop = len(eqn.invars) - xs
    return ScanParts(slice(stop - len(eqn.outvars) + ys, stop), eqn.params["length"])
