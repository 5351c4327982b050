"""Every axis of every value of a program: which indices are cut together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dagjax.compaction.channels.labels import Array, Classes, Labels
from dagjax.compaction.channels.wires import NEW, Joined, New, Pinned, Ref, Same, Wiring
from dagjax.compaction.channels.wiring import wiring
from dagjax.jaxprs.constants import Constants
from dagjax.jaxprs.interpret import Abstract
from dagjax.jaxprs.program import Equation, Program, is_literal
from dagjax.jaxprs.pullback import Pullback, Pullbacks, has_rule
from dagjax.jaxprs.versions import Atom, Var

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
        step: The equation that pins it, None for arguments and results.
        unknown: Whether its primitive has no rule.
    """

    text: str
    step: Equation | None = None
    unknown: bool = False


class Channels(Abstract[Axes]):
    """The labels of a program's values, and their classes.

    Args:
        body: The program.
        free: How many of its arguments may be cut; the others hold data.
        outputs: Names of its outputs, which are to stay whole; None: they may be cut.
        coupled: Whether the features of a kernel go only with the channels that they
            make or read. If not, such contractions are in `untied`, with the operand
            that is the kernel.

    `at[value]` holds the labels of its axes, `wires[equation]` its wiring,
    `pullbacks[call]` its derivative rule. Branches and the passes of a loop are joined
    by unifying their labels.
    """

    def __init__(
        self,
        body: Program,
        free: int,
        outputs: Sequence[str] | None,
        coupled: bool = True,
    ):
        super().__init__()
        self.body, self.free, self.labels = body, free, Labels()
        self.coupled, self.untied = coupled, {}
        self._of_parameters = {*body.invars[:free]}
        self._constant = {*body.consts}
        self.at = self.of
        self.wires: dict[Equation, Wiring] = {}
        self.pullbacks: dict[Equation, Pullback | None] = {}
        self._rules = Pullbacks()
        self._values = Constants()
        inputs = [self._fresh(var) for var in body.invars]
        for axes in inputs[free:]:
            self._pin(axes, Reason("an input"))
        results = self.run(body, inputs)
        for name, axes in zip(outputs or (), results, strict=False):
            self._pin(axes, Reason(f"the output {name!r}" if name else "an output"))

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

    def classes_at(self, var: Atom) -> tuple[Array, ...]:
        """The classes of the indices of a value's axes."""
        of = self.classes.of
        return tuple(of[labels] for labels in self.at[var])

    def kept(self, removed: Array) -> Callable[[Atom], tuple[Array | None, ...]]:
        """Of removed classes: `value -> kept indices of each axis`, None for all.

        Args:
            removed: `[classes]`, closed under products.
        """
        of = self.classes.of

        @functools.cache
        def places(var: Atom) -> tuple[Array | None, ...]:
            gone = (removed[of[labels]] for labels in self.at[var])
            return tuple(np.flatnonzero(~g) if g.any() else None for g in gone)

        return places

    @functools.cached_property
    def _outermost(self) -> set[Equation]:
        return {*self.body.equations}

    def is_outermost(self, equation: Equation) -> bool:
        """Whether an equation is in no call or loop."""
        return equation in self._outermost

    def is_pinned(self, labels: Array) -> bool:
        """Whether none of these can be removed."""
        return bool((self.classes.of[labels] == self.classes.pinned).all())

    def stays(self, var: Any, removed: Array) -> Array:
        """Which entries of a value lie in no removed class.

        Args:
            var: The value.
            removed: `[classes]`.
        """
        mask = np.ones(var.aval.shape, bool)
        for axis, of in enumerate(self.classes_at(var)):
            shape = [-1 if d == axis else 1 for d in range(mask.ndim)]
            mask &= ~removed[of].reshape(shape)
        return mask

    def removed(self, keeps: Mapping[Var, tuple[Array | None, ...]]) -> Array:
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
        closed = classes.close(classes.causes(gone, seen))
        if (closed[seen] != gone[seen]).any():
            raise CompactionError(
                "the program has other channels at these shapes than where it was cut; "
                "compact the network again with inputs of these shapes"
            )
        return closed

    # --- what the driver asks --------------------------------------------------------

    def literal(self, atom: Atom) -> Axes:
        """A number has no axes."""
        return ()

    def constant(self, var: Var, array: Array) -> Axes:
        """Labels of its own."""
        self._values.hold(var, array)
        return self._fresh(var)

    def visit(self, equation: Equation, env: dict[Var, Axes]) -> Sequence[Axes]:
        """The labels of results, with what is made of parameters alone noted."""
        reads = equation.reads
        if reads and self._of_parameters.issuperset(reads):
            self._of_parameters.update(equation.eqn.outvars)
        if self._constant.issuperset(reads):
            self._constant.update(equation.eqn.outvars)
        self._values.note(equation)
        results = super().visit(equation, env)
        fits = lambda axes, var: len(axes) == len(var.aval.shape)
        return [
            axes if fits(axes, var) else self._fresh(var)
            for axes, var in zip(results, equation.eqn.outvars, strict=True)
        ]

    def equation(self, equation: Equation, values: list[Axes]) -> list[Axes]:
        """Labels go where the wiring of the primitive says."""
        wires = self.wires[equation] = wiring(equation.eqn, self._values.of)
        kernel = self._kernel(equation, wires)
        results = [
            tuple(
                self._wired(equation, NEW if _is_of(wire, kernel) else wire, values, n)
                for wire, n in zip(axes, var.aval.shape, strict=True)
            )
            for var, axes in zip(equation.eqn.outvars, wires.outputs, strict=True)
        ]
        reason = _mixing(equation, wires)
        for operand, axis in wires.pinned:
            self.labels.pin(values[operand][axis], reason)
        for (i, a), (j, b) in wires.contracted if kernel is None else ():
            self.labels.unify(values[i][a], values[j][b])
        self._related(wires, values, results)
        return results

    def call(self, equation: Equation, values: list[Axes]) -> Sequence[Axes]:
        """The labels of its body; its derivative rule ties them too."""
        results = super().call(equation, values)
        if not has_rule(equation):
            return results
        rule = self.pullbacks[equation] = self._rules.of(equation, self._constant)
        if rule is None:
            for axes in (*values, *results):
                self._pin(axes, Reason("its derivative cannot be traced", equation))
            return results
        pulled = self.run(rule.program, [*values, *(results[i] for i in rule.results)])
        for i, axes in zip(rule.operands, pulled, strict=True):
            self.join(values[i], axes)
        return results

    def walk(self, equations: Sequence[Equation]) -> Iterator[Equation]:
        """Equations with those of all programs inside, derivative rules among them."""
        for equation in equations:
            yield equation
            rule = self.pullbacks.get(equation)
            for body in (*equation.bodies, *((rule.program,) if rule else ())):
                yield from self.walk(body.equations)

    def join(self, one: Axes, two: Axes) -> Axes:
        """One label for both, index by index."""
        for a, b in zip(one, two, strict=True):
            self.labels.unify(a, b)
        return one

    def equal(self, one: Axes, two: Axes) -> bool:
        """Unified labels are one: a pass is enough."""
        return True

    def unstack(self, equation: Equation, value: Axes) -> Axes:
        """The axis that is scanned cannot be cut."""
        self._pin(value[:1], Reason("scan runs along this axis", equation))
        return value[1:]

    def stack(self, equation: Equation, value: Axes) -> Axes:
        """The axis along which passes are stacked cannot be cut."""
        return (np.zeros(equation.eqn.params["length"], np.int64), *value)

    # --- one equation ----------------------------------------------------------------

    def _fresh(self, var: Atom) -> Axes:
        return tuple(self.labels.fresh(n) for n in var.aval.shape)

    def _pin(self, axes: Sequence[Array], reason: Reason) -> None:
        for labels in axes:
            self.labels.pin(labels, reason)

    def _kernel(self, equation: Equation, wires: Wiring) -> int | None:
        """The operand that is made of parameters alone, if it is to be untied."""
        if self.coupled or not wires.contracted or not self.is_outermost(equation):
            return None
        own = [
            i for i, v in enumerate(equation.eqn.invars)
            if not is_literal(v) and v in self._of_parameters
        ]  # fmt: skip
        if len(own) == 1:
            self.untied[equation] = own[0]
        return own[0] if len(own) == 1 else None

    def _wired(
        self, equation: Equation, wire: Any, operands: list[Axes], size: int
    ) -> Array:
        if size == 1 and isinstance(wire, Joined):  # what one entry is taken of stays
            taken = Reason("one index of this axis is taken alone", equation)
            self.labels.pin(self._joined(wire, operands), taken)
        spatial = isinstance(wire, Pinned) and equation.name in _SPATIAL
        if size == 1 or spatial:
            return np.zeros(size, np.int64)
        if isinstance(wire, Pinned):
            return self._pinned(equation, size)
        if isinstance(wire, New) or (isinstance(wire, Same) and not wire.sources):
            return self.labels.fresh(size)
        if isinstance(wire, Joined):
            return self._joined(wire, operands)
        first, *rest = (operands[i][a] for i, a in wire.sources)
        for other in rest:
            self.labels.unify(first, other)
        return first

    def _pinned(self, equation: Equation, size: int) -> Array:
        """Labels of a new axis that cannot be cut, so that messages find its maker."""
        labels = self.labels.fresh(size)
        self.labels.pin(labels, Reason(f"{equation.name} makes this axis", equation))
        return labels

    def _joined(self, wire: Joined, operands: list[Axes]) -> Array:
        parts = [
            self.labels.fresh(part)
            if isinstance(part, int)
            else operands[part[0]][part[1]][part[2]]
            for part in wire.parts
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _related(
        self, wires: Wiring, operands: list[Axes], results: list[Axes]
    ) -> None:
        news: dict[Ref, Array] = {}

        def labels(ref: Ref) -> Array:
            if ref.kind == "in":
                return operands[ref.place][ref.axis]
            if ref.kind == "out":
                return results[ref.place][ref.axis]
            return news.setdefault(ref, self.labels.fresh(ref.axis))

        for one, two in wires.equal:
            self.labels.unify(labels(one), labels(two))
        for flat, factors in wires.products:
            self.labels.product(labels(flat), [labels(f) for f in factors])


def _mixing(equation: Equation, wires: Wiring) -> Reason:
    if wires.known:
        return Reason(f"{equation.name} mixes this axis", equation)
    return Reason(f"{equation.name} has no rule", equation, unknown=True)


def _is_of(wire: Any, operand: int | None) -> bool:
    """Whether a wire comes from one operand alone."""
    sources = wire.sources if isinstance(wire, Same) else ()
    return operand is not None and {i for i, _ in sources} == {operand}
