"""Between a network and what is left of it: gather into the small, scatter back."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.labels import Array
from dagjax.graph.tracing.naming import path_of
from dagjax.types import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """Which entries of every parameter were kept.

    Args:
        tree: The structure of the parameters.
        shapes: Their shapes before the cut.
        keeps: For each parameter the kept indices of its axes, None for all.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.series(nn.Dense(8), nn.relu, nn.Dense(3))
        >>> dag = dj.init(jax.random.key(0), graph, jnp.ones((2, 4)))
        >>> net, index, _ = dj.compact(dag, dj.prune_units(dag, "l2", density=0.5))
        >>> again = index.gather(index.scatter(net.params))
        >>> bool(jnp.all(again["Dense"]["kernel"] == net.params["Dense"]["kernel"]))
        True
    """

    tree: PyTree
    shapes: tuple[tuple[int, ...], ...]
    keeps: tuple[tuple[Array | None, ...], ...]

    def gather(self, tree: Any) -> Any:
        """The kept entries of a tree shaped like the parameters.

        Trees inside, such as the moments of an optimizer state, are found by their
        structure; counts and other numbers pass.

        Args:
            tree: Weights, initial weights, gradients, masks, or an optimizer state.

        Raises:
            CompactionError: If an array belongs to no such tree, or has other shapes.
        """
        return self._each(tree, self.shapes, self._gathered)

    def scatter(self, tree: PyTree, fill: float = 0) -> PyTree:
        """The inverse: kept entries at their places, `fill` elsewhere."""
        small = tuple(
            tuple(n if k is None else len(k) for n, k in zip(shape, keep, strict=True))
            for shape, keep in zip(self.shapes, self.keeps, strict=True)
        )
        put = lambda leaves: self._scattered(leaves, fill)
        return self._each(tree, small, put)

    def _each(self, tree: PyTree, shapes: PyTree, change: Any) -> PyTree:
        """Change every part of the tree that is shaped like the parameters."""
        here = lambda t: self._leaves(t) is not None
        parts, above = jax.tree.flatten(tree, is_leaf=here)
        for part in parts:
            if not here(part):
                _check_passes(part)
        return above.unflatten([self._changed(p, shapes, change) for p in parts])

    def _changed(self, part: PyTree, shapes: PyTree, change: Any) -> PyTree:
        leaves = self._leaves(part)
        if leaves is None:
            return part
        wrong = [
            (np.shape(leaf), shape)
            for leaf, shape in zip(leaves, shapes, strict=True)
            if not _is_hole(leaf) and np.shape(leaf) != shape
        ]
        if not wrong:
            return self._filled(part, change(leaves))
        if all(np.size(x) <= 1 for x in jax.tree.leaves(leaves)):
            return part  # a number for every parameter
        got, expected = wrong[0]
        raise CompactionError(
            f"an array of shape {list(got)} where a parameter has {list(expected)}; "
            "gather takes trees shaped like the parameters (factored moments are not: "
            "init the optimizer with net.params)"
        )

    def _leaves(self, tree: PyTree) -> list[Any] | None:
        """What stands in the parameters' places, None if it is no such tree."""
        parts = _parts(tree, self._numbers)
        if parts is None:
            leaves = _by_path(tree, self._paths)
        else:
            leaves = [x for x, of in parts for _ in jax.tree.leaves(of)]
        if leaves is None:
            return None
        arrays = [_is_hole(leaf) or hasattr(leaf, "shape") for leaf in leaves]
        return leaves if all(arrays) else None

    def _filled(self, part: Any, leaves: list[Any]) -> Any:
        """A tree like the parameters, or one of other containers, with other leaves."""
        parts, form = _parts(part, self._numbers), jax.tree.structure(part)
        if parts is None:
            by_path = dict(zip(self._paths, leaves, strict=True))
            return form.unflatten([by_path[p] for p in _paths(part)])
        return form.unflatten([leaves[of] for x, of in parts if not _is_hole(x)])

    @functools.cached_property
    def _numbers(self) -> PyTree:
        return self.tree.unflatten(range(self.tree.num_leaves))

    @functools.cached_property
    def _paths(self) -> list[str]:
        return _paths(self._numbers)

    def _gathered(self, leaves: list[Any]) -> list[Any]:
        return [
            leaf if _is_hole(leaf) else gather(leaf, keep)
            for leaf, keep in zip(leaves, self.keeps, strict=True)
        ]

    def _scattered(self, leaves: list[Any], fill: float) -> list[Any]:
        return [
            leaf if _is_hole(leaf) else scatter(leaf, keep, shape, fill)
            for leaf, keep, shape in zip(leaves, self.keeps, self.shapes, strict=True)
        ]


