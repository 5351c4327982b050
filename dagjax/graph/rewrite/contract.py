"""Coarser and finer: a part of a graph as one arc, and back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence

from dagjax.graph.core.dag import DAG, parts_of
from dagjax.graph.core.functions import identity
from dagjax.graph.core.initialize import shaped
from dagjax.graph.core.nested import Nested
from dagjax.graph.core.topology import Arc, Graph, GraphError
from dagjax.types import PyTree


def contract(
    dag: DAG, arcs: str | Iterable[str] | None = None, name: str | None = None
) -> DAG:
    """Put a part of the network into one arc; its value does not change.

    Gates then switch the part as a whole, and fewer levels are left. In train mode
    random layers inside draw other numbers, since an arc's stream follows its name.

    Args:
        dag: The network.
        arcs: The arcs of the part: from one node, to one node, with no other way in or
            out between. None: every chain, until only nodes are left that branch,
            merge, or end.
        name: Of the new arc; None: what the names have in common.

    Raises:
        GraphError: If the arcs are no such part; the message names the node.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> branch = dj.series(nn.relu, nn.Dense(3), name="branch")
        >>> dag = dj.init(jax.random.key(0), dj.residual(branch), jnp.ones((1, 3)))
        >>> dj.contract(dag, ["branch/relu", "branch/Dense"]).graph.arcs
        (Arc('branch': in -> out, relu > Dense(3)), Arc('skip': in -> out, identity))
    """
    if arcs is None:
        for chain in _chains(dag.graph):
            dag = contract(dag, chain)
        return dag
    inside = dag.graph.select(arcs)
    source, target = _ends(dag.graph, inside)
    for arc in _tied_outside(dag.graph, inside):
        raise GraphError(f"{arc!r} shares parameters with the part; contract both")
    rest = [arc for arc in dag.graph.arcs if arc not in inside]
    port, merges = _merge_at(dag.graph, inside, target)
    name = name or _common(inside, rest)
    _check_names([name], rest)
    cut = lambda text: text.removeprefix(f"{name}/")
    reads_all_params = any(arc.reads_all_params for arc in dag.graph.arcs)
    clash = len({cut(arc.name) for arc in inside}) < len(inside)
    short = (lambda text: text) if clash or reads_all_params else cut
    part = _part(dag.graph, inside, (source, target), merges, short)
    new_arc = Arc(name, source, target, Nested(part), port)
    new_params, new_state = parts_of(dag, rest)
    trees = ((dag.params, new_params), (dag.state, new_state))
    for tree, new in () if reads_all_params else trees:
        names = [a.params_name for a in inside if a.params_name in tree]
        part_tree = {short(old): tree[old] for old in names}
        new |= {name: part_tree} if part_tree else {}
    coarse = DAG(_with_arcs(dag.graph, [*rest, new_arc], merges), new_params, new_state)
    return shaped(coarse) if merges else coarse


def split(dag: DAG, arc: str) -> DAG:
    """Take an arc that carries a graph (a block) apart into arcs of the network.

    Args:
        dag: The network.
        arc: Its name; the new arcs are named `arc/inner`.

    Raises:
        GraphError: If the arc does not carry a graph, or is tied to others.

    Example:
        >>> import dagjax as dj, jax, jax.numpy as jnp
        >>> net = dj.zoo.mlp((8, 3), input_shape=(4,))
        >>> dag = dj.init(jax.random.key(0), net, jnp.ones((1, 4)))
        >>> [a.name for a in dj.split(dag, "fc2").graph.arcs]
        ['fc1', 'fc2/relu', 'fc2/Dense']
    """
    (block,) = dag.graph.select([arc])
    inner, graph = _inner_graph(block), dag.graph
    names = _nodes_outside(block)
    arcs = _arcs_outside(block, names)
    rest = [a for a in graph.arcs if a.name != arc]
    _check_names([a.params_name for a in arcs], rest)
    _check_nodes(graph, block, names)
    graph = graph.replace(
        arcs=[*rest, *arcs],
        merges=dict(graph.merges) | {names[n]: m for n, m in inner.merges},
        spaces={names[n]: s for n, s in inner.spaces} | dict(graph.spaces),
    )
    return shaped(DAG(graph, _opened(dag.params, arc), _opened(dag.state, arc)))


def _inner_graph(block: Arc) -> Graph:
    """The graph that an arc carries."""
    if not isinstance(block.fn, Nested):
        raise GraphError(f"{block!r} carries no graph; there is nothing to split")
    if block.tied is not None:
        raise GraphError(f"{block!r} shares its parameters; split arcs of their own")
    return block.fn.fn


def _writes_target(block: Arc) -> bool:
    """Whether its last arcs can write to the block's target themselves.

    Several arcs into one port, or a merge at the end, need a node of their own.
    """
    inner = _inner_graph(block)
    end = inner.outputs[0]
    if end in inner.merge_of or end in inner.inputs:
        return False
    return block.port is None or len(inner.arcs_into(end)) == 1


def _nodes_outside(block: Arc) -> dict[str, str]:
    """`{node of the block: node of the network}`."""
    inner = _inner_graph(block)
    names = {node: f"{block.name}/{node}" for node in inner.nodes}
    names[inner.inputs[0]] = block.source
    return names | ({inner.outputs[0]: block.target} if _writes_target(block) else {})


def _arcs_outside(block: Arc, names: dict[str, str]) -> list[Arc]:
    """The arcs of a block as arcs of the network."""
    inner, direct = _inner_graph(block), _writes_target(block)
    end = inner.outputs[0]
    arcs = [_outside(a, block, names, direct and a.target == end) for a in inner.arcs]
    if direct:
        return arcs
    name = unused(f"{block.name}/pass", {a.name for a in arcs})
    return [*arcs, Arc(name, names[end], block.target, identity, block.port)]


def _outside(arc: Arc, block: Arc, names: dict[str, str], last: bool) -> Arc:
    tied = None if arc.tied is None else f"{block.name}/{arc.tied}"
    port = block.port if last else arc.port
    ends = names[arc.source], names[arc.target]
    return Arc(f"{block.name}/{arc.name}", *ends, arc.fn, port, tied)


def _opened(tree: dict[str, PyTree], block: str) -> dict[str, PyTree]:
    """Parameters or state with the entries of a block beside those of other arcs."""
    rest = {name: entry for name, entry in tree.items() if name != block}
    return rest | {f"{block}/{name}": x for name, x in tree.get(block, {}).items()}


def _check_nodes(graph: Graph, block: Arc, names: dict[str, str]) -> None:
    for node in names.values():
        if node in graph.levels and node not in (block.source, block.target):
            raise GraphError(
                f"there is a node {node!r} already; name the arc otherwise before "
                "it is split"
            )


def _chains(graph: Graph) -> list[list[str]]:
    """Runs of two and more arcs whose inner nodes have one in-arc and one out-arc."""
    out: dict[str, list[Arc]] = {}
    for arc in graph.arcs:
        out.setdefault(arc.source, []).append(arc)
    single = lambda node: (
        len(graph.arcs_into(node)) == len(out.get(node, ())) == 1
        and node not in (*graph.inputs, *graph.outputs)
        and node not in graph.merge_of
    )
    chains = []
    for arc in graph.arcs:
        if single(arc.source) or not single(arc.target):
            continue
        chain = [arc]
        while single(chain[-1].target):
            chain += out[chain[-1].target]
        if not _tied_outside(graph, chain):
            chains.append([a.name for a in chain])
    return chains


def _ends(graph: Graph, inside: tuple[Arc, ...]) -> tuple[str, str]:
    """The node where a part begins and the node where it ends."""
    if not inside:
        raise GraphError("no arcs to contract")
    targets = dict.fromkeys(arc.target for arc in inside)
    sources = dict.fromkeys(arc.source for arc in inside)
    begin = [node for node in sources if node not in targets]
    end = [node for node in targets if node not in sources]
    for nodes, what in ((begin, "begin"), (end, "end")):
        if len(nodes) != 1:
            raise GraphError(
                f"these arcs {what} at several nodes ({', '.join(nodes)}): one arc "
                "goes from one node to one node"
            )
    inner = ({*targets} | {*sources}) - {begin[0], end[0]}
    for node in [n for n in graph.nodes if n in inner]:
        if node in graph.outputs:
            raise GraphError(f"node {node!r} inside is an output; it must stay")
        for arc in graph.arcs:
            if node in (arc.source, arc.target) and arc not in inside:
                raise GraphError(
                    f"node {node!r} inside has {arc!r}, which is not among these arcs; "
                    "add it, or end the part there"
                )
    return begin[0], end[0]


def unused(name: str, taken: Collection[str]) -> str:
    """The name, or the first of `name_2, name_3, ...` that is not taken."""
    numbered = (f"{name}_{i}" for i in itertools.count(2))
    return next(n for n in itertools.chain([name], numbered) if n not in taken)


def _check_names(names: Iterable[str], rest: list[Arc]) -> None:
    taken = {name for arc in rest for name in (arc.name, arc.params_name)}
    for name in names:
        if name in taken:
            raise GraphError(f"the name {name!r} is taken; choose another one")


def _tied_outside(graph: Graph, inside: Sequence[Arc]) -> list[Arc]:
    """Arcs outside a part that share its parameters."""
    names = {arc.name for arc in inside}
    ours = {arc.params_name for arc in inside}
    rest = [arc for arc in graph.arcs if arc.name not in names]
    return [arc for arc in rest if arc.params_name in ours]


def _merge_at(
    graph: Graph, inside: tuple[Arc, ...], target: str
) -> tuple[int | None, dict[str, PyTree]]:
    """The new arc's port, or the merge that goes inside with all its arcs."""
    if target not in graph.merge_of:
        return None, {}
    into = graph.arcs_into(target)
    last = [arc for arc in into if arc in inside]
    if len(last) == len(into):
        return None, {target: graph.merge_of[target]}
    if len(last) == 1:
        return last[0].port, {}
    raise GraphError(
        f"{', '.join(arc.name for arc in last)} write several ports of {target!r} but "
        "not all: contract one of them, or all arcs into the node"
    )


