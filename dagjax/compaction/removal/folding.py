"""What removed slices that hold constants add to the contractions that read them."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.coupling import Channels
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.wires import End
from dagjax.compaction.removal.consumption import may_fold, met, needed
from dagjax.compaction.removal.evaluate import Kept, contract, expanded, present, take
from dagjax.compaction.removal.propagation import Facts
from dagjax.jaxprs.interpret import evaluate
from dagjax.jaxprs.program import Equation, Program, backward_slice, is_literal
from dagjax.jaxprs.versions import Atom


def folds(channels: Channels, facts: Facts, kept: Kept) -> list[Equation]:
    """The contractions to which removed slices add a constant, in order."""
    wanted = {*needed(channels, facts)}
    return [
        equation
        for equation in channels.body.equations
        if equation in wanted
        and len(added(channels, facts, kept, equation)[1])
        and not any(k is not None and not len(k) for k in kept(equation.eqn.outvars[0]))
    ]


def added(
    channels: Channels, facts: Facts, kept: Kept, equation: Equation
) -> tuple[tuple[End, ...], Array]:
    """A contracted pair of axes, and its removed indices whose product is a constant.

    There is one such pair at most: the other ones lose nothing (`may_fold`).
    """
    wires = channels.wires.get(equation)
    for pair in wires.contracted if wires else ():
        ends = [(equation.eqn.invars[i], a) for i, a in pair]
        data = ends[channels.untied.get(equation) == pair[0][0]]
        places = None if is_literal(data[0]) else kept(data[0])[data[1]]
        if places is not None and may_fold(channels, equation, pair):
            _, fixed = met(facts, *(facts.along(v, a) for v, a in ends))
            fixed[places] = False
            if fixed.any():
                return pair, np.flatnonzero(fixed)
    return (), np.zeros(0, int)


class Recipe:
    """How the constants of some contractions are computed, from as little as possible.

    The backward slice of the contractions ends at leaves, and at values of which the
    facts say all that is used: they are filled with the numbers that are known, and
    with anything elsewhere. No loop is run, since what leaves a loop is known by
    numbers or not at all.

    Args:
        channels: The program.
        facts: The facts of its values.
        kept: `value -> kept indices`.
        leaves: How many of its arguments are leaves of the network.
    """

    def __init__(self, channels: Channels, facts: Facts, kept: Kept, leaves: int):
        self.channels, self.facts, self.kept = channels, facts, kept
        self.folds = folds(channels, facts, kept)
        body, ends = channels.body, [v for e in self.folds for v in e.reads]
        self.given = {*body.invars[:leaves], *body.consts}
        stops = {v for v in facts.of if v not in self.given and _says_all(facts, v)}
        self.equations = backward_slice(body.equations, ends, stops)
        computed = {v for e in self.equations for v in e.eqn.outvars}
        reads = itertools.chain(*(e.reads for e in self.equations), ends)
        self.inputs = [v for v in dict.fromkeys(reads) if v not in computed]

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """The constants, in one compiled program.

        Args:
            leaves: The masked leaves of the network.
        """
        body = self.channels.body
        given = dict(zip(body.invars, leaves, strict=False)) | body.consts
        fill = lambda v: given[v] if v in self.given else _filled(self.facts, v)
        values = [fill(v) for v in self.inputs]
        return [*map(_thin, jax.jit(self._compute)(values))] if self.folds else []

    def _compute(self, values: list[Any]) -> list[Any]:
        equations, inputs = tuple(self.equations), tuple(self.inputs)
        program = Program(equations, inputs, (), {}, self.channels.body.jaxpr)
        env = evaluate(program, values)
        return [
            _constant(self.channels, self.facts, self.kept, equation, env)
            for equation in self.folds
        ]

    @functools.cached_property
    def digest(self) -> str:
        """Equal where the same numbers are computed in the same way, at any shapes."""
        number = lambda x: np.asarray(x).tolist()
        lines: list[Any] = [len(self.folds)]
        for e in self.equations:
            size = e.eqn.params["shape"] if e.name == "iota" else ()
            literals = [number(a.val) for a in e.eqn.invars if is_literal(a)]
            lines.append((e.name, size, literals))
        for v in self.inputs:
            if v in self.channels.body.consts:
                lines.append(number(self.channels.body.consts[v]))
            elif v not in self.given:
                lines.append(_numbers_in(self.facts, v))
        return hashlib.blake2b(repr(lines).encode(), digest_size=16).hexdigest()


def _constant(
    channels: Channels, facts: Facts, kept: Kept, equation: Equation, env: Any
) -> Any:
    """`sum over removed k of left[..., k] right[k, ...]`, at the kept entries.

    Along other contracted axes an untied kernel may keep less than what it meets.
    """
    pair, places = added(channels, facts, kept, equation)
    atoms = equation.eqn.invars
    along = {
        (i, axis): present(kept, atom, axis)
        for i, atom in enumerate(atoms)
        if not is_literal(atom)
        for axis in range(atom.aval.ndim)
    }
    for one, two in channels.wires[equation].contracted:
        both = np.intersect1d(along[one], along[two])
        along[one] = along[two] = places if (one, two) == pair else both
    values = [atom.val if is_literal(atom) else env[atom] for atom in atoms]
    for (i, axis), indices in along.items():
        values[i] = take(values[i], indices, axis)
    y = contract(equation, values)
    untied = equation in channels.untied
    return expanded(channels, kept, equation, y) if untied else y


def _says_all(facts: Facts, var: Atom) -> bool:
    """Whether numbers are all that is known of the slices of a value."""
    table, known = facts.table, _all_facts(facts, var)
    return bool((table.is_number(known) | ~table.is_fixed(known)).all())


def _numbers_in(facts: Facts, var: Atom) -> list[float]:
    """The numbers that slices of a value are."""
    known = facts.table.values(np.unique(_all_facts(facts, var)))
    return np.unique(known[~np.isnan(known)]).tolist()


def _all_facts(facts: Facts, var: Atom) -> Array:
    """The facts of a value, of all its slices and of the whole."""
    axes, whole = facts.of[var]
    return np.concatenate([[whole], *(a for a in axes if a is not None)]).astype(int)


def _filled(facts: Facts, var: Atom) -> Any:
    """A value with the numbers that its slices are, and anything elsewhere."""
    x, table = _anything(var), facts.table
    if jnp.issubdtype(var.aval.dtype, jax.dtypes.prng_key):
        return x
    x = np.array(x)
    for axis, slices in enumerate(facts.of[var].axes):
        if slices is None:
            continue
        for i in np.flatnonzero(table.is_number(slices)):
            x[(slice(None),) * axis + (i,)] = table.values(slices[i])
    whole = facts.of[var].whole
    if table.is_number(whole):
        x[...] = table.values(whole)
    return jnp.asarray(x)


def _anything(var: Atom) -> Any:
    """Data that no logarithm or quotient makes infinite: constants read none of it."""
    shape, dtype = var.aval.shape, var.aval.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), shape)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return np.zeros(shape, dtype)
    return np.random.default_rng(0).uniform(0.2, 0.8, shape).astype(dtype)


def _thin(x: Array) -> jax.Array:
    """Axes along which all slices are equal get size 1: a bias map is a vector then."""
    host = np.asarray(x)
    exact = not jnp.issubdtype(x.dtype, jnp.inexact)
    rtol = 0 if exact else 8 * float(jnp.finfo(x.dtype).eps)
    for axis in range(host.ndim):
        first = np.take(host, [0], axis)
        if host.shape[axis] > 1 and np.allclose(host, first, rtol=rtol, atol=0):
            host = first
    return jnp.asarray(host)
