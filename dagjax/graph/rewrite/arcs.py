"""Change the structure: delete, insert, keep a part, other levels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import jax

from dagjax.graph.core.dag import DAG, parts_of
from dagjax.graph.core.functions import Params, State
from dagjax.graph.core.initialize import check_arc
from dagjax.graph.core.topology import Arc, Graph, GraphError, ancestors


def delete(dag: DAG, arcs: str | Iterable[str]) -> DAG:
    """Remove arcs; all other factors of the network are kept.

    The nodes stay: a node without in-arcs reads zero, as if all its gates were 0.

    Args:
        dag: The network.
        arcs: Names of the arcs to remove.

    Raises:
        GraphError: If there is no such arc.

    Example:
        >>> import dagjax as dj, jax, jax.numpy as jnp
        >>> x = jnp.ones((1, 8, 8, 1))
        >>> dag = dj.init(jax.random.key(0), dj.zoo.resnet(8), x)
        >>> len(dj.delete(dag, ["block2/branch"]).graph.arcs)
        7
    """
    gone = {arc.name for arc in dag.graph.select(arcs)}
    return subnetwork(dag, (a.name for a in dag.graph.arcs if a.name not in gone))


def subnetwork(dag: DAG, arcs: str | Iterable[str]) -> DAG:
    """Keep these arcs only, and all nodes.

    Args:
        dag: The network.
        arcs: Names of the arcs to keep.

    Raises:
        GraphError: If there is no such arc.
    """
    kept = dag.graph.select(arcs)
    return DAG(dag.graph.replace(arcs=kept), *parts_of(dag, kept))


def insert(
    dag: DAG, arc: Arc, params: Params = None, state: State | None = None
) -> DAG:
    """Add an arc between nodes of the network; the levels are found anew.

    Args:
        dag: The network.
        arc: The arc, under a name not yet taken.
        params: Its parameters, such as `nn.Dense(3).init(key, x)["params"]`; nothing
            for an arc that has none or is tied.
        state: Its state, likewise.

    Raises:
        GraphError: If a node is not there, the arc would close a cycle (printed), its
            parameters are missing, or it delivers another shape than the node has.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> x = jnp.ones((2, 3))
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(3), nn.relu), x)
        >>> dj.insert(dag, dj.Arc("skip", "in", "out", dj.identity)).graph
        Graph(3 nodes, 3 arcs, 2 levels: in -> out)
    """
    for node in (arc.source, arc.target):
        if node not in dag.graph.levels:
            raise GraphError(
                f"{arc!r}: no node named {node!r}; the nodes are "
                f"{', '.join(dag.graph.nodes)}"
            )
    if arc.tied is None and arc.name in {a.tied for a in dag.graph.arcs}:
        raise GraphError(f"other arcs share parameters named {arc.name!r}; rename it")
    new_params = {arc.params_name: params} if jax.tree.leaves(params) else {}
    new_state = {arc.params_name: state} if state and jax.tree.leaves(state) else {}
    if new_params and not isinstance(dag.params, dict):
        raise GraphError(
            f"{arc!r} needs a place for its parameters, and those of the network are a "
            f"{type(dag.params).__name__}; trace it with a dict of parameters"
        )
    graph = dag.graph.replace(arcs=(*dag.graph.arcs, arc))
    params = dag.params | new_params if new_params else dag.params
    larger = DAG(graph, params, dag.state | new_state)
    check_arc(larger, arc)
    return larger


def node_functions(dag: DAG, level: int) -> dict[str, DAG]:
    """The functions of all nodes up to a level: the rows of `L_l o ... o L_1`.

    Args:
        dag: The network.
        level: Nodes of at most this level.

    Returns:
        `{node: f}`, where `f(x)` is the value of that node; each is a network again.

    Raises:
        ValueError: If the level is not one of 0, ..., depth.

    Example:
        >>> import dagjax as dj, jax, jax.numpy as jnp
        >>> x = jnp.ones((1, 28, 28, 1))
        >>> dag = dj.init(jax.random.key(0), dj.zoo.lenet_300_100(), x)
        >>> dj.node_functions(dag, 1)
        {'in': DAG(Graph(1 nodes, 0 arcs, 0 levels: in -> in), 0 parameters),
         'n1': DAG(Graph(2 nodes, 1 arcs, 1 levels: in -> n1), 235,500 parameters)}
    """
    levels = dag.graph.levels
    if not 0 <= level <= dag.graph.depth:
        raise ValueError(
            f"level {level}: the network has levels 0 to {dag.graph.depth}"
        )
    return {node: _up_to(dag, node) for node in levels if levels[node] <= level}


def _up_to(dag: DAG, node: str) -> DAG:
    nodes = ancestors(dag.graph, [node]) | {*dag.graph.inputs}
    part = subnetwork(dag, (a.name for a in dag.graph.arcs if a.target in nodes))
    graph = part.graph.replace(
        outputs=node,
        merges={n: m for n, m in dag.graph.merges if n in nodes},
        spaces={n: s for n, s in dag.graph.spaces if n in nodes},
        ranks={n: r for n, r in dag.graph.ranks if n in nodes},
    )
    return part.replace(graph=graph)


def relevel(
    dag: DAG, levels: Literal["earliest", "latest"] | Mapping[str, int] = "earliest"
) -> DAG:
    """The same network with other levels, hence other factors.

    Every ranking in which each arc goes up gives valid factors; the levels of a graph
    are the least one. "latest" puts each node right below its first reader.

    Args:
        dag: The network.
        levels: A name, or `{node: level}`; nodes not named are put as low as can be.

    Raises:
        GraphError: If a level is not above those of the node's arcs, or an input's
            is not 0.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> wide = dj.parallel(dj.series(nn.relu, nn.relu, nn.relu), nn.Dense(3))
        >>> graph = dj.series(wide, nn.relu)
        >>> dag = dj.init(jax.random.key(0), graph, jnp.ones((1, 3)))
        >>> dj.relevel(dag, {"n2": 2, "out": 7}).graph.levels
        {'in': 0, 'n1': 1, 'n2': 2, 'n3': 3, 'out': 7}
    """
    if isinstance(levels, str) and levels not in ("earliest", "latest"):
        raise GraphError(f"levels {levels!r}: give 'earliest', 'latest' or a mapping")
    ranks = latest(dag.graph) if levels == "latest" else {}
    ranks = ranks if isinstance(levels, str) else dict(levels)
    graph = dag.graph.replace(ranks=ranks)
    for arc in graph.arcs:
        asked, level = ranks.get(arc.target), graph.levels[arc.target]
        if asked is not None and asked < level:
            raise GraphError(
                f"level {asked} of {arc.target!r}: {arc!r} comes from level "
                f"{graph.levels[arc.source]}; give it level {level} or more"
            )
    return dag.replace(graph=graph)


def latest(graph: Graph) -> dict[str, int]:
    """The largest ranking of the same depth (ALAP)."""
    levels = dict.fromkeys(graph.nodes, graph.depth)
    for arc in reversed(graph.arcs):
        levels[arc.source] = min(levels[arc.source], levels[arc.target] - 1)
    return levels | dict.fromkeys(graph.inputs, 0)
