"""A network as a table: levels, nodes, arcs, shapes, parameter counts."""

from __future__ import annotations

import jax

from dagjax.graph.core.dag import count_params
from dagjax.graph.core.functions import Function
from dagjax.graph.core.initialize import init
from dagjax.graph.core.network import Network
from dagjax.graph.core.topology import Arc, Graph, Space
from dagjax.graph.parts.counts import count_paths
from dagjax.graph.rewrite import folding
from dagjax.graph.tracing.as_dag import as_dag, graph_of
from dagjax.text import aligned
from dagjax.types import PyTree

_HEAD = ("level", "node", "shape", "arc", "from", "parameters", "function")
_WIDTH = 64  # of the last column
_MANY = 40  # arcs above which repeats are folded


def show(net: Graph | Network, *xs: PyTree, fold: bool | None = None) -> None:
    """Print a network as a table, one line an arc, grouped by level and node.

    Args:
        net: A graph, or a network of any kind.
        *xs: An example for each input, where the graph does not know their shapes;
            without it shapes and parameter counts of a bare graph stay open.
        fold: Whether of equal blocks that follow one another only the first is shown,
            with their number at its end; None: in a graph of more than 40 arcs.

    Example:
        >>> import dagjax as dj
        >>> dj.show(dj.zoo.mlp((8, 3), input_shape=(4,)))
        level  node  shape   arc  from  parameters  function
            0  in    [B, 4]
            1  n1    [B, 8]  fc1  in            40  flatten > Dense(8)
            2  out   [B, 3]  fc2  n1            27  relu > Dense(3)
        3 nodes, 2 arcs, 2 levels, 1 path, 67 parameters
    """
    net = _with_shapes(net, xs)
    folds = len(graph_of(net).arcs) > _MANY if fold is None else fold
    lines = [_HEAD, *_lines(net, folds)]
    numbers = ("level", "parameters")
    left = [i for i, head in enumerate(_HEAD) if head not in numbers]
    print("\n".join(aligned(lines, left)))
    print(summary(net))


def summary(net: Graph | Network) -> str:
    """One line: the counts.

    Example:
        >>> import dagjax as dj
        >>> summary(dj.zoo.resnet(20))
        '12 nodes, 20 arcs, 11 levels, 512 paths, 272,474 parameters'
    """
    net = _with_shapes(net, ())
    graph = graph_of(net)
    counts = [
        (len(graph.nodes), "node"),
        (len(graph.arcs), "arc"),
        (graph.depth, "level"),
        (count_paths(graph), "path"),
    ]
    if not isinstance(net, Graph):
        counts.append((count_params(net.params), "parameter"))
    return ", ".join(f"{_number(n)} {word}{'s' * (n != 1)}" for n, word in counts)


def _number(n: int) -> str:
    """All digits, or of a very large number how many."""
    return f"{n:,}" if n < 10**15 else f"about 10^{len(str(n)) - 1}"


def _with_shapes(net: Graph | Network, xs: tuple[PyTree, ...]) -> Graph | Network:
    """Initialize abstractly, so that nothing of the network's size is computed."""
    if not isinstance(net, Graph):
        return as_dag(net)
    if not xs and not all(node in net.space_of for node in net.inputs):
        return net
    spaces = [] if xs else [net.space_of[node] for node in net.inputs]
    specs = xs or [jax.ShapeDtypeStruct(s.sized((1,)), s.dtype) for s in spaces]
    abstract = lambda: init(jax.random.key(0), net, *specs)
    return jax.eval_shape(abstract)


def _lines(net: Graph | Network, folds: bool) -> list[tuple[str, ...]]:
    graph = graph_of(net)
    small, counts, _ = folding.fold(graph) if folds else folding.whole(graph)
    times = {end: f"  x {count}" for (_, end), count in counts.items()}
    lines = []
    for node in small.levels:
        level, shape = str(graph.levels[node]), _shape(graph.space_of.get(node))
        first = (level, node + times.get(node, ""), shape)
        arcs = small.arcs_into(node)
        if not arcs:
            lines.append((*first, "", "", "", ""))
        for arc in arcs:
            port = "" if arc.port is None else f" [{arc.port}]"
            head = first if arc is arcs[0] else ("", "", "")
            fn, count = _short(arc.fn), _count(net, arc)
            lines.append((*head, arc.name + port, arc.source, count, fn))
    return lines


def _count(net: Graph | Network, arc: Arc) -> str:
    if arc.tied is not None:
        return f"={arc.tied}"
    if not isinstance(net, Graph):
        return f"{count_params(arc.fn.own(net.params, arc.name)):,}"
    return "?"


def _short(fn: Function) -> str:
    text = repr(fn)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def _shape(space: Space | tuple[Space, ...] | None) -> str:
    if space is None:
        return "?"
    if isinstance(space, tuple):
        return " | ".join(map(_shape, space))
    return f"[{', '.join(['B'] * space.batched + [str(n) for n in space.shape])}]"
