"""Units: slices along an axis, shared by the leaves of one layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath

from dagjax.types import Array, PyTree


def gather(tree: PyTree, axis: int, reduce: Callable[..., jax.Array]) -> dict[str, Any]:
    """`{layer: [units]}`: reduce every leaf to its units, and the leaves of a layer.

    Leaves of one parent that have the same size along the axis belong together;
    `reduce` takes an `axis`, as `jnp.sum` and `jnp.any` do.

    >>> import jax.numpy as jnp
    >>> layer = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    >>> dict(gather({"fc": layer}, -1, jnp.sum))
    {"['fc']:2": Array([4., 4.], dtype=float32)}
    """
    layers: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        others = tuple(i for i in range(leaf.ndim) if i != axis % leaf.ndim)
        parts = layers.setdefault(_layer(path, leaf, axis), [])
        parts.append(reduce(leaf, axis=others))
    joined = {k: reduce(jnp.stack(v), axis=0) for k, v in layers.items()}
    return OrderedDict((k, v.astype(layers[k][0].dtype)) for k, v in joined.items())


def spread(units: dict[str, jax.Array], tree: PyTree, axis: int) -> PyTree:
    """The inverse of `gather`: the leaves of a tree get the values of their units."""

    def one(path: KeyPath, leaf: Array) -> jax.Array:
        shape = [1] * leaf.ndim
        shape[axis] = -1
        values = units[_layer(path, leaf, axis)]
        return jnp.broadcast_to(values.reshape(shape), leaf.shape)

    return jax.tree_util.tree_map_with_path(one, tree)


def _layer(path: KeyPath, leaf: Array, axis: int) -> str:
    if not -leaf.ndim <= axis < leaf.ndim:
        name = jax.tree_util.keystr(path)
        raise ValueError(f"{name} of shape {leaf.shape} has no units along axis {axis}")
    return f"{jax.tree_util.keystr(path[:-1])}:{leaf.shape[axis]}"
