"""The static part of a network: nodes, arcs, levels."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dagjax.graph.core.functions import as_function
from dagjax.graph.core.merges import Merge
from dagjax.graph.core.signature import Signature
from dagjax.types import PyTree

_FORM = Signature()


class GraphError(ValueError):
    """A graph that cannot be: the message names the arc or node."""


@dataclasses.dataclass(frozen=True)
class Arc:
    """A named arc `source -> target` that carries a function.

    Args:
        name: Unique in its graph; parameters, gates and masks are found under it.
        source: The node it reads.
        target: The node it adds to.
        fn: A Flax Linen module, a function, a pair `(init, apply)` or a graph.
        port: Which port of a merge node it writes; None for a sum node.
        tied: The name under which its parameters are found; arcs tied to one name share
            them. None: its own name.

    Example:
        >>> import flax.linen as nn
        >>> Arc("fc", "x", "y", nn.Dense(3))
        Arc('fc': x -> y, Dense(3))
    """

    name: str
    source: str
    target: str
    fn: Any
    port: int | None = None
    tied: str | None = None

    @property
    def params_name(self) -> str:
        """Where `dag.params` and `dag.state` hold what is this arc's."""
        return self.name if self.tied is None else self.tied

    @property
    def reads_all_params(self) -> bool:
        """Whether it finds what it reads in the whole trees, not under its name."""
        return self.fn.reads_all_params

    def __post_init__(self) -> None:
        object.__setattr__(self, "fn", as_function(self.fn))

    def __repr__(self) -> str:
        port = "" if self.port is None else f"[{self.port}]"
        tied = "" if self.tied is None else f", tied to {self.tied!r}"
        ends = f"{self.source} -> {self.target}{port}"
        return f"Arc({self.name!r}: {ends}, {self.fn!r}{tied})"


