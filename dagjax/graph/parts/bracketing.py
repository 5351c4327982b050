"""The two bracketings of the array product: transfer functions and sums over paths.

An array of functions is multiplied by `(A B)_vw = sum_u A_vu o B_uw`. Nested from the
right, `L_n (L_{n-1} (... L_1))`, its entries are the functions of sub-architectures;
from the left it is the sum over all paths of the composed arcs, as if each path were a
network of its own (an array holds the sum of parallel arcs in one entry; with a node
in the middle of each they stand apart). The two agree where no nonlinearity reads a
sum. An independent reconstruction from the abstract of arXiv:2306.09707.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dagjax.graph.core.dag import DAG
from dagjax.graph.core.levels import Values, apply_levels, sweep, zeros
from dagjax.graph.core.topology import Arc, Graph, GraphError, ancestors
from dagjax.types import Array, PyTree

_PATHS = 2**16


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["dag"],
    meta_fields=["source", "target"],
)
@dataclasses.dataclass(frozen=True)
class Transfer:
    """`y -> T(y at the source, 0 elsewhere)` at the target; a pytree."""

    dag: DAG
    source: str
    target: str

    def __call__(self, y: Array) -> jax.Array:
        """The value at the target; `y` is shaped like that of the source."""
        graph = self.dag.graph
        _check_value(self.dag, self.source, y)
        z = zeros(graph, _batch(y)) | {self.source: y}
        z, _ = apply_levels(graph, self.dag.params, self.dag.state, z)
        return self.dag.read(self.target, z[self.target])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["dag"],
    meta_fields=["source", "target", "apart"],
)
@dataclasses.dataclass(frozen=True)
class PathSum:
    """`y -> sum over paths of the composed arcs` at the target; a pytree."""

    dag: DAG
    source: str
    target: str
    apart: bool = True

    def __call__(self, y: Array) -> jax.Array:
        """The sum over all paths from the source, of `y`, and the constant node."""
        _check_value(self.dag, self.source, y)
        graph, nothing = self.dag.graph, zeros(self.dag.graph, _batch(y))
        stacks: dict[str, list[PyTree]] = {node: [] for node in graph.nodes}
        stacks[self.source].append(jax.tree.map(lambda leaf: leaf[None], y))
        needed = ancestors(graph, [self.target])
        for row, steps in _steps(graph, needed, self.apart).items():
            constant = nothing[row]
            for column, arcs in steps:
                step = functools.partial(self._step, arcs, row, column, nothing)
                bare = step(nothing[column])
                constant = jax.tree.map(jnp.add, constant, bare)
                if not stacks[column]:
                    continue
                moved = jax.vmap(step)(_joined(stacks[column]))
                stacks[row].append(jax.tree.map(lambda y, c: y - c[None], moved, bare))
            stacks[row].append(jax.tree.map(lambda leaf: leaf[None], constant))
        paths = stacks[self.target] or [
            jax.tree.map(lambda v: v[None], nothing[self.target])
        ]
        total = jax.tree.map(lambda leaf: leaf.sum(0), _joined(paths))
        return self.dag.read(self.target, total)

    def _step(
        self, arcs: list[Arc], row: str, column: str, nothing: Values, value: PyTree
    ) -> Any:
        """What the arcs from one node deliver at another one."""
        z, onto = nothing | {column: value}, {row: nothing[row]}
        dag = self.dag
        return sweep(dag.graph, arcs, dag.params, dag.state, z, onto=onto)[0][row]


def transfer(dag: DAG, source: str, target: str) -> Transfer:
    """The function of the sub-architecture from one node to another.

    `P(y) = T(y at source, 0 elsewhere)_target`: the entry of the product of the
    factors nested from the right. Biases act as if a constant node carried them, so
    from the input it is the network.

    Args:
        dag: The network.
        source: Where `y` is injected.
        target: Where the value is read.

    Returns:
        A function of `y`, a pytree.

    Raises:
        GraphError: If there is no such node.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> x = jnp.ones((2, 3))
        >>> graph = dj.series(dj.residual(nn.Dense(3)), nn.relu)
        >>> dag = dj.init(jax.random.key(0), graph, x)
        >>> bool((dj.transfer(dag, "in", "out")(x) == dag(x)).all())
        True
    """
    dag.graph.check_nodes(source, target)
    return Transfer(dag, source, target)


def path_sum(dag: DAG, source: str, target: str, *, apart: bool = True) -> PathSum:
    """The sum over all paths from one node to another of the composed arcs.

    `Q(y) = sum over paths of f_k o ... o f_1`, the entry of the product of the factors
    nested from the left: the network seen as an ensemble of its paths (Veit et al.
    2016). Arcs are taken without their constants, `f(h) - f(0)`, and a constant node
    has an arc to each node that carries the `f(0)`, so that biases are counted once for
    each path that they take.

    Args:
        dag: The network.
        source: Where paths begin, beside the constant node.
        target: Where they end.
        apart: Whether parallel arcs are steps of their own, as `dj.count_paths` counts
            them; False: they are summed in one entry, as in the product of arrays.

    Returns:
        A function of `y`, a pytree. All paths are evaluated, stacked along one axis.

    Raises:
        GraphError: If there is no such node, a merge other than a concatenation is
            passed through, or there are more than 65,536 paths.

    Example:
        >>> import dagjax as dj, jax, jax.numpy as jnp
        >>> graph = dj.series(dj.parallel(dj.identity, jnp.negative), jax.nn.relu)
        >>> x = jnp.full((1, 1), 2.0)
        >>> dag = dj.init(jax.random.key(0), graph, x)
        >>> print(dj.transfer(dag, "in", "out")(x), dj.path_sum(dag, "in", "out")(x))
        [[0.]] [[2.]]
    """
    dag.graph.check_nodes(source, target)
    graph, passed = dag.graph, ancestors(dag.graph, [target]) - {target}
    for node in passed & {*graph.merge_of}:
        if not getattr(graph.merge_of[node], "additive", False):
            raise GraphError(
                f"a path to {target!r} passes through {node!r}, a "
                f"{graph.merge_of[node]!r} of several values: it is no sum over paths; "
                "dagjax.interactions decomposes such a network"
            )
    if (count := _count(graph, source, target, apart)) > _PATHS:
        raise GraphError(
            f"{count:,} paths lead to {target!r}, up to {_PATHS:,} are evaluated; "
            "choose nodes nearer to each other"
        )
    return PathSum(dag, source, target, apart)


def path_gap(
    dag: DAG, y: Array, source: str | None = None, target: str | None = None
) -> jax.Array:
    """How nonlinear the network is along its paths: `|P(y) - Q(y)| / |P(y)|`.

    0 if every node with several paths to it has linear arcs only, such as in a chain.

    Args:
        dag: The network.
        y: At the source.
        source: A node; None: the input.
        target: A node; None: the output.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> x = jnp.ones((2, 3))
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(3), nn.relu), x)
        >>> float(dj.path_gap(dag, x)) < 1e-6
        True
    """
    ends = source or dag.graph.inputs[0], target or dag.graph.outputs[0]
    p, q = transfer(dag, *ends)(y), path_sum(dag, *ends)(y)
    gap = jnp.linalg.norm(p - q)
    return jnp.where(gap == 0, gap, gap / jnp.linalg.norm(p))


def _check_value(dag: DAG, node: str, y: Array) -> None:
    merge = dag.graph.merge_of.get(node)
    if merge is not None and not isinstance(y, tuple):
        raise GraphError(
            f"node {node!r} is a {merge!r}: it holds a tuple of ports, not one array; "
            "inject at a node before it, or give a tuple like dagjax.inject's"
        )


def _batch(y: Array) -> tuple[int, ...]:
    return jax.tree.leaves(y)[0].shape[:1]


def _steps(
    graph: Graph, needed: set[str], apart: bool
) -> dict[str, list[tuple[str, list[Arc]]]]:
    """`{row: [(column, arcs of one step)]}` of the rows needed, in level order."""
    rows: dict[str, dict[Any, list[Arc]]] = {}
    for arc in graph.arcs:
        if arc.target in needed:
            step = arc.name if apart else arc.source
            rows.setdefault(arc.target, {}).setdefault(step, []).append(arc)
    return {
        row: [(arcs[0].source, arcs) for arcs in steps.values()]
        for row, steps in rows.items()
    }


def _joined(stacks: list[PyTree]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks)


def _count(graph: Graph, source: str, target: str, apart: bool) -> int:
    """Paths from the source and from the constant node."""
    paths = dict.fromkeys(graph.nodes, 0) | {source: 1}
    for row, steps in _steps(graph, {*graph.nodes}, apart).items():
        paths[row] += 1 + sum(paths[column] for column, _ in steps)
    return paths[target]
