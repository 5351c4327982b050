"""A program on the kept entries of its values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dagjax.compaction.channels.coupling import Channels, CompactionError
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.wires import Joined, Same
from dagjax.compaction.removal.derivatives import End, backward, forward
from dagjax.compaction.removal.facts import UnknownSliceError
from dagjax.compaction.removal.propagation import REDUCTIONS, Facts
from dagjax.jaxprs.interpret import Env, Evaluation, bind, bind_whole
from dagjax.jaxprs.primitives import primitive_of, primitives_with
from dagjax.jaxprs.program import (
    REMAT,
    Equation,
    Program,
    backward_slice,
    is_literal,
)
from dagjax.jaxprs.versions import Atom
from dagjax.types import PyTree

Kept = Callable[[Any], tuple[Array | None, ...]]
_SLICES = ("slice", "split", "gather")
_PASTES = ("concatenate", "stack")


class CutEvaluation(Evaluation):
    """Evaluates a program where some indices of its values are gone.

    Args:
        channels: The program with its wiring.
        kept: `value -> kept indices of each axis`.
        facts: What is known of the removed slices.
        folded: Contractions to which removed slices add a constant.
    """

    def __init__(
        self,
        channels: Channels,
        kept: Kept,
        facts: Facts,
        folded: Sequence[Equation] = (),
    ):
        self.channels, self.kept, self.facts = channels, kept, facts
        self.folded = tuple(folded)
        self._sliced: dict[Program, list[Equation]] = {}

    def __call__(self, *args: PyTree, added: Sequence[Any] = ()) -> list[Any]:
        """The outputs, of arguments from which the removed entries are gone.

        Args:
            *args: The arguments.
            added: What is added to the contractions in `folded`.
        """
        return self.run(self.channels.body, args, self._holding(added))

    def values(self, *args: PyTree, added: Sequence[Any] = ()) -> Env:
        """All values that are evaluated, of the same arguments."""
        env = self._holding(added)
        self.run(self.channels.body, args, env)
        return env

    def size(self, var: Atom) -> tuple[int, ...]:
        """The shape of what is kept of a value."""
        if is_literal(var):
            return np.shape(var.val)
        sizes = zip(var.aval.shape, self.kept(var), strict=True)
        return tuple(n if k is None else len(k) for n, k in sizes)

    def reads(self, body: Program) -> set[Any]:
        """The arguments of a program that it still needs."""
        ends = {v for v in body.outvars if not is_literal(v)}
        demands = (self._demands(equation) for equation in self.equations(body))
        return ends.union(*demands).intersection(body.invars)

    def _holding(self, added: Sequence[Any]) -> Env:
        return dict(zip(self.folded, added, strict=True))

    # --- which equations are needed --------------------------------------------------

    def equations(self, program: Program) -> list[Equation]:
        """Those that the outputs need where removed entries are gone."""
        if program not in self._sliced:
            self._sliced[program] = backward_slice(
                program.equations, program.outvars, reads=self._demands
            )
        return self._sliced[program]

    def _demands(self, equation: Equation) -> list[Any]:
        """What an equation reads; nothing where its values are known already."""
        if self.facts.constants.issuperset(equation.eqn.outvars):
            return []
        if primitive_of(equation.eqn).kind == "contraction" and self._is_empty(
            equation
        ):
            return []
        if equation.name in REDUCTIONS and self._is_empty(equation):
            kinds = [fact for _, fact, _ in self._removed(equation)]
            numbers = bool(np.all(self.facts.table.is_number(kinds))) if kinds else True
            return [] if numbers else equation.reads
        if equation.name in _PASTES:
            return [v for v in self._pasted(equation) if not is_literal(v)]
        return equation.reads

    def _is_empty(self, equation: Equation) -> bool:
        """Whether nothing is left of an axis that is contracted or reduced."""
        wires, atoms = self.channels.wires[equation], equation.eqn.invars
        ends = [end for pair in wires.contracted for end in pair] + [*wires.reduced]
        if equation in self.channels.untied:
            for (i, a), (j, b) in wires.contracted:
                one, two = self._present(atoms[i], a), self._present(atoms[j], b)
                if not np.isin(one, two).any():
                    return True
        if equation.name == "conv_general_dilated":
            ends += [(0, equation.eqn.params["dimension_numbers"].lhs_spec[1])]
            if 0 in self.size(atoms[0]) or 0 in self.size(atoms[1]):
                return True
        return any(not self.size(atoms[i])[a] for i, a in ends)

    # --- evaluation ------------------------------------------------------------------

    def constant(self, var: Any, array: Any) -> Any:
        """The kept entries of an array that the program holds."""
        for axis, places in enumerate(self.kept(var)):
            array = array if places is None else take(array, places, axis)
        return array

    def visit(self, equation: Equation, env: Env) -> Sequence[Any]:
        """Constants as they are known, all else by the rule of its primitive."""
        if self.facts.constants.issuperset(equation.eqn.outvars):
            return [*map(self._recalled, equation.eqn.outvars)]
        rule = self._rules.get(equation.name)
        if rule is None or (equation.name == "gather" and not self._picks(equation)):
            return super().visit(equation, env)
        results = rule(equation, env)
        return results if isinstance(results, list) else [results]

    @functools.cached_property
    def _rules(self) -> Mapping[str, Callable[[Equation, Env], Any]]:
        """What needs more than the values that an equation reads."""
        return {
            **dict.fromkeys(primitives_with(kind="contraction"), self._contraction),
            **dict.fromkeys(REDUCTIONS, self._reduction),
            **dict.fromkeys(_PASTES, self._paste),
            **dict.fromkeys(_SLICES, self._pieces),
            "iota": lambda e, _: self.constant(e.eqn.outvars[0], bind(e.eqn, [])[0]),
        }

    def equation(self, equation: Equation, values: list[Any]) -> Sequence[Any]:
        """The primitive, with the sizes of what is kept."""
        return bind(equation.eqn, values, **self._changes(equation))

    def _recalled(self, var: Atom) -> jax.Array:
        """A value that is one constant."""
        value = self.facts.table.values(self.facts.at(var).whole)
        return jnp.full(self.size(var), value, var.aval.dtype)

    def _paste(self, equation: Equation, env: Env) -> Any:
        (out,), atoms = equation.eqn.outvars, self._pasted(equation)
        if not atoms:
            return jnp.zeros(self.size(out), out.aval.dtype)
        return bind(equation.eqn, [self.read(env, atom) for atom in atoms])

    def _pasted(self, equation: Equation) -> list[Any]:
        """The operands of which something is left in what they are put together to."""
        (out,), atoms = equation.eqn.outvars, equation.eqn.invars
        p = equation.eqn.params
        if equation.name == "concatenate":
            return [a for a in atoms if self.size(a)[p["dimension"]]]
        places = self.kept(out)[p["axis"] % len(out.aval.shape)]
        return [a for i, a in enumerate(atoms) if places is None or i in places]

    def _changes(self, equation: Equation) -> dict[str, Any]:
        """The parameters that hold sizes."""
        (out, *_), p = equation.eqn.outvars, equation.eqn.params
        if equation.name == "broadcast_in_dim":
            return {"shape": self.size(out)}
        if equation.name == "reshape":
            return {"new_sizes": self.size(out)}
        if equation.name in ("gather", "dynamic_slice"):
            whole, sizes = self._shapes(equation.eqn.invars[0]), p["slice_sizes"]
            new = (
                m if n == old else n for n, (old, m) in zip(sizes, whole, strict=True)
            )
            return {"slice_sizes": tuple(new)}
        if equation.name == "pad":
            return {"padding_config": self._margins(equation)}
        return {}

    def _shapes(self, var: Any) -> list[tuple[int, int]]:
        """The sizes of a value's axes, before and after the cut."""
        return [*zip(var.aval.shape, self.size(var), strict=True)]

    def _margins(self, equation: Equation) -> tuple[tuple[int, int, int], ...]:
        """As many new entries on each side as are kept of them."""
        config = equation.eqn.params["padding_config"]
        sizes = equation.eqn.invars[0].aval.shape
        places = self.kept(equation.eqn.outvars[0])
        return tuple(
            (low, high, gap)
            if kept is None
            else (int((kept < low).sum()), int((kept >= low + n).sum()), gap)
            for (low, high, gap), n, kept in zip(config, sizes, places, strict=True)
        )

    def _pieces(self, equation: Equation, env: Env) -> list[Any]:
        """The kept entries of slices, found among the kept entries of the operand."""
        source, *_ = equation.eqn.invars
        outputs = self.channels.wires[equation].outputs
        pieces = []
        for var, wires in zip(equation.eqn.outvars, outputs, strict=True):
            piece = self.read(env, source)
            for axis, wire in enumerate(wires):
                if isinstance(wire, Joined):
                    places = self._places(source, var, axis, wire.parts[0])
                    piece = take(piece, places, axis)
            pieces.append(piece)
        return pieces

    def _picks(self, equation: Equation) -> bool:
        """Whether a gather takes constant indices of one axis."""
        wires = self.channels.wires[equation].outputs[0]
        return any(isinstance(wire, Joined) for wire in wires)

    def _places(self, source: Any, var: Any, axis: int, part: Any) -> Array:
        size, present = source.aval.shape[axis], self.kept(source)[axis]
        kept = self.kept(var)[axis]
        wanted = np.arange(size)[part[2]]
        wanted = wanted if kept is None else wanted[kept]
        return wanted if present is None else np.searchsorted(present, wanted)

    # --- contractions and reductions -------------------------------------------------

    def _contraction(self, equation: Equation, env: Env) -> jax.Array:
        (out,) = equation.eqn.outvars
        if self._is_empty(equation):
            y = jnp.zeros(self.size(out), out.aval.dtype)
        else:
            values = [self.read(env, atom) for atom in equation.eqn.invars]
            untied = equation in self.channels.untied
            y = self._mapped(equation, values) if untied else contract(equation, values)
        return y + _fitting(env[equation], y, equation) if equation in env else y

    def _mapped(self, equation: Equation, values: list[Any]) -> Any:
        """A contraction whose kernel keeps other channels than its neighbours."""
        atoms = equation.eqn.invars
        for (i, a), (j, b) in self.channels.wires[equation].contracted:
            one, two = self._present(atoms[i], a), self._present(atoms[j], b)
            values[i] = take(values[i], np.flatnonzero(np.isin(one, two)), a)
            values[j] = take(values[j], np.flatnonzero(np.isin(two, one)), b)
        return expanded(self.channels, self.kept, equation, contract(equation, values))

    def _present(self, var: Any, axis: int) -> Array:
        return present(self.kept, var, axis)

    def _reduction(self, equation: Equation, env: Env) -> jax.Array:
        """The removed slices of one kind count together."""
        (atom,), (out,) = equation.eqn.invars, equation.eqn.outvars
        parts = [
            self._repeated(equation, self._slice(atom, axis, fact, env), count, fact)
            for axis, fact, count in self._removed(equation)
        ]
        if not self._is_empty(equation):
            parts.insert(0, bind(equation.eqn, [self.read(env, atom)])[0])
        join = {"reduce_sum": jnp.add, "reduce_max": jnp.maximum}
        both = join.get(equation.name, jnp.minimum)
        if not (values := [p for p in parts if p is not None]):
            return jnp.zeros(self.size(out), out.aval.dtype)
        return functools.reduce(both, values)

    def _repeated(self, equation: Equation, part: Any, count: int, fact: int) -> Any:
        """What `count` slices that are equal contribute."""
        if equation.name == "reduce_sum" and self.facts.table.values(fact) == 0:
            return None
        (reduced,) = bind(equation.eqn, [part])
        if equation.name != "reduce_sum":
            return reduced
        return reduced * np.asarray(count).astype(reduced.dtype)  # small integers wrap

    def _removed(self, equation: Equation) -> list[tuple[int, int, int]]:
        """Of a reduction the axis, the fact and the number of removed slices."""
        removed: list[tuple[int, int, int]] = []
        for operand, axis in self.channels.wires[equation].reduced:
            atom = equation.eqn.invars[operand]
            kept = None if is_literal(atom) else self.kept(atom)[axis]
            if kept is None:
                continue
            facts = np.delete(self.facts.along(atom, axis), kept)
            for fact, count in zip(*np.unique(facts, return_counts=True), strict=True):
                removed.append((axis, int(fact), int(count)))
        return removed

    # --- what removed slices are -----------------------------------------------------

    def _slice(self, atom: Atom, axis: int, fact: int, env: Env) -> Any:
        """The slice that has a fact, the axis of size 1."""
        table = self.facts.table
        if is_literal(atom):
            return np.asarray(atom.val)
        shape = [1 if d == axis else n for d, n in enumerate(self.size(atom))]
        if table.is_number(fact):
            return jnp.full(shape, table.values(fact), atom.aval.dtype)
        if fact not in table.expressions:
            raise UnknownSliceError
        equation, along, operands = table.expressions[fact]
        if equation.name == "broadcast_in_dim":
            value = self.read(env, equation.eqn.invars[0])
            return bind(equation.eqn, [value], shape=tuple(shape))[0]
        if equation.name in REDUCTIONS:
            wire = self.channels.wires[equation].outputs[0][along]
            assert isinstance(wire, Same)
            source = wire.sources[0][1]
            part = self._slice(equation.eqn.invars[0], source, operands[0], env)
            return bind(equation.eqn, [part])[0]
        return self._elementwise(equation, along, operands, env)

    def _elementwise(self, equation: Equation, axis: int, facts: Any, env: Env) -> Any:
        atoms = equation.eqn.invars
        parts = [
            self._operand(atom, axis, fact, env)
            for atom, fact in zip(atoms, facts, strict=True)
        ]
        sizes = self.size(equation.eqn.outvars[0])
        shape = tuple(1 if d == axis else n for d, n in enumerate(sizes))
        full = [
            jnp.broadcast_to(p, shape).astype(atom.aval.dtype)
            for p, atom in zip(parts, atoms, strict=True)
        ]
        return bind(equation.eqn, full)[0]

    def _operand(self, atom: Any, axis: int, fact: int, env: Env) -> Any:
        """What an elementwise equation reads beside a slice along an axis."""
        if fact < 0:
            return self.read(env, atom)
        if self.facts.table.is_number(fact):
            return np.asarray(self.facts.table.values(fact)).astype(atom.aval.dtype)
        return self._slice(atom, axis, fact, env)

    # --- calls -----------------------------------------------------------------------

    def call(self, equation: Equation, values: list[Any]) -> Sequence[Any]:
        """A call with its derivative rule, or its rematerialization."""
        (body,) = equation.bodies
        ins, outs = equation.eqn.invars, equation.eqn.outvars
        cut = (v for v in (*ins, *outs) if not is_literal(v))
        if all(k is None for v in cut for k in self.kept(v)):
            return bind_whole(equation.eqn, *values)
        run = lambda *args: self.run(body, args)
        if equation.name in REMAT:
            p = equation.eqn.params
            again = jax.checkpoint(
                run, policy=p["policy"], prevent_cse=p["prevent_cse"]
            )
            return again(*values)
        rule = forward if equation.name == "custom_jvp_call" else backward
        ends = [*map(self._end, ins)], [*map(self._end, outs)]
        return rule(equation.eqn, run, *ends)(*values)

    def _end(self, atom: Atom) -> End:
        """What a derivative rule must know of an operand or a result."""
        kept = () if is_literal(atom) else self.kept(atom)
        values: list[Any] = [None] * len(kept)
        for axis, places in enumerate(kept):
            if places is not None:
                values[axis] = self.facts.table.values(self.facts.along(atom, axis))
                values[axis][places] = np.nan
        return End(atom.aval, kept, tuple(values))


