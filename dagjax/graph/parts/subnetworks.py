"""All functions of the sub-architectures: outputs for many gate vectors at once.

The value of a node depends only on the gates of arcs from which it can be reached. So
each node is evaluated once for every distinct sub-architecture below it, all of them
stacked along one axis, and the gate vectors share what they have in common.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.graph.core.dag import DAG, inject
from dagjax.graph.core.functions import identity
from dagjax.graph.core.levels import Values, apply_arc, deliver
from dagjax.graph.core.topology import Graph, GraphError
from dagjax.types import Array, PyTree

LIMIT = 20  # arcs of which all gate vectors are listed
_BYTES = 2**28  # of node values in one call

Readout = Callable[[Any], Any]


class Subnetworks(NamedTuple):
    """Outputs of sub-architectures, as arrays on the host."""

    arcs: tuple[str, ...]
    gates: np.ndarray  # [gate vector, arc]
    outputs: Array  # [gate vector, ...]


class Rows(NamedTuple):
    """The distinct sub-architectures below one node."""

    gates: dict[str, np.ndarray]  # {arc into the node: [row]}
    sources: dict[str, np.ndarray]  # {arc: row of its source, [row]}


class SharedRows(NamedTuple):
    """What is evaluated for some gate vectors."""

    nodes: dict[str, Rows]
    outputs: dict[str, np.ndarray]  # {output: its row, [joint row]}
    vectors: np.ndarray  # joint row of every gate vector


def all_subnetworks(
    dag: DAG,
    *xs: PyTree,
    gates: Any = None,
    arcs: Iterable[str] | None = None,
    readout: Readout | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Subnetworks:
    """The outputs for all gate vectors of a graph, or for those given.

    Every node is evaluated once for each distinct sub-architecture below it, stacked
    and compiled once; of a ResNet-20's million gate vectors few need a convolution.

    Args:
        dag: The network.
        *xs: One array `[B, ...]` for each input node.
        gates: `[N, arcs]`, numbers; None: all 2^arcs vectors of 0 and 1, the gate of
            the first arc changing last.
        arcs: The arcs whose gates vary, in this order; None: all, in canonical order.
            The others stay open.
        readout: What to keep of an output, such as a loss; None: all of it.
        progress: Called with (gate vectors done, all) after every chunk.

    Returns:
        The arcs, the gate vectors `[N, arcs]` and the outputs `[N, ...]`.

    Raises:
        GraphError: If more than 20 arcs are to be enumerated.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.residual(nn.Dense(3))
        >>> dag = dj.init(jax.random.key(0), graph, jnp.ones((2, 3)))
        >>> found = dj.all_subnetworks(dag, jnp.ones((2, 3)))
        >>> found.arcs, found.outputs.shape
        (('Dense', 'skip'), (4, 2, 3))
        >>> bool((found.outputs[1] == 1).all())        # the skip alone
        True
    """
    names = names_of(dag.graph, arcs)
    vectors = _vectors(names, gates)
    if not len(vectors):
        raise ValueError("no gate vectors: give at least one row of gates")
    readout = identity if readout is None else readout
    plans = _chunks(dag, names, vectors, _sizes(dag, xs))
    parts, done = [], 0
    for plan, padded in zip(plans, _padded(plans), strict=True):
        rows = _evaluate(dag, xs, padded.nodes, padded.outputs, readout)
        parts.append(
            jax.tree.map(lambda y, plan=plan: np.asarray(y)[plan.vectors], rows)
        )
        done += len(plan.vectors)
        if progress is not None:
            progress(done, len(vectors))
    outputs = jax.tree.map(lambda *ys: np.concatenate(ys), *parts)
    return Subnetworks(names, vectors, outputs)


def names_of(graph: Graph, arcs: Iterable[str] | None) -> tuple[str, ...]:
    """The arcs whose gates vary."""
    arcs = (arcs,) if isinstance(arcs, str) else arcs
    names = tuple(a.name for a in graph.arcs) if arcs is None else tuple(arcs)
    graph.select(names)
    if len({*names}) < len(names):
        raise GraphError(f"arcs named twice: {', '.join(names)}")
    return names


def _vectors(names: Sequence[str], gates: Any) -> np.ndarray:
    if gates is not None:
        vectors = np.asarray(gates)
        if vectors.ndim != 2 or vectors.shape[1] != len(names):
            raise ValueError(
                f"gates of shape {vectors.shape}: expected [N, {len(names)}], a column "
                f"for each of the arcs {', '.join(names)}"
            )
        return vectors
    if len(names) > LIMIT:
        raise GraphError(
            f"{len(names)} arcs have 2^{len(names)} = {2 ** len(names):,} gate "
            f"vectors, up to {LIMIT} arcs are enumerated; name some with arcs=[...], "
            "hand over gates=[N, arcs], or use dagjax.shapley, which samples"
        )
    return all_vectors(len(names))


def all_vectors(n: int) -> np.ndarray:
    """`[2^n, n]`, all vectors of False and True; the first entry changes last."""
    index = np.arange(2**n)[:, None]
    return (index >> np.arange(n)[None, ::-1]) % 2 == 1


def _sizes(dag: DAG, xs: tuple[PyTree, ...]) -> dict[str, int]:
    """Bytes of every node's value."""
    values = jax.eval_shape(lambda dag, xs: inject(dag, *xs), dag, xs)
    size = lambda leaf: math.prod(leaf.shape) * leaf.dtype.itemsize
    return {n: sum(map(size, jax.tree.leaves(v))) for n, v in values.items()}


