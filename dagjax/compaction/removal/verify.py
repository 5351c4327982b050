"""A compacted network held against the masked one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.mask_checks import named
from dagjax.compaction.channels.traced_network import TracedNetwork
from dagjax.compaction.removal.compacted import Small
from dagjax.compaction.removal.evaluate import CutEvaluation, take
from dagjax.compaction.removal.index import Index
from dagjax.compaction.removal.rounding import close, differing, runs_of, size
from dagjax.graph.core.network import Network
from dagjax.jaxprs.interpret import evaluate
from dagjax.jaxprs.program import Equation, program_of
from dagjax.types import Array, PyTree


def verify(
    net: Network, small: Small, index: Index, masked: list[Any], gradients: bool
) -> None:
    """Compare outputs at random inputs, and the gradients of what is left.

    Args:
        net: The network before.
        small: What is left of it.
        index: Between the parameters of the two.
        masked: The leaves of the network, masked.
        gradients: Whether gradients are compared too.

    Raises:
        CompactionError: If they differ; it names the first value that does.
    """
    source, evaluator = small.cutting.plan(small.cutting.inputs)
    xs = random_inputs(source)
    tree = jax.tree.structure(net)
    dense, ours = _outputs(tree.unflatten(masked), xs), _outputs(small, xs)
    inputs = [*masked, *jax.tree.leaves(xs)]
    if differing(dense, ours, lambda: runs_of(source.body, inputs)):
        raise CompactionError(_first(source, evaluator, small, masked, xs))
    if gradients:
        _gradients(tree, small, index, masked, xs)


@jax.jit
def _outputs(net: Network, xs: tuple[Any, ...]) -> list[Any]:
    """One program: operation by operation would compile four times as long."""
    return jax.tree.leaves(net(*xs))


def random_inputs(source: TracedNetwork) -> tuple[Any, ...]:
    """Inputs of the network's shapes: normal numbers, small whole ones, keys."""
    leaves, tree = jax.tree.flatten(source.inputs)
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))

    def draw(key: jax.Array, x: PyTree) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.split(key, x.shape) if x.shape else key
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jax.random.normal(key, x.shape, x.dtype)
        return jax.random.randint(key, x.shape, 0, 2).astype(x.dtype)

    return tree.unflatten([draw(k, x) for k, x in zip(keys, leaves, strict=False)])


def _first(
    source: TracedNetwork,
    evaluator: CutEvaluation,
    small: Small,
    masked: list[Any],
    xs: PyTree,
) -> str:
    """The first value that differs, in words."""
    inputs = jax.tree.leaves(xs)
    full = evaluate(source.body, [*masked, *inputs])
    held = jax.tree.leaves((small.params, small.state["user"]))
    left = evaluator.values(*held, *inputs, added=small.state["folded"])
    made = [(e, v) for e in source.body.equations for v in e.eqn.outvars if v in left]
    again = runs_of(source.body, [*masked, *inputs], [v for _, v in made])
    for (step, var), *runs in zip(made, *again, strict=True):
        part = functools.partial(_kept, places=evaluator.kept(var))
        x, y = part(full[var]), left[var]
        if _is_finite(y) and not _is_finite(x):
            steps = source.body.equations
            outs = lambda e: [full[v] for v in e.eqn.outvars]
            step = next(e for e in steps if not all(map(_is_finite, outs(e))))
            names = _masked_before(source, step, [*named(small.params)], masked)
            return (
                f"the masked network, with which the compacted one is compared, is "
                f"not finite from {step.name}{step.where} on: a norm of zeros in "
                f"{', '.join(names) or 'an input'}? Keep an entry there, or add an "
                "epsilon; verify=False returns the network as it is"
            )
        if not close(x, y, [*map(part, runs)]):
            return (
                f"the compacted network differs from the masked one first in "
                f"{step.name}{step.where}, of shape {list(x.shape)}: by "
                f"{_gap(x, y):.2g} relative. Please report this; "
                "verify=False returns the network as it is"
            )
    return "the outputs of the compacted network differ from those of the masked one"


def _masked_before(
    source: TracedNetwork, step: Equation, names: list[str], masked: list[Any]
) -> list[str]:
    """The nearest parameters with zeros that an equation depends on."""
    maker = {v: e for e in source.body.equations for v in e.eqn.outvars}
    leaves = dict(
        zip(source.body.invars, zip(names, masked, strict=False), strict=False)
    )
    zeros = lambda v: v in leaves and not np.asarray(leaves[v][1]).all()
    waiting, seen = [*step.reads], {*step.reads}
    while waiting and not any(map(zeros, waiting)):
        read = [v for w in waiting if w in maker for v in maker[w].reads]
        waiting = [v for v in dict.fromkeys(read) if v not in seen]
        seen |= {*waiting}
    return [leaves[v][0] for v in waiting if zeros(v)]


def _kept(x: Any, places: PyTree) -> Any:
    """The kept entries of a value."""
    for axis, kept in enumerate(places):
        x = x if kept is None else take(x, kept, axis)
    return x


def _is_finite(x: Array) -> bool:
    return not _moves(x) or bool(jnp.isfinite(x).all())


def _gap(one: Array, two: Array) -> float:
    return size(np.asarray(one) - np.asarray(two)) / max(size(one), 1e-30)


def _gradients(
    tree: Any, small: Small, index: Index, masked: list[Any], xs: Any
) -> None:
    """The gradient of a random projection of the outputs."""
    count = index.tree.num_leaves
    params, rest = masked[:count], masked[count:]
    weights = [
        jax.random.normal(jax.random.key(i), y.shape, y.dtype if _moves(y) else None)
        for i, y in enumerate(jax.tree.leaves(small(*xs)))
    ]

    def project(ys: Array) -> Any:
        pairs = zip(jax.tree.leaves(ys), weights, strict=True)
        return sum(jnp.vdot(w, y).real for y, w in pairs if _moves(y))

    # Inputs as arguments: XLA dies where it folds a whole number divided by zero.
    full = lambda p, rest, xs: project(tree.unflatten([*p, *rest])(*xs))
    left = lambda p, net, xs: project(net.replace(params=p)(*xs))
    grad = lambda fn: jax.grad(fn, allow_int=True)
    gathered = lambda leaves: _moving(index.gather(index.tree.unflatten(leaves)))

    def again() -> list[Any]:
        program = program_of(jax.make_jaxpr(grad(full))(params, rest, xs))
        runs = runs_of(program, [*masked, *jax.tree.leaves(xs)])
        return [[*gathered(run).values()] for run in runs]

    theirs = gathered(jax.jit(grad(full))(params, rest, xs))
    ours = _moving(jax.jit(grad(left))(small.params, small, xs))
    for i in differing([*theirs.values()], [*ours.values()], again):
        path, g = [*theirs.items()][i]
        raise CompactionError(
            f"the gradient of {path} differs from that in the masked network by "
            f"{_gap(g, ours[path]):.2g} relative"
        )


def _moving(tree: PyTree) -> dict[str, Any]:
    """The leaves that are no whole numbers, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): x for path, x in leaves if _moves(x)}


def _moves(y: Array) -> bool:
    return jnp.issubdtype(y.dtype, jnp.inexact)