def take(x: Any, places: Array, axis: int) -> Any:
    """Entries along an axis, by a slice where they lie side by side."""
    n = len(places)
    if n == x.shape[axis] and (places == np.arange(n)).all():
        return x
    if n and (np.diff(places) == 1).all():
        return lax.slice_in_dim(x, int(places[0]), int(places[-1]) + 1, axis=axis)
    return jnp.take(x, places, axis=axis, unique_indices=True, mode="clip")


def _fitting(constant: Array, y: Any, equation: Equation) -> Any:
    """A folded constant, of size 1 or of the size of the value along every axis."""
    if any(n not in (1, k) for n, k in zip(constant.shape, y.shape, strict=True)):
        raise CompactionError(
            f"a constant of shape {list(constant.shape)} was folded into "
            f"{equation.name}{equation.where}, which has the shape {list(y.shape)} "
            "now: compact the network with inputs of this size"
        )
    return constant.astype(y.dtype)


def present(kept: Kept, var: Any, axis: int) -> Array:
    """The indices of an axis that are kept."""
    places = kept(var)[axis]
    return np.arange(var.aval.shape[axis]) if places is None else places


def expanded(channels: Channels, kept: Kept, equation: Equation, y: Any) -> Any:
    """What an untied kernel makes, at its places in the result."""
    (out,) = equation.eqn.outvars
    for axis, wire in enumerate(channels.wires[equation].outputs[0]):
        if isinstance(wire, Same):
            (operand, source), *_ = wire.sources
            features = present(kept, equation.eqn.invars[operand], source)
            y = spread(y, features, present(kept, out, axis), axis)
    return y


def spread(y: Array, places: Array, wanted: Array, axis: int) -> Any:
    """Entries that lie at some places of an axis, at others; zero where none lies."""
    if np.array_equal(places, wanted):
        return y
    if not len(places):
        shape = [len(wanted) if d == axis else n for d, n in enumerate(y.shape)]
        return jnp.zeros(shape, y.dtype)
    source = np.searchsorted(places, wanted)
    source = np.where(np.isin(wanted, places), source, len(places))
    zero = jnp.zeros_like(lax.slice_in_dim(y, 0, 1, axis=axis))
    return jnp.take(jnp.concatenate([y, zero], axis), source, axis=axis, mode="clip")


def contract(equation: Equation, values: list[Any]) -> jax.Array:
    """A product or a convolution of what is kept of its operands."""
    changes = {}
    if equation.name == "conv_general_dilated":
        numbers = equation.eqn.params["dimension_numbers"]
        features = values[0].shape[numbers.lhs_spec[1]]
        groups = features // values[1].shape[numbers.rhs_spec[1]]
        changes = {"feature_group_count": groups}
    return bind(equation.eqn, values, **changes)[0]
