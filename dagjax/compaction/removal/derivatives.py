"""Derivative rules of calls, cut like the calls that they belong to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from dagjax.compaction.channels.coupling import Channels, CompactionError
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.removal.facts import UNKNOWN, Fact, Table, UnknownSliceError
from dagjax.compaction.removal.propagation import Facts
from dagjax.jaxprs.interpret import bind_whole
from dagjax.jaxprs.program import program_of
from dagjax.jaxprs.pullback import moving, pull
from dagjax.jaxprs.versions import Eqn, shape_of
from dagjax.types import PyTree

Run = Callable[..., Any]


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

    @property
    def places(self) -> tuple[Array, ...]:
        """Where the kept entries lie in the whole."""
        sizes = zip(self.aval.shape, self.kept, strict=True)
        return np.ix_(*(np.arange(n) if k is None else k for n, k in sizes))

    def whole(self, x: Array) -> Any:
        """The argument as it was; zeros where nothing reads what stood there."""
        if all(places is None for places in self.kept):
            return x
        full = np.zeros(self.aval.shape, self.aval.dtype)
        for axis, values in enumerate(self.values):
            if values is not None:
                known = ~np.isnan(values)
                np.moveaxis(full, axis, -1)[..., known] = values[known]
        return jnp.asarray(full).at[self.places].set(x)


def forward(eqn: Any, run: Run, ins: list[End], outs: list[End]) -> Run:
    """A call with its rule for tangents.

    Args:
        eqn: The call as it was.
        run: Its body, cut.
        ins: What is cut of its arguments.
        outs: What is cut of its results.
    """
    call = jax.custom_jvp(lambda *args: tuple(run(*args)))
    inexact = moving(eqn.invars)

    def push(*args: PyTree) -> Any:
        primals, given = args[: len(ins)], iter(args[len(ins) :])
        tangents = [
            next(given) if i in inexact else _still(x) for i, x in enumerate(primals)
        ]
        return jax.jvp(functools.partial(bind_whole, eqn), primals, tuple(tangents))

    @call.defjvp
    def _rule(primals: Array, tangents: Array) -> Any:
        small = cut_like(push, [*ins, *(ins[i].moving() for i in inexact)])
        results = small(*primals, *(tangents[i] for i in inexact))
        return tuple(results[: len(outs)]), tuple(results[len(outs) :])

    return call


def backward(eqn: Eqn, run: Run, ins: list[End], outs: list[End]) -> Run:
    """A call with its rule for cotangents, which runs the call again.

    Args:
        eqn: The call as it was.
        run: Its body, cut.
        ins: What is cut of its arguments.
        outs: What is cut of its results.
    """
    call = jax.custom_vjp(lambda *args: tuple(run(*args)))

    def ahead(*args: PyTree) -> Any:
        primals = tuple(jnp.asarray(x.value) for x in args)
        return call(*primals), (
            primals,
            tuple(() if x.perturbed else None for x in args),
        )

    def back(residuals: Any, cotangents: Any) -> Any:
        """To what was closed over no cotangent may be asked for: a rule gives none."""
        primals, perturbed = residuals
        asked = [i for i in moving(eqn.invars) if perturbed[i] is not None]
        ends = [*ins, *(end.moving() for end in outs)]
        given = [*primals, *map(_instantiated, cotangents)]
        rule = functools.partial(pull, eqn, asked, range(len(outs)))
        try:
            found = cut_like(rule, ends)(*given)
        except (UnknownSliceError, CompactionError):  # of the rule; the call is cut
            whole = rule(*(end.whole(x) for end, x in zip(ends, given, strict=True)))
            found = [x[ins[i].places] for i, x in zip(asked, whole, strict=True)]
        gradients = dict(zip(asked, found, strict=True))
        return tuple(gradients.get(i) for i in range(len(primals)))

    call.defvjp(ahead, back, symbolic_zeros=True)
    return call


def cut_like(fn: Run, ends: Sequence[End]) -> Run:
    """A function where entries of its arguments are gone.

    Args:
        fn: A function of arrays.
        ends: What is cut of its arguments.
    """
    from dagjax.compaction.removal.evaluate import CutEvaluation  # which calls this

    body = program_of(jax.make_jaxpr(fn)(*(shape_of(end.aval) for end in ends)))
    channels = Channels(body, len(body.invars), outputs=None)
    keeps = {v: end.kept for v, end in zip(body.invars, ends, strict=True)}
    removed, table = channels.removed(keeps), Table()
    given = [Fact(tuple(_slices(table, v) for v in end.values)) for end in ends]
    facts = Facts(channels, given, table)
    return CutEvaluation(channels, channels.kept(removed), facts)


def _slices(table: Table, values: Array | None) -> Array | None:
    """Constants; of all other slices nothing is known."""
    if values is None:
        return None
    return np.where(np.isnan(values), UNKNOWN, table.entries(values))


def _instantiated(x: Any) -> Any:
    """A cotangent that may be zero by its type."""
    if not isinstance(x, SymbolicZero):
        return x
    aval: Any = x.aval
    return _still(x) if aval.dtype == jax.dtypes.float0 else jnp.zeros_like(aval)


def _still(x: Any) -> Any:
    return np.zeros(jnp.shape(x), jax.dtypes.float0)
