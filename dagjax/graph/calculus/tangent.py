"""States as tangents: what of them can be differentiated, and as vectors."""

from __future__ import annotations

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp

from dagjax.graph.core.levels import Values
from dagjax.types import Array, PyTree

Tangent = dict[str, PyTree]  # {node: value}, None where values are integers


def is_float(leaf: Array) -> bool:
    """Whether an array can be differentiated."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def floats(z: Values) -> Tangent:
    """What can be differentiated; None stands for integers."""
    return jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, z)


def is_float_at(values: Values, node: str) -> bool:
    """Whether a node holds something that can be differentiated."""
    return any(map(is_float, jax.tree.leaves(values[node])))


def filled(values: Values, z: Tangent) -> Values:
    """The values with those of some nodes replaced, where they are floats."""
    pick = lambda new, old: old if new is None else new
    old = {node: values[node] for node in z}
    new = jax.tree.map(pick, z, old, is_leaf=lambda leaf: leaf is None)
    return values | new


def flat(z: Any) -> jax.Array:
    """The vector of a node's value; empty for integers."""
    leaves = [leaf.reshape(-1) for leaf in jax.tree.leaves(z) if is_float(leaf)]
    return jnp.concatenate(leaves) if leaves else jnp.zeros(0)


def basis(z: Any) -> Any:
    """All unit vectors of a node's space along a new first axis."""
    vector, back = jax.flatten_util.ravel_pytree(z)
    return jax.vmap(back)(jnp.eye(vector.size, dtype=vector.dtype))