@dataclasses.dataclass(frozen=True)
class Space:
    """The shape of a node's value; `batched` says that a batch axis stands before."""

    shape: tuple[int, ...]
    dtype: str
    batched: bool = True

    def sized(self, batch: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with the batch axis, `(B,)`, where there is one."""
        return (batch if self.batched else ()) + self.shape


@dataclasses.dataclass(frozen=True)
class Graph:
    """A directed acyclic graph whose arcs carry functions.

    A node's value is the sum of what its arcs deliver; a node with a merge reads its
    ports through it instead. Arcs are kept in one canonical order (level of the target,
    then name), so that graphs of equal arcs are equal and sum in the same order.

    Args:
        arcs: The arcs, in any order.
        inputs: Name or names of the input nodes.
        outputs: Name or names of the output nodes.
        merges: `{node: merge}` for nodes that are not sums.
        spaces: `{node: Space}` (a tuple of them for a merge node), what is known of the
            values' shapes; `init` fills it in.
        ranks: `{node: level}`, levels that nodes have at least (see `dagjax.relevel`).
        signature: How arguments become input values and output values the result.

    Raises:
        GraphError: A cycle (it is printed), two arcs of one name, an unreachable
            output, an arc into an input, a port that is missing or taken twice.

    Example:
        >>> graph = Graph([Arc("a", "x", "h", abs), Arc("b", "h", "y", abs),
        ...                Arc("skip", "x", "y", abs)], "x", "y")
        >>> graph.levels, graph.depth
        ({'x': 0, 'h': 1, 'y': 2}, 2)
    """

    arcs: tuple[Arc, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    merges: tuple[tuple[str, Merge], ...] = ()
    spaces: tuple[tuple[str, Any], ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    signature: Signature = _FORM

    def __init__(
        self,
        arcs: Iterable[Arc],
        inputs: str | Iterable[str],
        outputs: str | Iterable[str],
        merges: Mapping[str, Merge] | Iterable[tuple[str, Merge]] = (),
        spaces: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        ranks: Mapping[str, int] | Iterable[tuple[str, int]] = (),
        signature: Signature = _FORM,
    ) -> None:
        put = functools.partial(object.__setattr__, self)
        put("arcs", tuple(arcs))
        put("inputs", _names(inputs))
        put("outputs", _names(outputs))
        put("merges", tuple(sorted(dict(merges).items())))
        put("spaces", tuple(sorted(dict(spaces).items())))
        put("ranks", tuple(sorted(dict(ranks).items())))
        put("signature", signature)
        put("levels", _levels(self))
        order = sorted(
            self.arcs, key=lambda a: (self.levels[a.target], natural(a.name))
        )
        put("arcs", tuple(order))
        _validate(self)
        fields = (self.arcs, self.inputs, self.outputs, self.merges, self.spaces)
        put("_hash", hash((*fields, self.ranks, signature)))

    levels: dict[str, int] = dataclasses.field(init=False, repr=False, compare=False)
    _hash: int = dataclasses.field(init=False, repr=False, compare=False)

    def __hash__(self) -> int:
        return self._hash

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes, level by level."""
        return tuple(self.levels)

    @property
    def depth(self) -> int:
        """The number of levels above the inputs, which is the number of factors."""
        return max(self.levels.values(), default=0)

    @functools.cached_property
    def by_name(self) -> dict[str, Arc]:
        """`{arc name: arc}`."""
        return {arc.name: arc for arc in self.arcs}

    @functools.cached_property
    def merge_of(self) -> dict[str, Merge]:
        """`{node: merge}` of the nodes that are not sums."""
        return dict(self.merges)

    @functools.cached_property
    def space_of(self) -> dict[str, PyTree]:
        """`{node: Space}` of the nodes whose shape is known."""
        return dict(self.spaces)

    @functools.cached_property
    def at_level(self) -> tuple[tuple[Arc, ...], ...]:
        """Arcs into level 0, 1, ..., depth (none into level 0)."""
        rows: list[list[Arc]] = [[] for _ in range(self.depth + 1)]
        for arc in self.arcs:
            rows[self.levels[arc.target]].append(arc)
        return tuple(map(tuple, rows))

    @functools.cached_property
    def _into(self) -> dict[str, list[Arc]]:
        arcs: dict[str, list[Arc]] = {}
        for arc in self.arcs:
            arcs.setdefault(arc.target, []).append(arc)
        return arcs

    def arcs_into(self, node: str) -> tuple[Arc, ...]:
        """The arcs whose sum is the value of the node."""
        return tuple(self._into.get(node, ()))

    def ports(self, node: str) -> int | None:
        """How many ports a merge node has; None for a sum node."""
        if node not in self.merge_of:
            return None
        known = self.space_of.get(node, ())
        return max([len(known), *((a.port or 0) + 1 for a in self.arcs_into(node))])

    def replace(self, **changes: Any) -> Graph:
        """A copy with other fields."""
        names = ("arcs", "inputs", "outputs", "merges", "spaces", "ranks", "signature")
        return Graph(**({name: getattr(self, name) for name in names} | changes))

    def check_nodes(self, *nodes: str) -> None:
        """Whether these nodes exist.

        Raises:
            GraphError: If there is no such node.
        """
        for node in nodes:
            if node not in self.levels:
                raise GraphError(
                    f"no node named {node!r}; the nodes are {', '.join(self.nodes)}"
                )

    def select(self, names: Iterable[str]) -> tuple[Arc, ...]:
        """The arcs of these names, in canonical order.

        Raises:
            GraphError: If there is no such arc.
        """
        names = {names} if isinstance(names, str) else set(names)
        if unknown := sorted(names - {*self.by_name}):
            raise GraphError(
                f"no arc named {', '.join(map(repr, unknown))}; "
                f"the arcs are {', '.join(self.by_name)}"
            )
        return tuple(arc for arc in self.arcs if arc.name in names)

    def __repr__(self) -> str:
        return (
            f"Graph({len(self.nodes)} nodes, {len(self.arcs)} arcs, {self.depth} "
            f"levels: {', '.join(self.inputs)} -> {', '.join(self.outputs)})"
        )


def live_arcs(graph: Graph, gates: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Arcs on some path from an input to an output along arcs that are switched on.

    Args:
        graph: The graph.
        gates: `{arc: gate}`; an arc with gate 0 is off, one not named is on.

    Returns:
        Names in canonical order.

    Example:
        >>> arcs = [Arc("a", "x", "h", abs), Arc("b", "h", "y", abs),
        ...         Arc("skip", "x", "y", abs)]
        >>> live_arcs(Graph(arcs, "x", "y"), {"b": 0.0})
        ('skip',)
    """
    gates = {} if gates is None else gates
    graph.select(gates)  # names that do not exist
    on = [a for a in graph.arcs if float(gates.get(a.name, 1.0)) != 0]
    reached, needed = _descendants(on, graph.inputs), {*graph.outputs}
    for arc in reversed(on):
        needed |= {arc.source} if arc.target in needed else set()
    return tuple(a.name for a in on if a.source in reached and a.target in needed)


def _descendants(arcs: Iterable[Arc], sources: Collection[str]) -> set[str]:
    """The sources and all nodes that can be reached from one of them."""
    nodes = {*sources}
    for arc in arcs:
        nodes |= {arc.target} if arc.source in nodes else set()
    return nodes


def ancestors(graph: Graph, targets: Collection[str]) -> set[str]:
    """The targets and all nodes from which one of them can be reached."""
    nodes = {*targets}
    for arc in reversed(graph.arcs):
        nodes |= {arc.source} if arc.target in nodes else set()
    return nodes


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key in which `conv_10` comes after `conv_2`."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts]


def _names(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _levels(graph: Graph) -> dict[str, int]:
    """Largest number of hops, by repeated removal of nodes without waiting in-arcs.

    A node with a rank waits for that level at least.
    """
    ranks = {n: rank for n, rank in graph.ranks if isinstance(rank, int)}
    out: dict[str, list[str]] = {}
    waiting: dict[str, int] = dict.fromkeys(graph.inputs, 0)
    waiting |= dict.fromkeys(graph.space_of, 0)
    for arc in graph.arcs:
        out.setdefault(arc.source, []).append(arc.target)
        waiting[arc.target] = waiting.get(arc.target, 0) + 1
        waiting.setdefault(arc.source, 0)
    levels = {n: ranks.get(n, 0) for n, count in waiting.items() if count == 0}
    ready = list(levels)
    for node in ready:
        for target in out.get(node, ()):
            least = ranks.get(target, 0)
            levels[target] = max(levels.get(target, least), levels[node] + 1)
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    if any(waiting.values()):
        raise GraphError(_cycle(graph))
    return dict(sorted(levels.items(), key=lambda item: item[1]))


def _cycle(graph: Graph) -> str:
    import networkx

    edges = networkx.MultiDiGraph()
    for arc in graph.arcs:
        edges.add_edge(arc.source, arc.target, key=arc.name)
    cycle = networkx.find_cycle(edges)
    path = "".join(f"{source} -[{name}]-> " for source, _, name in cycle)
    return f"the arcs close a cycle: {path}{cycle[0][0]}; remove one of them"


def _validate(graph: Graph) -> None:
    if not graph.inputs or not graph.outputs:
        raise GraphError("a graph needs at least one input node and one output node")
    for what, names in (
        ("arcs are", [arc.name for arc in graph.arcs]),
        ("inputs are", graph.inputs),
        ("outputs are", graph.outputs),
    ):
        if twice := [n for n, count in collections.Counter(names).items() if count > 1]:
            raise GraphError(f"two {what} named {twice[0]!r}; give each its own name")
    _validate_ranks(graph)
    _validate_reach(graph)
    for arc in graph.arcs:
        _validate_port(graph, arc)
    for node in graph.merge_of:
        _validate_merge(graph, node)


def _validate_merge(graph: Graph, node: str) -> None:
    if node in graph.inputs:
        raise GraphError(
            f"the input node {node!r} cannot be a merge; give it one of its own"
        )
    written = {arc.port for arc in graph.arcs_into(node)}
    holes = [port for port in range(graph.ports(node) or 0) if port not in written]
    if holes and node not in graph.space_of:
        raise GraphError(
            f"no arc writes port {holes[0]} of {node!r}, a {graph.merge_of[node]!r} "
            "node; number the ports 0, 1, ... without a gap"
        )


def _validate_reach(graph: Graph) -> None:
    known = {*graph.nodes}
    if unknown := [n for n in (*graph.outputs, *graph.merge_of) if n not in known]:
        raise GraphError(
            f"no node named {unknown[0]!r}; the nodes are {', '.join(sorted(known))}"
        )
    for arc in graph.arcs:
        if arc.target in graph.inputs:
            raise GraphError(
                f"arc {arc.name!r} leads into the input node {arc.target!r}; "
                "give the sum a node of its own"
            )
    reached = _descendants(graph.arcs, graph.inputs)
    # After a deletion a node keeps its known space and reads zero.
    lost = [n for n in graph.outputs if n not in reached and n not in graph.space_of]
    if lost:
        raise GraphError(
            f"no path from {', '.join(graph.inputs)} to the output {lost[0]!r}; "
            f"reached are {', '.join(n for n in graph.nodes if n in reached)}"
        )
    fed = {*graph.inputs, *(arc.target for arc in graph.arcs)}
    for arc in graph.arcs:
        if arc.source not in fed | {*graph.space_of}:
            raise GraphError(
                f"arc {arc.name!r} reads {arc.source!r}, which is no input and has no "
                f"arc into it; the nodes are {', '.join(sorted(fed))}"
            )


def _validate_ranks(graph: Graph) -> None:
    graph.check_nodes(*(node for node, _ in graph.ranks))
    for node, level in graph.ranks:
        if not isinstance(level, int) or level < 0 or (level and node in graph.inputs):
            raise GraphError(
                f"level {level!r} of {node!r}: a whole number, 0 for an input"
            )


def _validate_port(graph: Graph, arc: Arc) -> None:
    merge = graph.merge_of.get(arc.target)
    if merge is None and arc.port is not None:
        raise GraphError(
            f"arc {arc.name!r} writes port {arc.port} of {arc.target!r}, a sum node; "
            f"leave the port out, or give the node a merge"
        )
    if merge is not None and (not isinstance(arc.port, int) or arc.port < 0):
        raise GraphError(
            f"arc {arc.name!r} leads into {arc.target!r}, a {merge!r} node, and needs "
            f"a port 0, 1, ...; got {arc.port!r}"
        )
    if merge is None:
        return
    rivals = [a.name for a in graph.arcs_into(arc.target) if a.port == arc.port]
    if len(rivals) > 1:
        raise GraphError(
            f"arcs {', '.join(rivals)} write one port ({arc.port}) of {arc.target!r}; "
            "give their sum a node of its own"
        )
