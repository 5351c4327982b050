"""Facts of all values of a program, from those of its arguments.

Only what is listed keeps a fact: a zero passes where the table of primitives claims
`zero`, a number where it claims `keeps_constant` or where the primitive is evaluated at
it; what does not depend on the data stays fixed where the wiring is known. All else is
UNKNOWN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.coupling import Channels
from dagjax.compaction.channels.indexing import CLIPPED
from dagjax.compaction.channels.wires import Joined, New, Same
from dagjax.compaction.removal.facts import (
    ITSELF,
    MASKED,
    UNKNOWN,
    UNTRAINED,
    ZERO,
    Array,
    Entry,
    Expression,
    Fact,
    Table,
    equal,
    fact_of,
    kinds_of,
    literal_fact,
)
from dagjax.jaxprs.interpret import Abstract, bind
from dagjax.jaxprs.primitives import primitive_of
from dagjax.jaxprs.program import Equation
from dagjax.jaxprs.pullback import Pullback
from dagjax.jaxprs.versions import Atom, Var, evaluating
from dagjax.types import PyTree

REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min")
_COMPARISONS = ("eq", "ne", "ge", "le", "gt", "lt", "is_finite")
_PADDED = 16  # numbers are evaluated in vectors of few lengths: each is compiled
_LARGEST = 1 << 16  # entries of a range that are looked at


class Facts(Abstract[Fact]):
    """The facts of all values of a program.

    Args:
        channels: The program with its wiring.
        given: The facts of its arguments.
        table: Where they are entered.
    """

    def __init__(self, channels: Channels, given: Sequence[Fact], table: Table):
        super().__init__()
        self.table, self.channels = table, channels
        rows = zip(given, channels.body.invars, strict=True)
        self.run(channels.body, [self._settled(f, v.aval.shape) for f, v in rows])

    def at(self, atom: Atom) -> Fact:
        """The facts of a value or a literal."""
        return self.read(self.of, atom)

    def along(self, atom: Atom, axis: int) -> Array:
        """The facts of the slices along an axis."""
        facts = self.at(atom).axes[axis]
        return np.zeros(atom.aval.shape[axis], int) if facts is None else facts

    @functools.cached_property
    def constants(self) -> frozenset[Var]:
        """The values that are one number each, which may be frozen."""
        is_constant = self.table.is_constant
        return frozenset(v for v, fact in self.of.items() if is_constant(fact.whole))

    # --- what the driver asks --------------------------------------------------------

    def literal(self, atom: Atom) -> Fact:
        """The number that it is."""
        return literal_fact(self.table, atom)

    def constant(self, var: Any, array: Any) -> Fact:
        """What its slices equal."""
        return self._settled(fact_of(self.table, array), var.aval.shape)

    def visit(self, equation: Equation, env: PyTree) -> Sequence[Fact]:
        """Facts of results, of axes and of the whole made to agree."""
        rows = zip(super().visit(equation, env), equation.eqn.outvars, strict=True)
        return [self._settled(fact, var.aval.shape) for fact, var in rows]

    def call(self, equation: Equation, values: list[Fact]) -> Sequence[Fact]:
        """The facts of its body, without expressions: their values are inside.

        Results that are numbers count as such only if the derivative rule agrees: it
        may give the operands a gradient where the call ignores them.
        """
        values = [*map(self._still, values)]
        results = [*map(self._still, super().call(equation, values))]
        if equation not in self.channels.pullbacks:
            return results
        rule = self.channels.pullbacks[equation]
        if rule is None or not self._agrees(rule, values, results):
            results = [*map(_unknown, results)]
        if rule is not None:
            made = (_unknown(results[i]) for i in rule.results)
            self._pulled(rule, [*values, *made])
        return results

    def _agrees(self, rule: Pullback, values: list[Fact], results: list[Fact]) -> bool:
        """Whether cotangents of numbers reach nothing that may be trained.

        The rule is linear in the cotangents: those of each result and axis are followed
        alone, zero wherever the result is no number.
        """
        for place, i in enumerate(rule.results):
            for cotangent in self._of_numbers(results[i]):
                zeros = [
                    Fact((None,) * len(results[j].axes), ZERO) for j in rule.results
                ]
                zeros[place] = cotangent
                pulled = self._pulled(rule, [*values, *zeros])
                given = (values[j] for j in rule.operands)
                if not all(map(self._stays_inside, pulled, given)):
                    return False
        return True

    def _pulled(self, rule: Pullback, facts: list[Fact]) -> list[Fact]:
        rows = zip(facts, rule.program.invars, strict=True)
        given = [self._settled(fact, v.aval.shape) for fact, v in rows]
        return self.run(rule.program, given)

    def _of_numbers(self, fact: Fact) -> Iterator[Fact]:
        """Cotangents of the slices that are numbers, axis by axis."""
        if self.table.is_number(fact.whole):
            yield _unknown(fact)
            return
        for axis, slices in enumerate(fact.axes):
            if slices is not None and self.table.is_number(slices).any():
                axes: list[Array | None] = [None] * len(fact.axes)
                axes[axis] = np.where(self.table.is_number(slices), UNKNOWN, ZERO)
                yield Fact(tuple(axes))

    def _stays_inside(self, pulled: Fact, value: Fact) -> bool:
        """Whether a cotangent is zero where the operand is data or may be trained."""
        frozen = lambda facts: self.table.is_fixed(facts) & self.table.may_freeze(facts)
        if self.table.is_zero(pulled.whole) or frozen(value.whole):
            return True
        rows = zip(pulled.axes, value.axes, strict=True)
        return any(
            bool((self.table.is_zero(p) | (v is not None and frozen(v))).all())
            for p, v in rows
            if p is not None
        )

    def entering(self, equation: Equation, value: Fact) -> Fact:
        """Numbers alone: what is fixed may be another thing in each pass."""
        return self._numbers(value)

    def cond(self, equation: Equation, values: list[Fact]) -> Sequence[Fact]:
        """The numbers that all branches agree on."""
        return [*map(self._numbers, super().cond(equation, values))]

    def join(self, one: Fact, two: Fact) -> Fact:
        """The numbers that both hold."""
        table = self.table
        both = lambda a, b: (
            None if a is None or b is None else table.numbers(table.met(a, b))
        )
        whole = int(table.numbers(table.mixed([one.whole, two.whole])))
        return Fact(tuple(map(both, one.axes, two.axes)), whole)

    def equal(self, one: Fact, two: Fact) -> bool:
        """Whether they say the same."""
        return equal(one, two)

    def unstack(self, equation: Equation, value: Fact) -> Fact:
        """The facts along the other axes."""
        return Fact(value.axes[1:], value.whole)

    def stack(self, equation: Equation, value: Fact) -> Fact:
        """Numbers that all passes make."""
        return self._numbers(Fact((None, *value.axes), value.whole))

    def _still(self, fact: Fact) -> Fact:
        whole = int(self.table.still(np.array(fact.whole)))
        return Fact(tuple(map(self.table.still, fact.axes)), whole)

    def _numbers(self, fact: Fact) -> Fact:
        only = lambda a: None if a is None else self.table.numbers(a)
        return Fact(tuple(map(only, fact.axes)), int(self.table.numbers(fact.whole)))

    def _settled(self, fact: Fact, shape: tuple[int, ...]) -> Fact:
        """The whole from the axes, and the axes from the whole."""
        axes, whole, table = [*fact.axes], fact.whole, self.table
        for facts in axes:
            if whole == UNKNOWN and facts is not None and len(facts) > 1:
                whole = int(table.still(np.array(table.mixed(facts))))
        if whole == UNKNOWN:
            return Fact(tuple(axes), whole)
        for d, n in enumerate(shape):
            if (old := axes[d]) is None or n == 1:
                axes[d] = np.full(n, whole)
            else:
                less = (old == UNKNOWN) | (
                    table.is_number(whole) & ~table.is_number(old)
                )
                axes[d] = np.where(less, whole, old)
        return Fact(tuple(axes), whole)

    def equation(self, equation: Equation, values: list[Fact]) -> Sequence[Fact]:
        """The rule of a kind of primitives."""
        kind, outvars = primitive_of(equation.eqn).kind, equation.eqn.outvars
        if not self.channels.wires[equation].known:
            return [Fact((None,) * len(v.aval.shape)) for v in outvars]
        if kind == "elementwise" and len(outvars) == 1:
            return [self._elementwise(equation, values)]
        if kind == "contraction":
            return [self._contraction(equation, values)]
        if equation.name == "iota":
            return [self._range(equation)]
        if equation.name == "reshape":
            return [self._reshape(equation, values[0])]
        if equation.name == "optimization_barrier":
            return [*map(self._still, values)]
        return self._moved(equation, values)

    # --- elementwise -----------------------------------------------------------------

    def _elementwise(self, equation: Equation, facts: list[Fact]) -> Fact:
        (out,) = equation.eqn.outvars
        whole = self._combined(equation, -1, [np.array([f.whole]) for f in facts])
        axes = []
        for d, n in enumerate(out.aval.shape):
            columns = [
                self._column(atom, fact, d, n)
                for atom, fact in zip(equation.eqn.invars, facts, strict=True)
            ]
            if n == 1 or all(c is None or np.ndim(c) == 0 for c in columns):
                axes.append(None)
                continue
            full = [np.broadcast_to(0 if c is None else c, (n,)) for c in columns]
            axes.append(self._combined(equation, d, full))
        return Fact(tuple(axes), int(whole[0]))

    def _column(self, atom: Atom, fact: Fact, axis: int, size: int) -> Any:
        if len(fact.axes) > axis and atom.aval.shape[axis] == size:
            return fact.axes[axis]
        return np.array(fact.whole or ITSELF)

    def _combined(self, equation: Equation, axis: int, columns: list[Array]) -> Array:
        """The facts of slices from the facts of the operands' slices."""
        kinds, back = kinds_of(columns, len(self.table) + 1)
        facts = [self._of_kind(equation, axis, kind) for kind in kinds]
        open_ = [i for i, fact in enumerate(facts) if fact is None]
        numbers = self._evaluated(equation, [kinds[i] for i in open_])
        for i, fact in zip(open_, numbers, strict=True):
            facts[i] = fact
        return np.array(facts, int)[back]

    def _of_kind(
        self, equation: Equation, axis: int, kind: tuple[int, ...]
    ) -> int | None:
        """The fact that facts of the operands give; None: to be evaluated."""
        table, zero = self.table, primitive_of(equation.eqn).zero
        absorbing = {"any": kind, "first": kind[:1]}.get(zero or "", ())
        if any(fact >= 0 and table.is_zero(fact) for fact in absorbing):
            return self._zero(kind)
        number = [fact >= 0 and bool(table.is_number(fact)) for fact in kind]
        if equation.name == "select_n" and number[1] and len({*kind[1:]}) == 1:
            return kind[1]
        if all(number):
            return None
        origin = table.origin(kind)
        if all(fact >= 0 and table.is_fixed(fact) for fact in kind):
            return table.entry(math.nan, *origin)
        common = {ITSELF, *table.expressions}
        if axis < 0 or not all(
            n or f in common for n, f in zip(number, kind, strict=True)
        ):
            return UNKNOWN
        return table.expression(
            Expression(equation, axis, kind), Entry(math.nan, *origin)
        )

    def _zero(self, kind: Sequence[int]) -> int:
        """A product with a zero: silenced if a masked one meets no mere parameter."""
        table = self.table
        zeros = [table[fact] for fact in kind if fact >= 0 and table.is_zero(fact)]
        by_mask = any(zero.trained == MASKED or zero.silenced for zero in zeros)

        def is_cut_off(fact: int) -> bool:
            if fact < 0 or not table.is_fixed(fact):
                return True  # data
            untrained = table[fact].trained <= UNTRAINED and not table.is_zero(fact)
            return table[fact].silenced or bool(untrained)

        origin = min(zero.trained for zero in zeros)
        return table.entry(0.0, origin, by_mask and any(map(is_cut_off, kind)))

    def _evaluated(self, equation: Equation, kinds: list[tuple[int, ...]]) -> list[int]:
        """What a primitive makes of numbers."""
        if not kinds:
            return []
        count = len(kinds)
        size = _PADDED ** math.ceil(math.log(max(count, 2), _PADDED))
        operands = [
            np.resize(self.table.values(column), size).astype(atom.aval.dtype)
            for column, atom in zip(np.array(kinds).T, equation.eqn.invars, strict=True)
        ]
        with evaluating():
            (made,) = bind(equation.eqn, operands)
        made = np.asarray(made)[:count]
        real = made.dtype.kind in "biuf" or made.dtype.kind == "V"
        values = made.astype(np.float64) if real and not made.dtype.names else None
        return [
            self._number(equation, kind, math.nan if values is None else values[i])
            for i, kind in enumerate(kinds)
        ]

    def _number(self, equation: Equation, kind: tuple[int, ...], value: float) -> int:
        by_sign = equation.name == "atan2" or math.isinf(value)
        if by_sign and any(self.table.values(fact) == 0 for fact in kind):
            return UNKNOWN  # the sign of a zero matters, which the data may choose
        return self.table.entry(float(value), *self.table.origin(kind))

    # --- contractions ----------------------------------------------------------------

    def _contraction(self, equation: Equation, facts: list[Fact]) -> Fact:
        wires, atoms = self.channels.wires[equation], equation.eqn.invars
        axes: list[Array | None] = []
        for wire in wires.outputs[0]:
            if not isinstance(wire, Same):
                axes.append(None)
                continue
            slices = [self.along(atoms[i], a) for i, a in wire.sources]
            rest = [f.whole for i, f in enumerate(facts) if i not in dict(wire.sources)]
            axes.append(self._product(slices, rest))
        whole = int(self._product([], [f.whole for f in facts])[0])
        for (i, a), (j, b) in wires.contracted:
            ends = self.along(atoms[i], a), self.along(atoms[j], b)
            terms = self._product([*ends], [])
            if self.table.is_zero(terms).all() or whole == UNKNOWN:
                whole = self._summed(terms)
        if equation.name == "conv_general_dilated":
            axes = self._grouped(equation, axes)
        return Fact(tuple(axes), whole)

    def _product(self, slices: list[Array], rest: list[int]) -> Array:
        """Slices of a product: zero if an operand's is, fixed if all are."""
        size = len(slices[0]) if slices else 1
        columns = [*slices, *(np.full(size, fact) for fact in rest)]
        kinds, back = kinds_of(columns, len(self.table) + 1)
        table = self.table

        def of_kind(kind: tuple[int, ...]) -> int:
            if any(table.is_zero(fact) for fact in kind):
                return self._zero(kind)
            fixed = all(table.is_fixed(fact) for fact in kind)
            return table.entry(math.nan, *table.origin(kind)) if fixed else UNKNOWN

        return np.array([of_kind(kind) for kind in kinds], int)[back]

    def _summed(self, terms: Array) -> int:
        """The fact of a sum of slices."""
        if self.table.is_zero(terms).all():
            trained, silenced = (c[terms] for c in self.table.columns[1:3])
            return self.table.entry(0.0, int(trained.max()), bool(silenced.all()))
        live = terms[~self.table.is_zero(terms)]
        if not self.table.is_fixed(live).all():
            return UNKNOWN
        trained, silenced = (c[live] for c in self.table.columns[1:3])
        return self.table.entry(math.nan, int(trained.max()), bool(silenced.all()))

    def _grouped(self, equation: Equation, axes: list[Any]) -> list[Any]:
        """Features of a convolution in groups: zero or fixed with their group."""
        wires, p = self.channels.wires[equation], equation.eqn.params
        numbers, groups = p["dimension_numbers"], p["feature_group_count"]
        if wires.contracted or groups == 1:
            return axes
        lhs, rhs = equation.eqn.invars
        inputs = self.along(lhs, numbers.lhs_spec[1]).reshape(groups, -1)
        outputs = self.along(rhs, numbers.rhs_spec[0])
        of_group = np.array([self._summed(row) for row in inputs], int)
        each = np.repeat(of_group, len(outputs) // groups)
        feature = self._product([each, outputs], [])
        return [feature if d == numbers.out_spec[1] else a for d, a in enumerate(axes)]

    # --- everything else -------------------------------------------------------------

    def _range(self, equation: Equation) -> Fact:
        (out,) = equation.eqn.outvars
        if math.prod(out.aval.shape) > _LARGEST:
            return Fact((None,) * len(out.aval.shape), self.table.entry(math.nan))
        with evaluating():
            (array,) = bind(equation.eqn, [])
        return fact_of(self.table, array)

    def _moved(self, equation: Equation, facts: list[Fact]) -> list[Fact]:
        """Facts go where the indices go, as far as the primitive keeps them."""
        data = self._data(equation)
        whole = self._surviving(
            equation, self.table.mixed([facts[i].whole for i in data])
        )
        if whole == UNKNOWN:
            whole = self._fixed([f.whole for f in facts])
        return [
            Fact(
                tuple(
                    self._wired(equation, facts, d, wire) for d, wire in enumerate(axes)
                ),
                whole,
            )
            for axes in self.channels.wires[equation].outputs
        ]

    def _data(self, equation: Equation) -> Sequence[int]:
        """Which operands hold data and not indices."""
        return primitive_of(equation.eqn).data or range(len(equation.eqn.invars))

    def _fixed(self, facts: Sequence[int]) -> int:
        """The fact of an array made of others, whatever it is."""
        if not facts or not self.table.is_fixed(np.array(facts)).all():
            return UNKNOWN
        return self.table.entry(math.nan, *self.table.origin(facts))

    def _wired(
        self, equation: Equation, facts: list[Fact], axis: int, wire: Any
    ) -> Array | None:
        if isinstance(wire, Same):
            return self._slices(equation, facts, axis, wire)
        if isinstance(wire, Joined):
            return self._joined(equation, facts, axis, wire)
        if isinstance(wire, New) and equation.name == "broadcast_in_dim":
            size = equation.eqn.outvars[0].aval.shape[axis]
            if facts[0].whole != UNKNOWN or size == 1:
                return None
            made = Expression(equation, axis, (ITSELF,))
            return np.full(size, self.table.expression(made, Entry(math.nan)))
        return None

    def _slices(
        self, equation: Equation, facts: list[Fact], axis: int, wire: Same
    ) -> Array | None:
        sources = [facts[i].axes[a] for i, a in wire.sources]
        if not sources or any(s is None for s in sources):
            return None
        first, *rest = (self.table.still(s) for s in sources)
        for other in rest:
            first = self.table.met(first, other)
        first = self._beside_margin(equation, facts, axis, first)
        used = dict(wire.sources)
        others = [f.whole for i, f in enumerate(facts) if i not in used]
        indices = any(i not in self._data(equation) for i in used)
        kept = self._each_surviving(equation, first, others, numbers=not indices)
        if equation.name in REDUCTIONS:
            own = np.asarray(sources[0])
            for fact in np.unique(own[kept == UNKNOWN]).tolist():
                if fact in self.table.expressions:
                    made = Expression(equation, axis, (fact,))
                    entry = self.table[fact]
                    kept[own == fact] = self.table.expression(made, entry)
        return kept

    def _each_surviving(
        self, equation: Equation, facts: Array, others: list[int], numbers: bool
    ) -> Array:
        """What slices are behind a primitive that reads other operands too."""
        kinds, back = np.unique(facts, return_inverse=True)
        padding = equation.name == "pad"  # whose second operand is a margin elsewhere

        def of_kind(fact: int) -> int:
            kept = self._surviving(equation, fact) if numbers else UNKNOWN
            if fact == UNKNOWN or self.table.is_number(kept):
                return kept
            return self._fixed([fact, *([] if padding else others)])

        return np.array([of_kind(int(k)) for k in kinds], int)[back.reshape(-1)]

    def _surviving(self, equation: Equation, fact: int) -> int:
        """A number that a primitive makes again of data that equal it; else UNKNOWN."""
        table, entry = self.table, primitive_of(equation.eqn)
        if not table.is_number(fact):
            return UNKNOWN
        if equation.name == "gather":
            return UNKNOWN if self._is_filled(equation, fact) else fact
        if equation.name in ("reduce_window_max", "reduce_window_min"):
            return UNKNOWN if _sees_padding(equation) else fact
        zero = entry.zero is not None and table.values(fact) == 0
        return fact if zero or entry.keeps_constant else UNKNOWN

    def _is_filled(self, equation: Equation, fact: int) -> bool:
        """Whether indices out of range may give another number than the slice holds.

        NaN, the default, makes all that it meets NaN, with or without the slice, unless
        the program looks for it.
        """
        if equation.eqn.params["mode"].name in CLIPPED:
            return False
        fill = equation.eqn.params["fill_value"]
        if fill is None or math.isnan(float(fill)):
            return self._compares_floats
        return float(fill) != self.table.values(fact)

    @functools.cached_property
    def _compares_floats(self) -> bool:
        """Whether a comparison may turn a NaN into a number."""
        return any(
            equation.name in _COMPARISONS
            and jnp.issubdtype(equation.eqn.invars[0].aval.dtype, jnp.inexact)
            for equation in self.channels.body.walk()
        )

    def _beside_margin(
        self, equation: Equation, facts: list[Fact], axis: int, slices: Array
    ) -> Array:
        """In a slice of a padded array lie margins of the other axes too."""
        if equation.name != "pad":
            return slices
        config = equation.eqn.params["padding_config"]
        if all(c == (0, 0, 0) for d, c in enumerate(config) if d != axis):
            return slices
        return self.table.met(slices, np.full(len(slices), facts[1].whole))

    def _joined(
        self, equation: Equation, facts: list[Fact], axis: int, wire: Joined
    ) -> Array | None:
        margin = facts[-1].whole if equation.name == "pad" else UNKNOWN
        parts = []
        for part in wire.parts:
            if isinstance(part, int):
                parts.append(np.full(part, margin))
                continue
            operand, source, index = part
            whole = self.along(equation.eqn.invars[operand], source)
            slices = self.table.still(whole[index])
            parts.append(self._beside_margin(equation, facts, axis, slices))
        joined = np.concatenate(parts)
        return joined if joined.any() else None

    # --- reshape ---------------------------------------------------------------------

    def _reshape(self, equation: Equation, fact: Fact) -> Fact:
        (x, *_), (out,) = equation.eqn.invars, equation.eqn.outvars
        wires = self.channels.wires[equation]
        axes: list[Any] = [
            self.table.still(fact.axes[w.sources[0][1]])
            if isinstance(w, Same)
            else None
            for w in wires.outputs[0]
        ]
        for flat, factors in wires.products:
            if flat.kind == "in" and fact.axes[flat.axis] is not None:
                self._split(fact.axes[flat.axis], factors, out, axes)
            elif flat.kind == "out":
                axes[flat.axis] = self._merged(x, factors)
        return Fact(tuple(axes), int(self.table.still(np.array(fact.whole))))

    def _split(self, facts: Any, factors: Any, out: Any, axes: list[Any]) -> None:
        shape = [out.aval.shape[f.axis] for f in factors]
        grid = self.table.still(facts).reshape(shape)
        for place, factor in enumerate(factors):
            rows = np.moveaxis(grid, place, 0).reshape(grid.shape[place], -1)
            axes[factor.axis] = np.array([self.table.mixed(row) for row in rows], int)

    def _merged(self, x: Atom, factors: PyTree) -> Array:
        """A flat slice lies in a slice of every factor: the best fact of them holds."""
        sizes = [x.aval.shape[f.axis] for f in factors]
        best = np.zeros(sizes, int)
        for place, factor in enumerate(factors):
            facts = self.table.still(self.along(x, factor.axis))
            shape = [-1 if i == place else 1 for i in range(len(sizes))]
            rows = np.broadcast_to(facts.reshape(shape), sizes)
            better = self._rank(rows) > self._rank(best)
            best = np.where(better, rows, best)
        return best.ravel()

    def _rank(self, facts: Array) -> Array:
        table = self.table
        return 1 * table.is_fixed(facts) + 2 * table.is_number(facts)


def _unknown(fact: Fact) -> Fact:
    return Fact((None,) * len(fact.axes))


def _sees_padding(equation: Equation) -> bool:
    """Whether a window may lie in the padding alone, or between the entries."""
    p = equation.eqn.params
    rows = zip(p["padding"], p["window_dimensions"], p["window_dilation"], strict=True)
    beyond = [
        max(low, high) > (0 if gap > 1 else n - 1) for (low, high), n, gap in rows
    ]
    return any(beyond) or any(gap > 1 for gap in p["base_dilation"])
