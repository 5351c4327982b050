"""Where the point of a linearization lies on a kink: a warning that names the node."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.graph.calculus.freeze import kinks
from dagjax.graph.calculus.tangent import Tangent
from dagjax.graph.core.topology import Graph


class KinkWarning(UserWarning):
    """The point lies where two linear pieces of a function meet."""


def near_kink(
    f: Callable[[Tangent], Any], values: Tangent, tolerance: Any
) -> jax.Array:
    """Whether a difference of f's pieces is nearly 0 and has a slope: its sign turns.

    A tie whose sides agree, such as two equal zeros behind a rectifier, has none.
    """
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    direction = jax.tree.map(draw, values)
    differences = lambda z: [kink.difference for kink in kinks(f)(z)]
    pairs = zip(*jax.jvp(differences, (values,), (direction,)), strict=True)
    return jnp.any(
        jnp.array([False, *(_meets(d, slope, tolerance) for d, slope in pairs)])
    )


def _meets(difference: jax.Array, slope: jax.Array, tolerance: Any) -> jax.Array:
    """Near 0, relative to the largest one; stand-ins for infinity do not count."""
    size = jnp.abs(difference)
    real = size < jnp.finfo(size.dtype).max ** 0.5
    largest = jnp.max(jnp.where(real, size, jnp.zeros_like(size)), initial=0)
    return jnp.any(real & (size <= tolerance * largest) & (slope != 0))


def warn(graph: Graph, near: Mapping[str, Any], tolerance: float) -> None:
    """Name the nodes whose values lie near a kink of an arc."""
    for name in near:
        if near[name]:
            arc = graph.by_name[name]
            warnings.warn(
                f"the value of node {arc.source!r} lies within {tolerance:g} of a kink "
                f"of {arc!r}: the matrices are those of one of the linear pieces that "
                "meet there; move the point a little",
                KinkWarning,
                stacklevel=3,
            )