def _paths(tree: PyTree) -> list[str]:
    return [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _parts(tree: PyTree, numbers: PyTree) -> list[tuple[Any, Any]] | None:
    """Leaves and holes of a tree like the parameters, with the numbers of their leaves.

    A hole may stand for a whole subtree: `optax.multi_transform` with one label for it.
    """
    leaves, form = jax.tree.flatten(tree, is_leaf=_is_hole)
    try:
        places = form.flatten_up_to(numbers)
    except (ValueError, TypeError, KeyError):
        return None
    parts = [*zip(leaves, places, strict=True)]
    return parts if all(_is_hole(x) or isinstance(of, int) for x, of in parts) else None


def _by_path(tree: PyTree, paths: list[str]) -> list[Any] | None:
    """The leaves of a tree of other containers, as `nnx.Optimizer` keeps moments in."""
    if not any(set(path) - set("0123456789/") for path in paths):
        return None  # numbers name nothing: a chain of states would look like a list
    found = dict(zip(_paths(tree), jax.tree.leaves(tree), strict=True))
    return [found[path] for path in paths] if {*found} == {*paths} else None


def _check_passes(part: Any) -> None:
    """Whether something that is no tree of parameters means the same after a cut."""
    if not isinstance(part, (bool, int, float, complex)) and not hasattr(part, "shape"):
        raise CompactionError(
            f"a {type(part).__name__} is no array; gather takes trees shaped like the "
            "parameters and optimizer states (tx.init(params), not tx)"
        )
    if np.size(part) > 1 and jnp.issubdtype(jnp.result_type(part), jnp.inexact):
        raise CompactionError(
            f"an array of shape {list(np.shape(part))} lies in no tree shaped like the "
            "parameters, so it is not known what it is after the cut; init the "
            "optimizer with the small network's params"
        )


def _is_hole(leaf: Array) -> bool:
    """Nothing in a parameter's place: None, or what `optax.masked` puts there."""
    return not jax.tree.leaves(leaf)


def gather(x: Any, keep: tuple[Array | None, ...]) -> Any:
    """The kept entries of one array; of arrays on the host without compiling."""
    if all(k is None for k in keep):
        return x
    if isinstance(x, jax.core.Tracer):
        for axis, places in enumerate(keep):
            x = x if places is None else jnp.take(x, places, axis=axis)
        return x
    return jax.device_put(gather_host(x, keep))  # compiles nothing


def gather_host(x: Any, keep: tuple[Array | None, ...]) -> Array:
    """The kept entries, on the host."""
    x = np.asarray(x)
    for axis, places in enumerate(keep):  # four times as fast as one index of them all
        x = x if places is None else np.take(x, places, axis=axis)
    return x


def scatter(x: Array, keep: Any, shape: tuple[int, ...], fill: float) -> Any:
    """Entries at their places in an array of the old shape, as `gather` takes them."""
    if all(k is None for k in keep):
        return x
    rows = zip(shape, keep, strict=True)
    places = np.ix_(*(np.arange(n) if k is None else k for n, k in rows))
    if isinstance(x, jax.core.Tracer):
        return jnp.full(shape, fill, x.dtype).at[places].set(x)
    full = np.full(shape, fill, x.dtype)
    full[places] = x
    return jax.device_put(full)
