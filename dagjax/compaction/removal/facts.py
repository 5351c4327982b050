"""What is known of the slices of a program's values: zero, a constant, fixed, alike.

A fact about a slice `x[..., i, ...]` is a number. UNKNOWN: it depends on the data.
FIXED: it does not. All others are entries of a table: a constant that the whole slice
equals, or an expression, which is the same array for every slice that has this number
(behind a normalization the removed channels all hold minus the mean).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.coupling import Channels, scan_parts
from dagjax.compaction.channels.wiring import Joined, New, Same
from dagjax.jaxprs.primitives import ELEMENTWISE
from dagjax.jaxprs.program import CALLS, Body, Step, is_literal
from dagjax.jaxprs.versions import evaluating

Array = np.ndarray
UNKNOWN, FIXED, ZERO = 0, 1, 2
_ITSELF = -1  # an operand that has no such axis is its own slice
_PADDED = 16  # constants are evaluated in vectors of few lengths: each is compiled
_ABSORBING = frozenset(("mul", "and"))
_PASSING = frozenset("copy copy_p device_put name sharding_constraint".split())


class Fact(NamedTuple):
    """Of one value: for each axis the facts of its slices (None: all unknown).

    `whole` is the fact of the whole array.
    """

    axes: tuple[Array | None, ...]
    whole: int = UNKNOWN


class Expression(NamedTuple):
    """How the common slice of an axis is made: by a step, of facts of its operands."""

    step: Step
    axis: int
    operands: tuple[int, ...]


class Table:
    """The numbered facts."""

    def __init__(self) -> None:
        self.values = [math.nan, math.nan, 0.0]
        self.expressions: dict[int, Expression] = {}
        self._numbers: dict[Any, int] = {0.0: ZERO}

    def constant(self, value: float) -> int:
        """The fact that a slice equals a number everywhere."""
        if math.isnan(value):
            return FIXED
        return self._number(float(value), value)

    def constants(self, values: Array | None) -> Array | None:
        """The facts of slices that equal numbers: NaN is FIXED, infinity UNKNOWN."""
        if values is None:
            return None
        found = np.where(np.isnan(values), FIXED, UNKNOWN)
        plain = np.isfinite(values)
        kinds, back = np.unique(values[plain], return_inverse=True)
        found[plain] = np.array([self.constant(v) for v in kinds.tolist()], int)[back]
        return found

    def expression(self, step: Step, axis: int, operands: Sequence[int]) -> int:
        """The fact that a slice is what a step makes of facts."""
        made = Expression(step, axis, tuple(operands))
        number = self._number(made, math.nan)
        self.expressions[number] = made
        return number

    def _number(self, key: Any, value: float) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.values)
            self.values.append(value)
        return self._numbers[key]

    def is_number(self, fact: int) -> bool:
        """Whether one fact is a constant."""
        return not math.isnan(self.values[fact])

    def is_constant(self, facts: Array) -> Array:
        """Whether facts are constants."""
        return ~np.isnan(np.asarray(self.values)[facts])

    def is_fixed(self, facts: Array) -> Array:
        """Whether facts say that a slice does not depend on the data."""
        return (facts == FIXED) | self.is_constant(facts)

    def still(self, facts: Any) -> Any:
        """Facts without expressions: those belong to the value that they are of."""
        if facts is None or not self.expressions:
            return facts
        return np.where(self.is_fixed(facts), facts, UNKNOWN)


class Known:
    """The facts of all values of a program.

    Args:
        channels: The program with its wiring.
        given: The facts of its arguments.
        consts: The facts of the arrays that it holds.
    """

    def __init__(
        self,
        channels: Channels,
        given: Sequence[Fact],
        consts: Callable[[Table, Any], Fact],
        table: Table,
    ):
        self.table, self.channels = table, channels
        self._of_array = consts
        self.of: dict[Any, Fact] = {}
        self._run(channels.body, given)

    def at(self, atom: Any) -> Fact:
        """The facts of a value or a literal."""
        if not is_literal(atom):
            return self.of[atom]
        number = isinstance(atom.val, (bool, int, float)) or np.ndim(atom.val) == 0
        value = np.asarray(atom.val)
        real = (number and value.dtype.kind in "biuf") or value.dtype == jnp.bfloat16
        return Fact((), self.table.constant(float(value)) if real else FIXED)

    def along(self, atom: Any, axis: int) -> Array:
        """The facts of the slices along an axis."""
        facts = self.at(atom).axes[axis]
        return np.zeros(atom.aval.shape[axis], int) if facts is None else facts

    # --- walking ---------------------------------------------------------------------

    def _run(self, body: Body, given: Sequence[Fact]) -> None:
        self.of |= dict(zip(body.invars, given, strict=True))
        for var, array in body.consts.items():
            self.of[var] = self._of_array(self.table, array)
        for step in body.steps:
            made = self._inner(step) if step.bodies else self._step(step)
            for var, fact in zip(step.eqn.outvars, made, strict=True):
                self.of[var] = self._settled(fact, var.aval.shape)

    def _settled(self, fact: Fact, shape: tuple[int, ...]) -> Fact:
        """The whole from the axes, and the axes from the whole."""
        axes, whole = [*fact.axes], fact.whole
        for facts in axes:
            if whole == UNKNOWN and facts is not None and len(facts) > 1:
                if self.table.is_fixed(facts).all():
                    whole = int(facts[0]) if (facts == facts[0]).all() else FIXED
        if whole != UNKNOWN:
            for d, n in enumerate(shape):
                old = axes[d]
                new = np.full(n, whole)
                axes[d] = new if old is None else np.where(old == UNKNOWN, whole, old)
        return Fact(tuple(axes), whole)

    def _step(self, step: Step) -> list[Fact]:
        name = step.name
        if not self.channels.wires[step].known:
            return [Fact((None,) * len(v.aval.shape)) for v in step.eqn.outvars]
        if name in ELEMENTWISE and len(step.eqn.outvars) == 1:
            return [self._elementwise(step)]
        if name in ("dot_general", "conv_general_dilated"):
            return [self._contraction(step)]
        if name == "reshape":
            return [self._reshape(step)]
        return self._moved(step)

    # --- elementwise -----------------------------------------------------------------

    def _elementwise(self, step: Step) -> Fact:
        (out,) = step.eqn.outvars
        facts = [self.at(atom) for atom in step.eqn.invars]
        whole = self._combined(step, -1, [np.array([f.whole]) for f in facts])
        axes = []
        for d, n in enumerate(out.aval.shape):
            columns = [
                self._column(atom, fact, d, n)
                for atom, fact in zip(step.eqn.invars, facts, strict=True)
            ]
            if n == 1 or all(c is None or np.ndim(c) == 0 for c in columns):
                axes.append(None)
                continue
            full = [np.broadcast_to(0 if c is None else c, (n,)) for c in columns]
            axes.append(self._combined(step, d, full))
        return Fact(tuple(axes), int(whole[0]))

    def _column(self, atom: Any, fact: Fact, axis: int, size: int) -> Any:
        if len(fact.axes) > axis and atom.aval.shape[axis] == size:
            return fact.axes[axis]
        return np.array(fact.whole or _ITSELF)

    def _combined(self, step: Step, axis: int, columns: list[Array]) -> Array:
        """The facts of slices from the facts of the operands' slices."""
        kinds, back = _kinds(columns, len(self.table.values) + 1)
        found = [self._of_kind(step, axis, kind) for kind in kinds]
        open_ = [i for i, fact in enumerate(found) if fact is None]
        made = self._evaluated(step, [kinds[i] for i in open_])
        for i, fact in zip(open_, made, strict=True):
            found[i] = fact
        return np.array(found, int)[back]

    def _of_kind(self, step: Step, axis: int, kind: tuple[int, ...]) -> int | None:
        """The fact that facts of the operands give; None: to be evaluated."""
        table, name = self.table, step.name
        if (name in _ABSORBING and ZERO in kind) or (name == "div" and kind[0] == ZERO):
            return ZERO
        number = [fact >= 0 and table.is_number(fact) for fact in kind]
        if name == "select_n" and number[1] and len({*kind[1:]}) == 1:
            return kind[1]
        if all(number):
            return None
        if all(n or fact == FIXED for n, fact in zip(number, kind, strict=True)):
            return FIXED
        if axis < 0 or UNKNOWN in kind or FIXED in kind:
            return UNKNOWN
        return table.expression(step, axis, kind)

    def _evaluated(self, step: Step, kinds: list[tuple[int, ...]]) -> list[int]:
        """What a primitive makes of constants."""
        if step.name in _PASSING or not kinds:
            return [kind[0] for kind in kinds]
        count, values = len(kinds), np.asarray(self.table.values)
        size = _PADDED ** math.ceil(math.log(max(count, 2), _PADDED))
        operands = [
            np.resize(values[column], size).astype(atom.aval.dtype)
            for column, atom in zip(np.array(kinds).T, step.eqn.invars, strict=True)
        ]
        with evaluating():
            made = step.eqn.primitive.bind(*operands, **step.eqn.params)
        made = np.asarray(made)[:count]
        if made.dtype.kind not in "biufV" or made.dtype.names:
            return [FIXED] * count
        found = [self.table.constant(v) for v in made.astype(np.float64).tolist()]
        rows = zip(kinds, found, made, strict=True)
        return [UNKNOWN if _by_sign(step, k, y) else fact for k, fact, y in rows]

    # --- contractions ----------------------------------------------------------------

    def _contraction(self, step: Step) -> Fact:
        wires, (left, right) = self.channels.wires[step], step.eqn.invars[:2]
        facts, table = (self.at(left), self.at(right)), self.table
        axes = []
        for wire in wires.outputs[0]:
            if not isinstance(wire, Same):
                axes.append(None)
                continue
            slices = [self.along(step.eqn.invars[i], a) for i, a in wire.sources]
            zero = np.any([s == ZERO for s in slices], axis=0)
            others = [
                f.whole for i, f in enumerate(facts) if i not in dict(wire.sources)
            ]
            fixed = np.all([table.is_fixed(s) for s in slices], axis=0)
            fixed = fixed & all(o != UNKNOWN for o in others)
            axes.append(np.where(zero, ZERO, np.where(fixed, FIXED, UNKNOWN)))
        whole = FIXED if all(f.whole != UNKNOWN for f in facts) else UNKNOWN
        for (i, a), (j, b) in wires.contracted:
            one = self.along(step.eqn.invars[i], a)
            two = self.along(step.eqn.invars[j], b)
            dead = (one == ZERO) | (two == ZERO)
            if dead.all():
                whole = ZERO
            elif (dead | (table.is_fixed(one) & table.is_fixed(two))).all():
                whole = max(whole, FIXED)
        if ZERO in (facts[0].whole, facts[1].whole):
            whole = ZERO
        if step.name == "conv_general_dilated":
            axes = self._grouped(step, axes)
        return Fact(tuple(axes), whole)

    def _grouped(self, step: Step, axes: list[Any]) -> list[Any]:
        """Features of a convolution in groups: zero or fixed with their group."""
        wires, numbers = self.channels.wires[step], step.eqn.params["dimension_numbers"]
        groups = step.eqn.params["feature_group_count"]
        if wires.contracted or groups == 1:
            return axes
        lhs = self.along(step.eqn.invars[0], numbers.lhs_spec[1]).reshape(groups, -1)
        out = self.along(step.eqn.invars[1], numbers.rhs_spec[0]).reshape(groups, -1)
        held = np.asarray(self.table.is_fixed(lhs).all(1))[:, None]
        fixed = held & self.table.is_fixed(out)
        silent = np.asarray((lhs == ZERO).all(1))[:, None]
        zero = silent | (out == ZERO)
        feature = np.where(zero, ZERO, np.where(fixed, FIXED, UNKNOWN)).ravel()
        return [feature if d == numbers.out_spec[1] else a for d, a in enumerate(axes)]

    # --- everything else -------------------------------------------------------------

    def _moved(self, step: Step) -> list[Fact]:
        """Facts go where the indices go, as far as the primitive keeps them."""
        facts = [self.at(atom) for atom in step.eqn.invars]
        wholes = {f.whole for f in facts}
        whole = FIXED if UNKNOWN not in wholes else UNKNOWN
        if len(wholes) == 1 and step.eqn.invars:
            (only,) = wholes
            whole = self._surviving(step, only)
        return [
            Fact(
                tuple(self._wired(step, facts, d, w) for d, w in enumerate(axes)), whole
            )
            for axes in self.channels.wires[step].outputs
        ]

    def _wired(self, step: Step, facts: list[Fact], axis: int, wire: Any) -> Any:
        if isinstance(wire, Same):
            return self._slices(step, facts, axis, wire)
        if isinstance(wire, Joined):
            return self._joined(step, facts, wire)
        if isinstance(wire, New) and step.name == "broadcast_in_dim":
            size = step.eqn.outvars[0].aval.shape[axis]
            if facts[0].whole != UNKNOWN or size == 1:
                return None
            return np.full(size, self.table.expression(step, axis, (_ITSELF,)))
        return None

    def _slices(self, step: Step, facts: list[Fact], axis: int, wire: Same) -> Any:
        sources = [facts[i].axes[a] for i, a in wire.sources]
        if any(s is None for s in sources):
            return None
        first, *rest = (self.table.still(s) for s in sources)
        for other in rest:
            first = np.where(first == other, first, UNKNOWN)
        used = dict(wire.sources)
        if any(f.whole == UNKNOWN for i, f in enumerate(facts) if i not in used):
            first = np.where(first == FIXED, UNKNOWN, first)  # where the data chooses
        if step.name in ("pad", "concatenate"):
            return self._beside(step, facts, axis, first)
        kept = np.array([self._surviving(step, fact) for fact in first.tolist()])
        if step.name in ("reduce_sum", "reduce_max", "reduce_min"):
            own = np.asarray(sources[0])
            for fact in np.unique(own[kept == UNKNOWN]).tolist():
                if fact in self.table.expressions:
                    made = self.table.expression(step, axis, (fact,))
                    kept[own == fact] = made
        return kept

    def _surviving(self, step: Step, fact: int) -> int:
        """What is left of a fact in a primitive that mixes the entries of a slice."""
        if fact in (UNKNOWN, FIXED):
            return fact
        if step.name == "gather" and self._is_filled(step, fact):
            return UNKNOWN
        if step.name == "top_k":  # whose second output are places, by the sign of zeros
            return UNKNOWN
        if step.name == "cumlogsumexp":
            return FIXED
        if fact == ZERO and not _sees_padding(step):
            return fact
        summing = "sum" in step.name or "prod" in step.name or "exp" in step.name
        exact = not (summing or step.name.startswith("arg") or _sees_padding(step))
        return fact if exact and step.name not in ("pad", "iota") else FIXED

    def _is_filled(self, step: Step, fact: int) -> bool:
        """Whether indices out of range give another number than the slice holds.

        NaN, the default, makes all that it meets NaN, with or without the slice.
        """
        fill = step.eqn.params["fill_value"]
        value = math.nan if fill is None else float(fill)
        return not math.isnan(value) and value != self.table.values[fact]

    def _beside(self, step: Step, facts: list[Fact], axis: int, own: Array) -> Array:
        """Along another axis than that of a pad, the margin must be alike."""
        if step.name == "concatenate":
            return own
        config = step.eqn.params["padding_config"]
        alone = all(c == (0, 0, 0) for d, c in enumerate(config) if d != axis)
        margin = facts[1].whole
        if alone:
            return own
        fixed = self.table.is_fixed(own) & (margin != UNKNOWN)
        return np.where(own == margin, own, np.where(fixed, FIXED, UNKNOWN))

    def _joined(self, step: Step, facts: list[Fact], wire: Joined) -> Any:
        margin = facts[-1].whole if step.name == "pad" else UNKNOWN
        parts = []
        for part in wire.parts:
            if isinstance(part, int):
                parts.append(np.full(part, margin))
                continue
            operand, axis, index = part
            whole = self.along(step.eqn.invars[operand], axis)
            parts.append(self.table.still(whole[index]))
        found = np.concatenate(parts)
        return found if found.any() else None

    def _reshape(self, step: Step) -> Fact:
        (x,), (out,) = step.eqn.invars[:1], step.eqn.outvars
        fact, wires = self.at(x), self.channels.wires[step]
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
        return Fact(tuple(axes), fact.whole)

    def _split(self, facts: Any, factors: Any, out: Any, axes: list[Any]) -> None:
        grid = self.table.still(facts).reshape(
            [out.aval.shape[f.axis] for f in factors]
        )
        for place, factor in enumerate(factors):
            rows = np.moveaxis(grid, place, 0).reshape(grid.shape[place], -1)
            same = (rows == rows[:, :1]).all(1)
            fixed = self.table.is_fixed(rows).all(1)
            axes[factor.axis] = np.where(
                same, rows[:, 0], np.where(fixed, FIXED, UNKNOWN)
            )

    def _merged(self, x: Any, factors: Any) -> Array:
        """A flat slice lies in a slice of every factor."""
        sizes = [x.aval.shape[f.axis] for f in factors]
        found = np.zeros(sizes, int)
        for place, factor in enumerate(factors):
            facts = self.table.still(self.along(x, factor.axis))
            shape = [-1 if i == place else 1 for i in range(len(sizes))]
            rows = np.broadcast_to(facts.reshape(shape), sizes)
            found = np.where(
                (found == UNKNOWN) | (found == FIXED), np.maximum(found, rows), found
            )
        return found.ravel()

    # --- calls and loops -------------------------------------------------------------

    def _inner(self, step: Step) -> list[Fact]:
        given = [self._outside(self.at(atom)) for atom in step.eqn.invars]
        if step.name in CALLS:
            self._run(step.bodies[0], given)
            return [self._outside(self.at(a)) for a in step.bodies[0].outvars]
        given = [self._certain(fact) for fact in given]
        if step.name == "cond":
            return self._branches(step, given[1:])
        return self._loop(step, given)

    def _outside(self, fact: Fact) -> Fact:
        return Fact(tuple(self.table.still(a) for a in fact.axes), fact.whole)

    def _certain(self, fact: Fact) -> Fact:
        """Constants alone: what is fixed may be another thing in each pass."""
        sure = lambda a: None if a is None else np.where(a == FIXED, UNKNOWN, a)
        whole = UNKNOWN if fact.whole == FIXED else fact.whole
        return Fact(tuple(map(sure, fact.axes)), whole)

    def _met(self, one: Fact, two: Fact) -> Fact:
        both = lambda a, b: (
            None if a is None or b is None else np.where(a == b, a, UNKNOWN)
        )
        axes = tuple(map(both, one.axes, two.axes))
        return self._certain(
            Fact(axes, one.whole if one.whole == two.whole else UNKNOWN)
        )

    def _branches(self, step: Step, given: list[Fact]) -> list[Fact]:
        found: list[list[Fact]] = []
        for body in step.bodies:
            self._run(body, given)
            found.append([self._outside(self.at(a)) for a in body.outvars])
        first, *rest = found
        for other in rest:
            first = [self._met(a, b) for a, b in zip(first, other, strict=True)]
        return [self._certain(f) for f in first]

    def _loop(self, step: Step, given: list[Fact]) -> list[Fact]:
        """Carries keep the constants that the body makes again."""
        if step.name == "while":
            counts = (step.eqn.params["cond_nconsts"], step.eqn.params["body_nconsts"])
            tests, held = given[: counts[0]], given[counts[0] : sum(counts)]
            carry, xs = given[sum(counts) :], []
        else:
            carried = scan_parts(step).carried
            tests, held, carry = [], given[: carried.start], given[carried]
            xs = [Fact(f.axes[1:], f.whole) for f in given[carried.stop :]]
        while True:
            self._run(step.bodies[-1], [*held, *carry, *xs])
            made = [self._outside(self.at(a)) for a in step.bodies[-1].outvars]
            new = [self._met(a, b) for a, b in zip(carry, made, strict=False)]
            if all(_equal(a, b) for a, b in zip(new, carry, strict=True)):
                break
            carry = new
        if step.name == "while":
            self._run(step.bodies[0], [*tests, *carry])
        ys = [Fact((None, *f.axes), f.whole) for f in made[len(carry) :]]
        return [*carry, *map(self._certain, ys)]


