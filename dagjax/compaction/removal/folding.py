"""What removed slices that hold constants add to the contractions that read them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.coupling import Channels
from dagjax.compaction.channels.labels import Array
from dagjax.compaction.channels.traced_network import Source
from dagjax.compaction.removal.evaluate import (
    bind,
    bind_whole,
    contract,
    expanded,
    take,
)
from dagjax.compaction.removal.facts import Known
from dagjax.compaction.removal.liveness import met, needed
from dagjax.jaxprs.program import Body, Step, is_literal


def folds(channels: Channels, known: Known, kept: Any) -> list[Step]:
    """The contractions to which removed slices add a constant, in order."""
    return [
        step
        for step in reversed(needed(channels, known)[0])
        if channels.is_outermost(step)
        and len(added(channels, known, kept, step))
        and not any(k is not None and not len(k) for k in kept(step.eqn.outvars[0]))
    ]


def added(channels: Channels, known: Known, kept: Any, step: Step) -> Array:
    """The removed indices of a contracted axis whose product is a constant."""
    wires, found = channels.wires.get(step), np.zeros(0, int)
    for pair in wires.contracted if wires else ():
        ends = [(step.eqn.invars[i], a) for i, a in pair]
        data = ends[channels.loose.get(step) == pair[0][0]]
        places = kept(data[0])[data[1]]
        if places is not None:
            zero, both = met(known, *(known.along(v, a) for v, a in ends))
            gone = np.ones(len(zero), bool)
            gone[places] = False
            found = np.flatnonzero(gone & both & ~zero)
    return found


def constants(
    source: Source, known: Known, kept: Any, leaves: Any, steps: list[Step]
) -> list[Any]:
    """What the removed slices add to contractions, from one evaluation in full.

    Args:
        source: The program.
        known: The facts of its values.
        kept: `value -> kept indices`.
        leaves: The masked leaves of the network.
        steps: The contractions.
    """
    if not steps:
        return []
    xs = [_anything(v) for v in source.body.invars[len(leaves) :]]
    wanted = {v for step in steps for v in step.reads}
    env = values_in(source.body, [*leaves, *xs])
    env = {v: env[v] for v in wanted}
    return [_constant(known.channels, known, kept, step, env) for step in steps]


def _constant(channels: Channels, known: Known, kept: Any, step: Step, env: Any) -> Any:
    places = added(channels, known, kept, step)
    one, two = channels.wires[step].contracted[0]
    values = []
    for operand, end in ((0, one[1]), (1, two[1])):
        atom = step.eqn.invars[operand]
        x = env[atom]
        for axis, held in enumerate(kept(atom)):
            if axis == end:
                x = take(x, places, axis)
            elif held is not None:
                x = take(x, held, axis)
        values.append(x)
    y = contract(step, values)
    loose = step in channels.loose
    return _thin(expanded(channels, kept, step, y) if loose else y)


def _thin(x: Any) -> Any:
    """Axes along which all slices are equal get size 1: a bias map is a vector then."""
    host = np.asarray(x)
    exact = not jnp.issubdtype(x.dtype, jnp.inexact)
    rtol = 0 if exact else 8 * float(jnp.finfo(x.dtype).eps)
    for axis in range(host.ndim):
        first = np.take(host, [0], axis)
        if host.shape[axis] > 1 and np.allclose(host, first, rtol=rtol, atol=0):
            host = first
    return jnp.asarray(host)


def _anything(var: Any) -> Any:
    """Data that no logarithm or quotient makes infinite: constants read none of it."""
    shape, dtype = var.aval.shape, var.aval.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.zeros(shape, dtype)
    return jax.device_put(np.random.default_rng(0).uniform(0.2, 0.8, shape)).astype(
        dtype
    )


def values_in(
    body: Body, args: list[Any], rules: Mapping[Step, Callable[..., Any]] | None = None
) -> dict[Any, Any]:
    """All values of the program in full.

    Args:
        body: The program.
        args: Its arguments.
        rules: `{step: function of what it reads}`, in place of its primitive.
    """
    rules = rules or {}
    env = {**dict(zip(body.invars, args, strict=True)), **body.consts}
    for step in body.steps:
        values = [a.val if is_literal(a) else env[a] for a in step.eqn.invars]
        if step.bodies:
            made = bind_whole(step.eqn, *values)
        else:
            run = rules.get(step, functools.partial(_bound, step))
            made = run(*values)
            made = made if step.eqn.primitive.multiple_results else [made]
        env |= dict(zip(step.eqn.outvars, made, strict=True))
    return env


def _bound(step: Step, *values: Any) -> Any:
    return bind(step.eqn, values)
