"""The two sides of a product as matrices: rows of features, columns of a kernel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.labels import Array
from dagjax.jaxprs.versions import Eqn
from dagjax.types import PyTree


def layout(eqn: Eqn, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which axes of a product are rows of features, which are columns."""
    numbers, rank = eqn.params["dimension_numbers"], len(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "conv_general_dilated":
        batch, features, *space = numbers.out_spec
        return (batch, *space), (features,)
    own, other = eqn.invars[side].aval.shape, eqn.invars[1 - side].aval.shape
    batch, _, free = axes_of(eqn, side, len(own))
    first = len(batch) + (len(free) if side == 0 else 0)
    last = first + len(axes_of(eqn, 1 - side, len(other))[2])
    return tuple(range(first, last)), (*range(first), *range(last, rank))


def as_kernel(eqn: Eqn, side: int, kernel: Array) -> Array:
    """A kernel as `[G, K, M]`."""
    if eqn.primitive.name == "dot_general":
        batch, summed, free = axes_of(eqn, side, kernel.ndim)
        groups, outs = (size(kernel, axes) for axes in (batch, free))
        return kernel.transpose(batch + summed + free).reshape(groups, -1, outs)
    out, inner, *window = eqn.params["dimension_numbers"].rhs_spec
    groups = eqn.params["feature_group_count"]
    moved = kernel.transpose(*window, inner, out)
    moved = moved.reshape(-1, groups, kernel.shape[out] // groups)
    return moved.transpose(1, 0, 2)


def size(x: Array, axes: Iterable[int]) -> int:
    """The number of entries along some axes."""
    return math.prod(x.shape[d] for d in axes)


def axes_of(eqn: Eqn, side: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Of an operand of a product: batch axes, contracted axes, free axes."""
    contracted, batch = (tuple(axes[side]) for axes in eqn.params["dimension_numbers"])
    taken = {*contracted, *batch}
    return batch, contracted, tuple(d for d in range(rank) if d not in taken)


def features(eqn: Eqn, side: int, x: Array, every: int = 1) -> Array:
    """`[R, G, K]`: what a product is linear in; of its rows every n-th."""
    if eqn.primitive.name == "dot_general":
        batch, summed, free = axes_of(eqn, 1 - side, x.ndim)
        moved = x.transpose(free + batch + summed)
        return moved.reshape([size(x, axes) for axes in (free, batch, summed)])[::every]
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    batch, features, *space = numbers.lhs_spec
    x = _padded(x.transpose(batch, *space, features), p["padding"], p["lhs_dilation"])
    window = [eqn.invars[1].aval.shape[d] for d in numbers.rhs_spec[2:]]
    sizes = [eqn.outvars[0].aval.shape[d] for d in numbers.out_spec[2:]]
    parts = []
    for place in np.ndindex(*window):
        axes = zip(place, p["rhs_dilation"], p["window_strides"], sizes, strict=True)
        spots = [slice(i * d, i * d + (n - 1) * s + 1, s) for i, d, s, n in axes]
        parts.append(x[(slice(None), *spots)].reshape(-1, x.shape[-1])[::every])
    groups = p["feature_group_count"]
    many = namespace(x).stack(parts, -2)
    many = many.reshape(-1, len(parts), groups, x.shape[-1] // groups)
    return many.transpose(0, 2, 1, 3).reshape(len(many), groups, -1)


def _padded(
    x: Array, padding: Sequence[tuple[int, int]], dilation: Sequence[int]
) -> Array:
    """`[B, ..., C]` with its border, and zeros between entries."""
    edges = [(*ends, d - 1) for ends, d in zip(padding, dilation, strict=True)]
    if not any(n for edge in edges for n in edge):
        return x
    wide = jax.lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    return local(wide) if isinstance(x, np.ndarray) else wide


def local(x: PyTree) -> Array:
    """On the CPU an array of numpy, without a copy: nothing is compiled then."""
    return np.asarray(x) if jax.default_backend() == "cpu" else x


def namespace(x: Array) -> Any:
    """The module of an array's functions."""
    return np if isinstance(x, np.ndarray) else jnp
