"""A compacted network held against the masked one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.traced_network import Source
from dagjax.compaction.removal.compacted import Small
from dagjax.compaction.removal.evaluate import CutEvaluation, take
from dagjax.compaction.removal.index import Index
from dagjax.jaxprs.interpret import evaluate
from dagjax.jaxprs.program import is_literal

_TOLERANCE = {"float64": 1e-10, "float32": 1e-4}  # of the largest value; others 2e-2


def verify(
    net: Any, small: Small, index: Index, masked: list[Any], gradients: bool
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
    if not all(map(close, dense, ours)):
        raise CompactionError(_first(source, evaluator, small, masked, xs))
    if gradients:
        _gradients(tree, small, index, masked, xs)


@jax.jit
def _outputs(net: Any, xs: tuple[Any, ...]) -> list[Any]:
    """One program: operation by operation would compile four times as long."""
    return jax.tree.leaves(net(*xs))


def random_inputs(source: Source) -> tuple[Any, ...]:
    """Inputs of the network's shapes: normal numbers, small whole ones, keys."""
    leaves, tree = jax.tree.flatten(source.inputs)
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))

    def draw(key: jax.Array, x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return key
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jax.random.normal(key, x.shape, x.dtype)
        return jax.random.randint(key, x.shape, 0, 2).astype(x.dtype)

    return tree.unflatten([draw(k, x) for k, x in zip(keys, leaves, strict=False)])


def close(one: Any, two: Any) -> bool:
    """Whether two outputs are equal up to rounding."""
    one, two = np.asarray(one), np.asarray(two)
    if one.shape != two.shape:
        return False
    if one.dtype.kind in "biu":
        return bool((one == two).all())
    tolerance = _TOLERANCE.get(str(one.dtype), 2e-2)
    one, two = one.astype(np.float64), two.astype(np.float64)
    same = np.isclose(one, two, rtol=0, atol=tolerance * _size(one), equal_nan=True)
    return bool(same.all())


def _size(x: np.ndarray) -> float:
    finite = np.abs(x[np.isfinite(x)])
    return float(finite.max()) if finite.size else 0.0


def _first(
    source: Source, evaluator: CutEvaluation, small: Small, masked: list[Any], xs: Any
) -> str:
    """The first value that differs, in words."""
    inputs = jax.tree.leaves(xs)
    full = evaluate(source.body, [*masked, *inputs])
    held = jax.tree.leaves((small.params, small.state["user"]))
    left = evaluator.values(*held, *inputs, added=small.state["folded"])
    for step in source.body.equations:
        for var in step.eqn.outvars:
            if var not in left or is_literal(var):
                continue
            x = full[var]
            for axis, places in enumerate(evaluator.kept(var)):
                x = x if places is None else take(x, places, axis)
            if _is_finite(left[var]) and not _is_finite(x):
                return (
                    f"the masked network, with which the compacted one is compared, is "
                    f"not finite from {step.name}{step.where} on (a norm of zeros?); "
                    "verify=False returns the network as it is"
                )
            if not close(x, left[var]):
                return (
                    f"the compacted network differs from the masked one first in "
                    f"{step.name}{step.where}, of shape {list(x.shape)}: by "
                    f"{_gap(x, left[var]):.2g} relative. Please report this; "
                    "verify=False returns the network as it is"
                )
    return "the outputs of the compacted network differ from those of the masked one"


def _is_finite(x: Any) -> bool:
    return not _moves(x) or bool(jnp.isfinite(x).all())


def _gap(one: Any, two: Any) -> float:
    one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
    return float(np.abs(one - two).max() / max(_size(one), 1e-30))


def _gradients(
    tree: Any, small: Small, index: Index, masked: list[Any], xs: Any
) -> None:
    """The gradient of a random projection of the outputs."""
    count = index.tree.num_leaves
    params, rest = masked[:count], masked[count:]
    weights = [
        jax.random.normal(jax.random.key(i), y.shape)
        for i, y in enumerate(jax.tree.leaves(small(*xs)))
    ]

    def project(ys: Any) -> Any:
        pairs = zip(jax.tree.leaves(ys), weights, strict=True)
        return sum(jnp.vdot(y, w.astype(y.dtype)) for y, w in pairs if _moves(y))

    full = lambda p, rest: project(tree.unflatten([*p, *rest])(*xs))
    left = lambda p, net: project(net.replace(params=p)(*xs))
    grad = lambda fn: jax.jit(jax.grad(fn, allow_int=True))
    dense, ours = grad(full)(params, rest), grad(left)(small.params, small)
    theirs = index.gather(index.tree.unflatten(dense))
    named = jax.tree_util.tree_leaves_with_path(ours)
    rows = zip(named, jax.tree.leaves(theirs), strict=True)
    pairs = [(path, g, h) for (path, g), h in rows if _moves(g)]
    scale = max((_size(np.asarray(g)) for _, g, _ in pairs if g.size), default=0.0)
    for path, g, h in pairs:
        gap = float(np.abs(np.asarray(g) - np.asarray(h)).max()) if g.size else 0.0
        if gap > 1e-3 * scale:
            raise CompactionError(
                f"the gradient of {jax.tree_util.keystr(path)} differs from that in "
                f"the masked network by {gap:.2g} (the largest is {scale:.2g})"
            )


def _moves(y: Any) -> bool:
    return jnp.issubdtype(y.dtype, jnp.floating)