def _chunks(
    dag: DAG, names: tuple[str, ...], vectors: np.ndarray, sizes: dict[str, int]
) -> list[SharedRows]:
    """Plans of runs of gate vectors, as long as memory allows."""
    step = len(vectors)
    while True:
        plans = []
        for start in range(0, len(vectors), step):
            part = vectors[start : start + step]
            plans.append(make_plan(dag.graph, names, part))
            if step > 1 and _bytes(plans[-1], sizes) > _BYTES:
                break
        else:  # all of them fit
            return plans
        step = -(-step // 2)


def _bytes(plan: SharedRows, sizes: dict[str, int]) -> int:
    count = lambda rows: max(map(len, rows.gates.values()), default=1)
    return sum(count(rows) * sizes[node] for node, rows in plan.nodes.items())


def make_plan(graph: Graph, names: Sequence[str], vectors: np.ndarray) -> SharedRows:
    """The distinct sub-architectures below every node, and who reads which.

    `vectors` are the gates `[N, arcs]` of the arcs that vary.
    """
    column = {name: vectors[:, i] for i, name in enumerate(names)}
    open_ = np.ones(len(vectors), vectors.dtype)
    gate = {arc.name: column.get(arc.name, open_) for arc in graph.arcs}
    find = lambda nodes: _distinct(_below(graph, gate, nodes), len(vectors))
    rows = {node: find([node]) for node in graph.nodes}
    joint = find(graph.outputs)
    nodes = {
        node: Rows(
            {arc.name: gate[arc.name][first] for arc in graph.arcs_into(node)},
            {arc.name: rows[arc.source][1][first] for arc in graph.arcs_into(node)},
        )
        for node, (first, _) in rows.items()
    }
    outputs = {node: rows[node][1][joint[0]] for node in graph.outputs}
    return SharedRows(nodes, outputs, joint[1])


def _below(
    graph: Graph, gate: dict[str, np.ndarray], nodes: Sequence[str]
) -> Iterator[np.ndarray]:
    """The gates on which the values of some nodes depend; 0 where cut off from them."""
    none = np.zeros(len(next(iter(gate.values()), ())), bool)
    needed = dict.fromkeys(nodes, ~none)
    for arc in reversed(graph.arcs):
        if arc.target in needed:
            used = np.where(needed[arc.target], gate[arc.name], 0)
            needed[arc.source] = needed.get(arc.source, none) | (used != 0)
            yield used


def _distinct(
    columns: Iterable[np.ndarray], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first of every kind of row, and the kind of each row."""
    kind = np.zeros(length, int)
    for column in columns:
        values, code = np.unique(column, return_inverse=True)
        if len(values) > 1:
            kind = np.unique(kind * len(values) + code, return_inverse=True)[1]
    _, first, kind = np.unique(kind, return_index=True, return_inverse=True)
    return first, kind


def _padded(plans: list[SharedRows]) -> Iterator[SharedRows]:
    """All plans with as many rows, so that one program serves them."""
    longest = jax.tree.map(lambda *rows: max(map(len, rows)), *plans)
    fill = lambda rows, length: np.pad(rows, (0, length - len(rows)))
    for plan in plans:
        yield jax.tree.map(fill, plan, longest)


@functools.partial(jax.jit, static_argnames="readout")
def _evaluate(
    dag: DAG,
    xs: tuple[PyTree, ...],
    nodes: dict[str, Rows],
    outputs: dict[str, np.ndarray],
    readout: Readout,
) -> Any:
    """What is read of the outputs, `[joint row, ...]`."""
    graph = dag.graph
    stacks = jax.tree.map(lambda leaf: leaf[None], inject(dag, *xs))
    for node in graph.nodes:
        for arc in graph.arcs_into(node):
            rows = nodes[node]
            y = _apply(dag, arc, stacks)[rows.sources[arc.name]]
            zeros = _repeated(stacks[node], len(y))
            add = functools.partial(deliver, graph, arc)
            stacks[node] = jax.vmap(add)(zeros, y, rows.gates[arc.name])
    shown = [
        jax.vmap(functools.partial(dag.read, node))(stacks[node])[outputs[node]]
        for node in graph.outputs
    ]
    return jax.vmap(readout)(shown[0] if len(shown) == 1 else tuple(shown))


def _apply(dag: DAG, arc: Any, stacks: Values) -> jax.Array:
    """The arc's function of all rows of its source."""
    one = lambda value: apply_arc(dag.graph, arc, dag.params, dag.state, value)[0]
    return jax.vmap(one)(stacks[arc.source])


def _repeated(stack: Any, length: int) -> Any:
    """One row as many; as it is if it has them."""
    fit = lambda leaf: jnp.broadcast_to(leaf, (length, *leaf.shape[1:]))
    return jax.tree.map(fit, stack)