def _by_sign(step: Step, kind: tuple[int, ...], made: Any) -> bool:
    """Whether the sign of a zero matters, which the data may choose."""
    return ZERO in kind and (step.name == "atan2" or bool(np.isinf(made)))


def _sees_padding(step: Step) -> bool:
    """Whether a window may lie in the padding alone, or between the entries."""
    if step.name not in ("reduce_window_max", "reduce_window_min"):
        return False
    p = step.eqn.params
    rows = zip(p["padding"], p["window_dimensions"], p["window_dilation"], strict=True)
    beyond = [
        max(low, high) > (0 if gap > 1 else n - 1) for (low, high), n, gap in rows
    ]
    return any(beyond) or any(gap > 1 for gap in p["base_dilation"])


def _kinds(columns: list[Array], count: int) -> tuple[list[tuple[int, ...]], Any]:
    """The different columns of facts below `count`, and where each of them stands."""
    if not columns[0].size:
        return [], columns[0].astype(int)
    code = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        code = code * (count + 1) + column + 1
    if (code == code[0]).all():
        first, back = np.zeros(1, int), np.zeros(len(code), int)
    else:
        _, first, back = np.unique(code, return_index=True, return_inverse=True)
    return [*zip(*(c[first].tolist() for c in columns), strict=True)], back


def _equal(one: Fact, two: Fact) -> bool:
    same = lambda a, b: (
        a is b or (a is not None and b is not None and np.array_equal(a, b))
    )
    return one.whole == two.whole and all(map(same, one.axes, two.axes))


def fact_of(table: Table, array: Any) -> Fact:
    """The facts of an array: which slices are zero, what all of it is."""
    x = np.asarray(array) if jnp.issubdtype(array.dtype, jnp.number) else None
    if x is None or not x.size:
        return Fact((None,) * array.ndim, FIXED)
    nonzero = x != 0
    axes = []
    for axis, n in enumerate(x.shape):
        others = tuple(d for d in range(x.ndim) if d != axis)
        axes.append(np.where(nonzero.any(others), FIXED, ZERO) if n > 1 else None)
    flat = x.ravel()
    alike = bool((flat == flat[0]).all()) and x.dtype.kind in "biuf"
    return Fact(tuple(axes), table.constant(float(flat[0])) if alike else FIXED)
