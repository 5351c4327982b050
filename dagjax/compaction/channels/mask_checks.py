"""Trees like the parameters, leaf by leaf, and what is said where one is not."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import numpy as np

from dagjax.compaction.channels.coupling import CompactionError
from dagjax.graph.core.network import Network
from dagjax.graph.tracing.naming import path_of
from dagjax.sparsity import masks
from dagjax.types import Params, PyTree


def leaves_like(tree: PyTree, params: Params, what: str) -> list[PyTree]:
    """The leaves of a tree for each of the parameters, None where it has None.

    Args:
        tree: It may stop above a leaf, at a None.
        params: The parameters of a network.
        what: What it is, for a message: "a mask".

    Raises:
        CompactionError: If the trees differ, or values are not known yet (in `jit`).
    """
    try:
        whole = masks.tree_map(lambda x, _: x, tree, params, hole=_holes)
        leaves = jax.tree.structure(params).flatten_up_to(whole)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if (found := _by_name(tree, params)) is None:
            raise CompactionError(
                f"{what} is a tree like net.params, which holds "
                f"{_few([*named(params)])}; got {_form(tree)}"
            ) from error
        leaves = found
    for leaf, (name, x) in zip(leaves, named(params).items(), strict=True):
        if isinstance(leaf, jax.core.Tracer) or isinstance(x, jax.core.Tracer):
            raise CompactionError(
                f"the values of {name} are not known inside jit, grad or vmap, and "
                "shapes depend on them: prune and compact outside, and call the "
                "result inside"
            )
    return leaves


def _by_name(tree: PyTree, params: Params) -> list[Any] | None:
    """The leaves of a tree of other containers (dict, FrozenDict, nnx.State), by path.

    None where the paths are not the same.
    """
    rows = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    given, names = {path_of(path): leaf for path, leaf in rows}, [*named(params)]
    holes = tuple(f"{path}/" for path, leaf in given.items() if leaf is None)
    left = {*given} - {*names} - {path[:-1] for path in holes}
    missing = [n for n in names if n not in given and not n.startswith(holes)]
    return None if left or missing or not given else [given.get(n) for n in names]


def named(params: Params) -> dict[str, Any]:
    """`{path: leaf}`; a path that another leaf has gets a number."""
    found: dict[str, PyTree] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, number = path_of(path), 2
        while name in found:
            name, number = f"{path_of(path)}#{number}", number + 1
        found[name] = leaf
    return found


def network(net: Network) -> Network:
    """The network.

    Raises:
        CompactionError: If it is none.
    """
    if not isinstance(net, Network):
        raise no_network(net)
    return net


def with_values(net: Network) -> Network:
    """The network, whose parameters are arrays and not shapes alone.

    Raises:
        CompactionError: If one has no values, as under `jax.eval_shape`.
    """
    for name, x in named(network(net).params).items():
        if isinstance(x, jax.ShapeDtypeStruct):
            raise CompactionError(
                f"{name} has a shape and no values: give the network its parameters "
                "(net.replace(params=...)); units, costs and tables need none"
            )
    return net


def no_network(net: Network) -> CompactionError:
    """What is said of anything else."""
    return CompactionError(
        f"a network was expected, got {type(net).__name__}: give a DAG (dj.init, "
        "dj.trace, dj.from_nnx, dj.from_linen) or a compacted one"
    )


def _holes(tree: PyTree) -> Any:
    return jax.tree.map(lambda _: None, tree)


def _form(tree: PyTree) -> str:
    """What a tree holds, in few words."""
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    if not paths or not paths[0][0]:
        return f"{type(tree).__name__} {np.shape(tree) if paths else tree!r}"
    return _few([path_of(path) for path, _ in paths])


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" * (len(names) > 4))