def _part(
    graph: Graph,
    inside: tuple[Arc, ...],
    ends: tuple[str, str],
    merges: dict[str, PyTree],
    short: Callable[[str], str],
) -> Graph:
    """The part as a graph from "in" to "out"."""
    names = _names_inside(inside, ends, short)
    bare = ends[1] in graph.merge_of and not merges  # the arc has the port then
    port = lambda arc: None if bare and arc.target == ends[1] else arc.port
    tied = lambda arc: None if arc.tied is None else short(arc.tied)
    arcs = [
        Arc(short(a.name), names[a.source], names[a.target], a.fn, port(a), tied(a))
        for a in inside
    ]
    within = {*names} - {*ends}
    known = {n: m for n, m in graph.merges if n in within} | merges
    unfed = {n for n in within if not graph.arcs_into(n)}
    spaces = {names[n]: s for n, s in graph.spaces if n in unfed}
    return Graph(arcs, "in", "out", {names[n]: m for n, m in known.items()}, spaces)


def _names_inside(
    inside: tuple[Arc, ...], ends: tuple[str, str], short: Callable[[str], str]
) -> dict[str, str]:
    """Short names of the nodes of a part, unless two nodes would share one."""
    nodes = dict.fromkeys(node for arc in inside for node in (arc.source, arc.target))
    within = [node for node in nodes if node not in ends]
    names = {node: short(node) for node in within}
    if len({*names.values(), "in", "out"}) < len(names) + 2:
        names = {node: node for node in within}
    return names | dict(zip(ends, ("in", "out"), strict=True))


def _with_arcs(graph: Graph, arcs: list[Arc], gone: dict[str, PyTree]) -> Graph:
    """The graph with these arcs and the nodes that they leave."""
    nodes = {*graph.inputs, *graph.outputs}
    nodes |= {node for arc in arcs for node in (arc.source, arc.target)}
    keep = lambda pairs: {n: v for n, v in pairs if n in nodes and n not in gone}
    return graph.replace(
        arcs=arcs,
        merges=keep(graph.merges),
        spaces=keep(graph.spaces),
        ranks=keep(graph.ranks),
    )


def _common(inside: tuple[Arc, ...], rest: list[Arc]) -> str:
    """The longest common path of the names, else the first and the last."""
    names = [arc.name for arc in inside]
    parts = list(zip(*(name.split("/") for name in names), strict=False))
    same = itertools.takewhile(lambda column: len({*column}) == 1, parts)
    shared = "/".join(column[0] for column in same)
    if shared and shared not in {arc.name for arc in rest}:
        return shared
    return f"{names[0]}..{names[-1]}"
