"""Masks: trees of bool arrays shaped like what they mask; None is not prunable.

A mask may stop above a leaf: None there stands for the whole subtree. Masks are values,
they enter compiled functions as arguments and never cause a new compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import KeyPath

from dagjax.types import Mask, Params, PyTree

Path = KeyPath


def tree_map(
    fn: Callable[..., PyTree], mask: Mask, *trees: PyTree, hole: PyTree = None
) -> PyTree:
    """`fn(m, *leaves)` where the mask has an array, `hole` where it has None.

    Args:
        fn: Of a mask leaf and the matching leaves of the trees.
        mask: The tree that leads.
        *trees: Trees of the same structure, deeper where the mask is None.
        hole: What stands at None; a function of the subtrees there, or a value.
    """
    fill = hole if callable(hole) else lambda *_: hole
    pick = lambda m, *xs: fill(*xs) if m is None else fn(m, *xs)
    return jax.tree.map(pick, mask, *trees, is_leaf=lambda m: m is None)


def is_kernel(path: Path, leaf: jax.Array) -> bool:
    """Whether a leaf is a matrix or a convolution kernel: what papers prune."""
    del path
    return leaf.ndim >= 2


def full(
    params: Params, prunable: Callable[[Path, jax.Array], bool] = is_kernel
) -> Mask:
    """The mask that keeps everything.

    Args:
        params: Params tree of arrays.
        prunable: `(path, leaf) -> bool`; by default leaves with two or more axes.

    Returns:
        True where prunable, None elsewhere.

    Raises:
        ValueError: If nothing is prunable.

    Example:
        >>> import jax.numpy as jnp
        >>> mask = full({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
        >>> mask["bias"], density(mask).item()
        (None, 1.0)
    """
    make = lambda p, x: jnp.ones(x.shape, bool) if prunable(p, x) else None
    mask = jax.tree_util.tree_map_with_path(make, params)
    if not jax.tree.leaves(mask):
        leaves = jax.tree_util.tree_leaves_with_path(params)
        names = [jax.tree_util.keystr(path) for path, _ in leaves]
        raise ValueError(f"nothing is prunable among {', '.join(names) or 'no leaves'}")
    return mask


def apply(mask: Mask, params: Params) -> Params:
    """`params` with zeros where the mask is False, by `where`: NaN does not pass.

    Args:
        mask: A mask, or None for no mask at all.
        params: A tree of the mask's structure.

    Example:
        >>> import jax.numpy as jnp
        >>> print(apply(jnp.array([True, False]), jnp.array([1.0, jnp.nan])))
        [1. 0.]
    """
    for leaf in jax.tree.leaves(mask):
        if not jnp.issubdtype(jnp.result_type(leaf), bool):
            raise TypeError(
                f"a mask holds bools, got {jnp.result_type(leaf)}: apply(mask, params)"
            )
    keep = lambda m, x: jnp.where(m, x, jnp.zeros_like(x))
    return tree_map(keep, mask, params, hole=lambda x: x)


def kept(mask: Mask) -> Any:
    """The number of True entries, int32.

    Where there may be more than 2^31 of them: int64 of numpy, inside `jit` float32.
    """
    leaves = jax.tree.leaves(mask)
    if size(mask) < 2**31:
        counts = [jnp.sum(m, dtype=jnp.int32) for m in leaves]
        return sum(counts, start=jnp.zeros((), jnp.int32))
    if any(isinstance(m, Tracer) for m in leaves):
        wide = [jnp.sum(m, dtype=jnp.uint32) for m in leaves]
        return sum((n.astype(jnp.float32) for n in wide), start=jnp.float32(0))
    return np.int64(sum(np.count_nonzero(m) for m in leaves))


def size(mask: Mask) -> int:
    """The number of prunable entries."""
    return sum(m.size for m in jax.tree.leaves(mask))


def density(mask: Mask) -> Any:
    """The kept share of the prunable entries.

    Example:
        >>> import jax.numpy as jnp
        >>> density({"a": jnp.array([True, False]), "b": None}).item()
        0.5
    """
    return kept(mask) / float(size(mask))


def overlap(one: Mask, two: Mask) -> jax.Array:
    """How much two masks share: `|one and two| / |one or two|` (Jaccard index).

    Raises:
        ValueError: If one has None where the other has bools.

    Example:
        >>> import jax.numpy as jnp
        >>> overlap(jnp.array([True, True]), jnp.array([True, False])).item()
        0.5
    """
    if differ := _covered(one) ^ _covered(two):
        raise ValueError(
            f"masks of the same leaves were expected; only one of them has bools at "
            f"{', '.join(sorted(differ))}"
        )
    both = kept(tree_map(jnp.logical_and, one, two))
    either = kept(tree_map(jnp.logical_or, one, two))
    return jnp.where(either == 0, 1.0, both / jnp.maximum(either, 1))


def _covered(mask: Mask) -> set[str]:
    """The paths of the leaves that are masked."""
    paths = jax.tree_util.tree_leaves_with_path(mask)
    return {jax.tree_util.keystr(path) or "its root" for path, _ in paths}


def own_label(path: Path) -> Hashable:
    """Each leaf is a group of its own."""
    return jax.tree_util.keystr(path)


def shuffle(
    key: jax.Array, mask: Mask, label: Callable[[Path], Hashable] = own_label
) -> Mask:
    """A random mask with the same number of True entries in every group of leaves.

    Args:
        key: A typed key.
        mask: The mask.
        label: `path -> group`; by default each leaf is its own group.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mask = {"a": jnp.arange(100) < 20}
        >>> kept(shuffle(jax.random.key(0), mask)).item()
        20
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(mask)
    groups: dict[Hashable, list[int]] = {}
    for i, (path, _) in enumerate(leaves):
        groups.setdefault(label(path), []).append(i)
    new = [leaf for _, leaf in leaves]
    for number, members in enumerate(groups.values()):
        flat = jnp.concatenate([new[i].ravel() for i in members])
        flat = jax.random.permutation(jax.random.fold_in(key, number), flat)
        for i in members:
            shape, count = new[i].shape, new[i].size
            new[i], flat = flat[:count].reshape(shape), flat[count:]
    return jax.tree.unflatten(tree, new)
