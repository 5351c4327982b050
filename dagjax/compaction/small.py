"""A network that was cut: a pytree that evaluates like the DAG it came from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels import Channels, CompactionError
from dagjax.compaction.evaluate import (
    Evaluator,
    bind,
    bind_whole,
    contract,
    expanded,
    take,
)
from dagjax.compaction.known import Known
from dagjax.compaction.labels import Array
from dagjax.compaction.liveness import (
    known_of,
    met,
    needed,
    removable,
)
from dagjax.compaction.program import Body, Step, is_literal
from dagjax.compaction.source import Source, shape_of, source_of
from dagjax.graph.dag import count_params

Keeps = tuple[tuple[Array | None, ...], ...]  # leaf by leaf, axis by axis


class Cutting:
    """What was cut out of a network; compared by value.

    Args:
        tree: The structure of the network's leaves.
        shapes: Their shapes before the cut.
        inputs: The shapes of its inputs.
        keeps: Kept indices of each leaf's axes.
        facts: The constants that slices of the leaves were, NaN elsewhere.
        count: How many contractions had a constant folded into them.
        prunable: How many leaves are parameters.
        coupled: Whether kernels were cut only with the channels of their values.
    """

    def __init__(
        self,
        tree: Any,
        shapes: Any,
        inputs: Any,
        keeps: Keeps,
        facts: Any,
        count: int,
        prunable: int,
        coupled: bool,
    ):
        self.prunable, self.coupled = prunable, coupled
        self.tree, self.shapes, self.inputs = tree, tuple(shapes), inputs
        self.keeps, self.facts, self.count = keeps, facts, count
        self._plans: dict[Any, tuple[Source, Evaluator]] = {}
        self.key = (
            tree, tuple(map(str, self.shapes)), str(inputs), count, prunable, coupled,
            _digest(keeps), _digest(facts),
        )  # fmt: skip
        self._hash = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Cutting) and self.key == other.key)

    def __hash__(self) -> int:
        return self._hash

    def plan(self, inputs: tuple[Any, ...]) -> tuple[Source, Evaluator]:
        """The program at these shapes of the inputs, and how it is evaluated."""
        key = _form(inputs)
        if key not in self._plans:
            source = source_of(self.tree.unflatten(self.shapes), inputs)
            self._again(source)
        return self._plans[key]

    def _again(self, source: Source) -> None:
        """The same cut in the program of other shapes."""
        channels, ends = source.channels_of(self.coupled), source.body.invars
        known = known_of(channels, self.facts)
        steps, _ = needed(channels, known)
        removed, _ = removable(channels, known, steps, self.prunable)
        kept = channels.kept(removed)
        if not all(map(_same, map(kept, ends), self.keeps)):
            raise CompactionError(
                "the program has other channels at these shapes than where it was cut; "
                "compact the network again with inputs of these shapes"
            )
        folded = folds(channels, known, kept)
        if len(folded) != self.count:
            raise CompactionError(
                f"{len(folded)} constants are to be folded at these shapes, "
                f"{self.count} where the network was cut; compact it at these shapes"
            )
        self.remember(source, Evaluator(channels, kept, known, folded))

    def remember(self, source: Source, evaluator: Evaluator) -> None:
        """Keep the plan for the shapes of a program."""
        self._plans[_form(source.inputs)] = source, evaluator


def _form(inputs: Any) -> Any:
    """Structure, shapes and types of inputs, to be compared."""
    leaves, tree = jax.tree.flatten(inputs)
    return tree, tuple((x.shape, str(x.dtype)) for x in leaves)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "state"],
    meta_fields=["cutting"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Small:
    """A network whose pruned structure is gone; a pytree like a DAG.

    Args:
        cutting: What was cut, static.
        params: The smaller arrays, in the tree of the network's parameters.
        state: `{"user": what is not trained, "folded": constants added on the way}`.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.series(nn.Dense(8), nn.relu, nn.Dense(3))
        >>> dag = dj.init(jax.random.key(0), graph, jnp.ones((2, 4)))
        >>> mask = dj.prune_units(dag, "l2", density=0.5)
        >>> dj.compact(dag, mask).net
        Small(35 of 67 parameters)
    """

    cutting: Cutting
    params: Any
    state: Any

    def __call__(self, *xs: Any) -> Any:
        """The outputs at `xs`, any batch size."""
        shapes = jax.tree.map(shape_of, xs)
        source, evaluator = self.cutting.plan(shapes)
        leaves = jax.tree.leaves((self.params, self.state["user"]))
        self._check(leaves, source, evaluator)
        args = [*leaves, *map(jnp.asarray, jax.tree.leaves(xs))]
        made = evaluator(*args, added=self.state["folded"])
        return jax.tree.unflatten(source.result, made)

    def _check(self, leaves: list[Any], source: Source, evaluator: Evaluator) -> None:
        for place, (x, var) in enumerate(zip(leaves, source.body.invars, strict=False)):
            if np.shape(x) != evaluator.size(var) and np.size(x):  # empty: not read
                raise CompactionError(
                    f"leaf {place} of the parameters and the state has shape "
                    f"{list(np.shape(x))}, in this network {list(evaluator.size(var))};"
                    " index.gather brings a tree of the whole network here"
                )

    def replace(self, **changes: Any) -> Small:
        """A copy with other fields: `small.replace(params=params)`."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        before = sum(
            int(np.prod(s.shape))
            for s in self.cutting.shapes[: len(jax.tree.leaves(self.params))]
        )
        return f"Small({count_params(self.params):,} of {before:,} parameters)"


def _same(one: Any, two: Any) -> bool:
    """Whether the same indices are kept of all axes."""
    return all(
        a is b or (a is not None and b is not None and np.array_equal(a, b))
        for a, b in zip(one, two, strict=True)
    )


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


def _digest(arrays: Any) -> str:
    found = hashlib.blake2b(digest_size=16)
    for leaf in arrays:
        for axis in leaf:
            data = b"-" if axis is None else np.ascontiguousarray(axis).tobytes()
            found.update(b"|" + data)
        found.update(b"/")
    return found.hexdigest()
