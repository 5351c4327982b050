"""A program on the kept entries of its values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from dagjax.compaction.channels.coupling import Channels, CompactionError, scan_parts
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.wiring import Joined, Same
from dagjax.compaction.removal.facts import FIXED, UNKNOWN, Fact, Known, Table, fact_of
from dagjax.jaxprs.flatten import part_of
from dagjax.jaxprs.program import CALLS, Body, Step, body_of, is_literal
from dagjax.jaxprs.versions import closed_jaxpr, shape_of

Env = dict[Any, Any]
Kept = Callable[[Any], tuple[Array | None, ...]]
_CONTRACTIONS = ("dot_general", "conv_general_dilated")
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min")


class Evaluator:
    """Evaluates a program where some indices of its values are gone.

    Args:
        channels: The program with its wiring.
        kept: `value -> kept indices of each axis`.
        known: What is known of the removed slices.
        folded: Contractions to which removed slices add a constant.
    """

    def __init__(
        self,
        channels: Channels,
        kept: Kept,
        known: Known,
        folded: Sequence[Step] = (),
    ):
        self.channels, self.kept, self.known = channels, kept, known
        self.folded = tuple(folded)
        self._needed = {channels.body: self._alive(channels.body)}
        for step in channels.body.walk():
            for body in step.bodies:
                self._needed[body] = self._alive(body)

    def __call__(self, *args: Any, added: Sequence[Any] = ()) -> list[Any]:
        """The outputs, of arguments from which the removed entries are gone.

        Args:
            *args: The arguments.
            added: What is added to the contractions in `folded`.
        """
        held = dict(zip(self.folded, added, strict=True))
        return self._run(self.channels.body, args, held)

    def values(self, *args: Any, added: Sequence[Any] = ()) -> Env:
        """All values that are evaluated, of the same arguments."""
        env: Env = dict(zip(self.folded, added, strict=True))
        self._run(self.channels.body, args, env, env)
        return env

    def size(self, var: Any) -> tuple[int, ...]:
        """The shape of what is kept of a value."""
        sizes = zip(var.aval.shape, self.kept(var), strict=True)
        return tuple(n if k is None else len(k) for n, k in sizes)

    def reads(self, body: Body) -> set[Any]:
        """The arguments of a program that it still needs."""
        wanted = {v for v in body.outvars if not is_literal(v)}
        for step in self._needed[body]:
            wanted.update(self._demands(step))
        return wanted.intersection(body.invars)

    # --- which steps are needed ------------------------------------------------------

    def _alive(self, body: Body) -> tuple[Step, ...]:
        wanted = {v for v in body.outvars if not is_literal(v)}
        steps = []
        for step in reversed(body.steps):
            if wanted.intersection(step.eqn.outvars):
                wanted.update(self._demands(step))
                steps.append(step)
        return tuple(reversed(steps))

    def _demands(self, step: Step) -> list[Any]:
        """What a step reads; nothing where its values are known already."""
        if all(self._is_known(var) for var in step.eqn.outvars):
            return []
        if step.name in _CONTRACTIONS and self._is_empty(step):
            return []
        if step.name in _REDUCTIONS and self._is_empty(step):
            parts = self._removed(step)
            return step.reads if any(not self._constant(f) for f, _ in parts) else []
        if step.name in ("concatenate", "stack"):
            return [v for v in self._pasted(step) if not is_literal(v)]
        return step.reads

    def _is_known(self, var: Any) -> bool:
        return self._constant(self.known.at(var).whole)

    def _is_empty(self, step: Step) -> bool:
        wires, atoms = self.channels.wires[step], step.eqn.invars
        ends = [end for pair in wires.contracted for end in pair] + [*wires.reduced]
        if step in self.channels.loose and any(
            not np.isin(*[self._present(atoms[i], a) for i, a in pair]).any()  # pyright: ignore[reportArgumentType]
            for pair in wires.contracted
        ):
            return True
        if step.name == "conv_general_dilated":
            ends += [(0, step.eqn.params["dimension_numbers"].lhs_spec[1])]
            if 0 in self.size(atoms[0]) or 0 in self.size(atoms[1]):
                return True
        return any(not self.size(atoms[i])[a] for i, a in ends)

    # --- evaluation ------------------------------------------------------------------

    def _run(
        self, body: Body, args: Sequence[Any], outer: Env, env: Env | None = None
    ) -> list[Any]:
        env = {**outer} if env is None else env
        env |= dict(zip(body.invars, args, strict=True))
        for var, array in body.consts.items():
            env[var] = self._taken(array, var)
        for step in self._needed[body]:
            if all(self._is_known(var) for var in step.eqn.outvars):
                made = [*map(self._recalled, step.eqn.outvars)]
            else:
                made = self._step(step, env)
            env |= dict(zip(step.eqn.outvars, made, strict=True))
        return [_read(env, atom) for atom in body.outvars]

    def _recalled(self, var: Any) -> Any:
        """A value that is one constant."""
        value = self._value(self.known.at(var).whole)
        return jnp.full(self.size(var), value, var.aval.dtype)

    def _taken(self, array: Any, var: Any) -> Any:
        for axis, places in enumerate(self.kept(var)):
            array = array if places is None else take(array, places, axis)
        return array

    def _step(self, step: Step, env: Env) -> list[Any]:
        name = step.name
        if step.bodies:
            return self._call(step, env)
        if name in _CONTRACTIONS:
            return [self._contraction(step, env)]
        if name in _REDUCTIONS:
            return [self._reduction(step, env)]
        if name == "iota":
            return [self._taken(bind(step.eqn, []), step.eqn.outvars[0])]
        if name in ("slice", "split"):
            return self._pieces(step, _read(env, step.eqn.invars[0]))
        atoms = step.eqn.invars
        if name in ("concatenate", "stack"):
            atoms = self._pasted(step)
            if not atoms:
                (out,) = step.eqn.outvars
                return [jnp.zeros(self.size(out), out.aval.dtype)]
        values = [_read(env, atom) for atom in atoms]
        made = bind(step.eqn, values, **self._changes(step))
        return list(made) if step.eqn.primitive.multiple_results else [made]

    def _pasted(self, step: Step) -> list[Any]:
        """The operands of which something is left in what they are put together to."""
        if step.name == "concatenate":
            return [a for a in step.eqn.invars if 0 not in self.size(a)]
        (out,), axis = step.eqn.outvars, step.eqn.params["axis"]
        places = self.kept(out)[axis]
        return [
            step.eqn.invars[i]
            for i in range(len(step.eqn.invars))
            if places is None or i in places
        ]

    def _changes(self, step: Step) -> dict[str, Any]:
        """The parameters that hold sizes."""
        (out, *_), name, p = step.eqn.outvars, step.name, step.eqn.params
        if name == "broadcast_in_dim":
            return {"shape": self.size(out)}
        if name == "reshape":
            return {"new_sizes": self.size(out)}
        if name in ("gather", "dynamic_slice"):
            old = zip(p["slice_sizes"], self.kept(step.eqn.invars[0]), strict=True)
            return {"slice_sizes": tuple(n if k is None else len(k) for n, k in old)}
        if name == "pad":
            return {"padding_config": self._margins(step)}
        return {}

    def _margins(self, step: Step) -> tuple[tuple[int, int, int], ...]:
        """As many new entries on each side as are kept of them."""
        config, sizes = step.eqn.params["padding_config"], step.eqn.invars[0].aval.shape
        places = self.kept(step.eqn.outvars[0])
        return tuple(
            (low, high, gap)
            if kept is None
            else (int((kept < low).sum()), int((kept >= low + n).sum()), gap)
            for (low, high, gap), n, kept in zip(config, sizes, places, strict=True)
        )

    def _pieces(self, step: Step, x: Any) -> list[Any]:
        """The kept entries of slices, found among the kept entries of the operand."""
        (source,), outputs = step.eqn.invars, self.channels.wires[step].outputs
        found = []
        for var, wires in zip(step.eqn.outvars, outputs, strict=True):
            piece = x
            for axis, wire in enumerate(wires):
                if isinstance(wire, Joined):
                    places = self._places(source, var, axis, wire.parts[0])
                    piece = take(piece, places, axis)
            found.append(piece)
        return found

    def _places(self, source: Any, var: Any, axis: int, part: Any) -> Array:
        size, held = source.aval.shape[axis], self.kept(source)[axis]
        kept = self.kept(var)[axis]
        wanted = np.arange(size)[part[2]]
        wanted = wanted if kept is None else wanted[kept]
        return wanted if held is None else np.searchsorted(held, wanted)

    # --- contractions and reductions -------------------------------------------------

    def _contraction(self, step: Step, env: Env) -> Any:
        (out,) = step.eqn.outvars
        if self._is_empty(step):
            y = jnp.zeros(self.size(out), out.aval.dtype)
        elif step in self.channels.loose:
            y = self._mapped(step, [_read(env, atom) for atom in step.eqn.invars])
        else:
            y = contract(step, [_read(env, atom) for atom in step.eqn.invars])
        return y + _fitting(env[step], y, step) if step in env else y

    def _mapped(self, step: Step, values: list[Any]) -> Any:
        """A contraction whose kernel keeps other channels than its neighbours."""
        wires = self.channels.wires[step]
        for (i, a), (j, b) in wires.contracted:
            one, two = (
                self._present(step.eqn.invars[k], d) for k, d in ((i, a), (j, b))
            )
            values[i] = take(values[i], np.flatnonzero(np.isin(one, two)), a)
            values[j] = take(values[j], np.flatnonzero(np.isin(two, one)), b)
        return expanded(self.channels, self.kept, step, contract(step, values))

    def _present(self, var: Any, axis: int) -> Array:
        return present(self.kept, var, axis)

    def _reduction(self, step: Step, env: Env) -> Any:
        """The removed slices of one kind count together."""
        (atom,), (out,) = step.eqn.invars, step.eqn.outvars
        whole = [] if self._is_empty(step) else [bind(step.eqn, [_read(env, atom)])]
        parts = [
            self._repeated(step, self._slice(atom, axis, fact, env), axis, count, fact)
            for axis, fact, count in self._removed(step, axes=True)
        ]
        join = {"reduce_sum": jnp.add, "reduce_max": jnp.maximum}
        both = join.get(step.name, jnp.minimum)
        if not (values := whole + [p for p in parts if p is not None]):
            return jnp.zeros(self.size(out), out.aval.dtype)
        return functools.reduce(both, values)

    def _repeated(self, step: Step, part: Any, axis: int, count: int, fact: int) -> Any:
        """What `count` slices that are equal contribute."""
        if step.name == "reduce_sum" and self._value(fact) == 0:
            return None
        made = bind(step.eqn, [part])
        return (
            made * np.asarray(count).astype(made.dtype)  # small integers wrap round
            if step.name == "reduce_sum"
            else made
        )

    def _removed(self, step: Step, axes: bool = False) -> list[Any]:
        """Of a reduction, how many removed slices are of which kind."""
        found: list[Any] = []
        for operand, axis in self.channels.wires[step].reduced:
            atom = step.eqn.invars[operand]
            kept = self.kept(atom)[axis]
            if kept is None:
                continue
            facts = np.delete(self.known.along(atom, axis), kept)
            for fact, count in zip(*np.unique(facts, return_counts=True), strict=True):
                pair = (int(fact), int(count))
                found.append((axis, *pair) if axes else pair)
        return found

    def _value(self, fact: int) -> float:
        return self.known.table.values[fact]

    def _constant(self, fact: int) -> bool:
        return not math.isnan(self._value(fact))

    def _slice(self, atom: Any, axis: int, fact: int, env: Env) -> Any:
        """The slice of a kind, the axis of size 1."""
        if self._constant(fact):
            shape = [1 if d == axis else n for d, n in enumerate(self.size(atom))]
            return jnp.full(shape, self._value(fact), atom.aval.dtype)
        if fact in (UNKNOWN, FIXED):
            raise AssertionError("a removed slice is read of which nothing is known")
        step, along, operands = self.known.table.expressions[fact]
        if step.name == "broadcast_in_dim":
            shape = [1 if d == axis else n for d, n in enumerate(self.size(atom))]
            return bind(step.eqn, [_read(env, step.eqn.invars[0])], shape=tuple(shape))
        if step.name in _REDUCTIONS:
            (inner,), (_, source) = operands, self._source(step, along)
            part = self._slice(step.eqn.invars[0], source, inner, env)
            return bind(step.eqn, [part])
        return self._elementwise(step, along, operands, env)

    def _source(self, step: Step, axis: int) -> Any:
        wire = self.channels.wires[step].outputs[0][axis]
        assert isinstance(wire, Same)
        return wire.sources[0]

    def _elementwise(self, step: Step, axis: int, facts: Any, env: Env) -> Any:
        parts = [
            _read(env, atom) if fact < 0 else self._slice(atom, axis, fact, env)
            for atom, fact in zip(step.eqn.invars, facts, strict=True)
        ]
        shape = jnp.broadcast_shapes(*(jnp.shape(p) for p in parts))
        full = [
            jnp.broadcast_to(p, shape).astype(atom.aval.dtype)
            for p, atom in zip(parts, step.eqn.invars, strict=True)
        ]
        return bind(step.eqn, full)

    # --- calls and loops -------------------------------------------------------------

    def _call(self, step: Step, env: Env) -> list[Any]:
        operands = [_read(env, atom) for atom in step.eqn.invars]
        if step.name in CALLS:
            return list(self._own_rule(step)(*operands))
        if step.name == "cond":
            branches = [functools.partial(self._inner, body) for body in step.bodies]
            return list(lax.switch(operands[0], branches, *operands[1:]))
        if step.name == "scan":
            return self._scan(step, operands)
        return self._while(step, operands)

    def _inner(self, body: Body, *args: Any) -> list[Any]:
        return self._run(body, args, {})

    def _scan(self, step: Step, operands: list[Any]) -> list[Any]:
        p, parts, (body,) = step.eqn.params, scan_parts(step), step.bodies
        held = operands[: parts.carried.start]
        carry, xs = operands[parts.carried], operands[parts.carried.stop :]

        def once(carry: Any, x: Any) -> Any:
            made = self._inner(body, *held, *carry, *x)
            return made[: len(carry)], made[len(carry) :]

        setting = {"reverse": p["reverse"], "unroll": p.get("unroll", 1)}
        carry, ys = lax.scan(once, carry, xs, length=p["length"], **setting)
        return [*carry, *ys]

    def _while(self, step: Step, operands: list[Any]) -> list[Any]:
        p, (test, body) = step.eqn.params, step.bodies
        first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        tests, held, carry = operands[:first], operands[first:second], operands[second:]
        going = lambda carry: self._inner(test, *tests, *carry)[0]
        return list(
            lax.while_loop(going, lambda c: self._inner(body, *held, *c), carry)
        )

    def _own_rule(self, step: Step) -> Callable[..., Any]:
        """A call with its derivative rule, or its rematerialization."""
        (body,), atoms = step.bodies, [*step.eqn.invars, *step.eqn.outvars]
        if all(k is None for v in atoms if not is_literal(v) for k in self.kept(v)):
            return functools.partial(bind_whole, step.eqn)
        run = functools.partial(self._inner, body)
        if "remat" in step.name or step.name == "checkpoint":
            p = step.eqn.params
            return jax.checkpoint(run, policy=p["policy"], prevent_cse=p["prevent_cse"])
        rule = _forward if step.name == "custom_jvp_call" else _backward
        ins, outs = step.eqn.invars, step.eqn.outvars
        return rule(step.eqn, run, [*map(self._end, ins)], [*map(self._end, outs)])

    def _end(self, atom: Any) -> End:
        """What a derivative rule must know of an operand or a result."""
        kept = () if is_literal(atom) else self.kept(atom)
        table = np.asarray(self.known.table.values)
        values: list[Any] = [None] * len(kept)
        for axis, places in enumerate(kept):
            if places is not None:
                values[axis] = table[self.known.along(atom, axis)]
                values[axis][places] = np.nan
        return End(atom.aval, kept, tuple(values))


def _read(env: Env, atom: Any) -> Any:
    return atom.val if is_literal(atom) else env[atom]


def take(x: Any, places: Array, axis: int) -> Any:
    """Entries along an axis, by a slice where they lie side by side."""
    n = len(places)
    if n == x.shape[axis] and (places == np.arange(n)).all():
        return x
    if n and (np.diff(places) == 1).all():
        return lax.slice_in_dim(x, int(places[0]), int(places[-1]) + 1, axis=axis)
    return jnp.take(x, places, axis=axis, unique_indices=True, mode="clip")


def _fitting(constant: Any, y: Any, step: Step) -> Any:
    """A folded constant, of size 1 or of the size of the value along every axis."""
    if any(n not in (1, k) for n, k in zip(constant.shape, y.shape, strict=True)):
        raise CompactionError(
            f"a constant of shape {list(constant.shape)} was folded into "
            f"{step.name}{step.where}, which has the shape {list(y.shape)} now: "
            "compact the network with inputs of this size"
        )
    return constant.astype(y.dtype)


def present(kept: Kept, var: Any, axis: int) -> Array:
    """The indices of an axis that are kept."""
    places = kept(var)[axis]
    return np.arange(var.aval.shape[axis]) if places is None else places


def expanded(channels: Channels, kept: Kept, step: Step, y: Any) -> Any:
    """What a loose kernel makes, at its places in the result."""
    (out,) = step.eqn.outvars
    for axis, wire in enumerate(channels.wires[step].outputs[0]):
        if isinstance(wire, Same):
            (operand, source), *_ = wire.sources
            made = present(kept, step.eqn.invars[operand], source)
            y = spread(y, made, present(kept, out, axis), axis)
    return y


def spread(y: Any, made: Array, wanted: Array, axis: int) -> Any:
    """Entries `made` along an axis at the places `wanted`, zero where not made."""
    if np.array_equal(made, wanted):
        return y
    here = np.searchsorted(made, wanted)
    here = np.where(np.isin(wanted, made), here, len(made))
    zero = jnp.zeros_like(lax.slice_in_dim(y, 0, 1, axis=axis)) if len(made) else None
    if zero is None:
        shape = [len(wanted) if d == axis else n for d, n in enumerate(y.shape)]
        return jnp.zeros(shape, y.dtype)
    return jnp.take(jnp.concatenate([y, zero], axis), here, axis=axis, mode="clip")


def bind(eqn: Any, values: Sequence[Any], **changes: Any) -> Any:
    """The primitive of an equation on other values."""
    return eqn.primitive.bind(*values, **{**eqn.params, **changes})


def bind_whole(eqn: Any, *values: Any) -> list[Any]:
    """An equation as it is, whatever functions its parameters hold."""
    pattern = next(iter(core.jaxprs_in_params(eqn.params)))
    fresh = [core.Var(v.aval) for v in eqn.invars]
    alone = part_of(pattern, [eqn.replace(invars=fresh)], fresh, [*eqn.outvars])
    return core.jaxpr_as_fun(closed_jaxpr(alone))(*values)


def contract(step: Step, values: list[Any]) -> Any:
    """A product or a convolution of what is kept of its operands."""
    eqn = step.eqn
    if step.name == "dot_general":
        return bind(eqn, values)
    numbers = eqn.params["dimension_numbers"]
    features = values[0].shape[numbers.lhs_spec[1]]
    groups = features // values[1].shape[numbers.rhs_spec[1]]
    return bind(eqn, values, feature_group_count=groups)


# --- derivative rules, cut like the calls that they belong to ------------------------


class End(NamedTuple):
    """An argument that is cut.

    Args:
        aval: Its shape before.
        kept: Kept indices, axis by axis.
        values: The constants that removed slices are, NaN elsewhere.
    """

    aval: Any
    kept: tuple[Array | None, ...]
    values: tuple[Array | None, ...]

    def moving(self) -> End:
        """Its tangent or cotangent: zero in what was removed."""
        zero: list[Any] = [None] * len(self.kept)
        for axis, places in enumerate(self.kept):
            if places is not None:
                zero[axis] = np.zeros(self.aval.shape[axis])
                zero[axis][places] = np.nan
        return self._replace(values=tuple(zero))


def _forward(eqn: Any, run: Any, ins: list[End], outs: list[End]) -> Any:
    """The call with its rule for tangents."""
    call = jax.custom_jvp(lambda *args: tuple(run(*args)))
    moving = [i for i, v in enumerate(eqn.invars) if _is_inexact(v)]

    def push(*args: Any) -> Any:
        primals, given = args[: len(ins)], iter(args[len(ins) :])
        tangents = [
            next(given) if i in moving else _still(x) for i, x in enumerate(primals)
        ]
        return jax.jvp(functools.partial(bind_whole, eqn), primals, tuple(tangents))

    @call.defjvp
    def _rule(primals: Any, tangents: Any) -> Any:
        small = cut_like(push, [*ins, *(ins[i].moving() for i in moving)])
        made = small(*primals, *(tangents[i] for i in moving))
        return tuple(made[: len(outs)]), tuple(made[len(outs) :])

    return call


def _backward(eqn: Any, run: Any, ins: list[End], outs: list[End]) -> Any:
    """The call with its rule for cotangents, which runs the call again."""
    call = jax.custom_vjp(lambda *args: tuple(run(*args)))
    moving = [i for i, v in enumerate(eqn.invars) if _is_inexact(v)]

    def pull(*args: Any) -> Any:
        primals, cotangents = args[: len(ins)], args[len(ins) :]
        back = jax.vjp(functools.partial(bind_whole, eqn), *primals)[1]
        made = back([*cotangents])
        return [made[i] for i in moving]

    def back(primals: Any, cotangents: Any) -> Any:
        small = cut_like(pull, [*ins, *(end.moving() for end in outs)])
        made = iter(small(*primals, *cotangents))
        return tuple(
            next(made) if i in moving else _still(x) for i, x in enumerate(primals)
        )

    call.defvjp(lambda *args: (call(*args), args), back)
    return call


def cut_like(fn: Any, ends: Sequence[End]) -> Evaluator:
    """A function where entries of its arguments are gone."""
    closed = jax.make_jaxpr(fn)(*(shape_of(end.aval) for end in ends))
    body = body_of(closed.jaxpr, closed.consts)
    channels = Channels(body, len(body.invars), outputs=False)
    keeps = {v: end.kept for v, end in zip(body.invars, ends, strict=True)}
    removed, table = channels.removed(keeps), Table()
    given = [Fact(tuple(_facts(table, v) for v in end.values)) for end in ends]
    known = Known(channels, given, fact_of, table)
    return Evaluator(channels, channels.kept(removed), known)


def _facts(table: Table, values: Array | None) -> Array | None:
    """Constants; of all other slices nothing is known."""
    if values is None:
        return None
    return np.where(np.isnan(values), UNKNOWN, np.asarray(table.constants(values)))


def _is_inexact(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def _still(x: Any) -> Any:
    return np.zeros(jnp.shape(x), jax.dtypes.float0)
