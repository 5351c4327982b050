"""Build graphs by composition; the leaves are Flax modules and plain functions.

A part has one input and one output. Nodes are named by position (`in`, `n1`, ...,
`out`), arcs by their function, with a number where a name comes twice.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Iterable
from typing import Any

import jax

from dagjax.graph.core.functions import as_function, identity
from dagjax.graph.core.merges import Concat, Merge, Product
from dagjax.graph.core.topology import Arc, Graph, GraphError
from dagjax.types import Layer, PyTree

_Node = Hashable  # while parts are being glued: "in", "out" or (part, node)


def series(*fs: Layer, name: str | None = None) -> Graph:
    """One after the other, an arc (or a graph) for each.

    Args:
        *fs: Modules, functions or graphs.
        name: A prefix of the arcs' names.

    Example:
        >>> import flax.linen as nn
        >>> [arc.name for arc in series(nn.Dense(3), nn.relu, nn.Dense(3)).arcs]
        ['Dense', 'relu', 'Dense_1']
    """
    parts = _parts(fs)
    ends: list[_Node] = ["in", *(("joint", i) for i in range(1, len(parts))), "out"]
    wires = _Wires(parts[0])
    for i, part in enumerate(parts):
        wires.add(i, part, ends[i], ends[i + 1])
    return wires.graph(name)


def block(*fs: Layer, name: str = "block") -> Graph:
    """A series as one arc: what lies inside is pruned as a whole.

    Args:
        *fs: Modules, functions or graphs.
        name: The name of the arc.

    Example:
        >>> import flax.linen as nn
        >>> block(nn.relu, nn.Dense(3), name="fc").arcs
        (Arc('fc': in -> out, relu > Dense(3)),)
    """
    return Graph([Arc(name, "in", "out", series(*fs))], "in", "out")


def parallel(*fs: Layer, name: str | None = None) -> Graph:
    """Side by side on one input, summed: `x -> f_1(x) + f_2(x) + ...`.

    Args:
        *fs: Modules, functions or graphs that give one shape.
        name: A prefix of the arcs' names.

    Example:
        >>> import flax.linen as nn
        >>> parallel(nn.Dense(3), nn.Dense(3))
        Graph(2 nodes, 2 arcs, 1 levels: in -> out)
    """
    parts = [_open(part) for part in _parts(fs)]
    wires = _Wires(parts[0])
    for i, part in enumerate(parts):
        wires.add(i, part, "in", "out")
    return wires.graph(name)


def concat(*fs: Layer, axis: int = -1, name: str | None = None) -> Graph:
    """Side by side on one input, concatenated along an axis.

    Args:
        *fs: Modules, functions or graphs.
        axis: The axis, counted with the batch axis.
        name: A prefix of the arcs' names.
    """
    return merge(Concat(axis), *fs, name=name)


def product(*fs: Layer, name: str | None = None) -> Graph:
    """Side by side on one input, multiplied; a factor switched off counts as 1.

    Args:
        *fs: Modules, functions or graphs that give one shape.
        name: A prefix of the arcs' names.
    """
    return merge(Product(), *fs, name=name)


def gated(
    value: PyTree,
    gate: Layer,
    activation: Layer = jax.nn.sigmoid,
    *,
    name: str | None = None,
) -> Graph:
    """A gated unit, `value(x) * activation(gate(x))` (Dauphin et al. 2017; GLU).

    Args:
        value: What passes the gate.
        gate: What opens it; with the gate's arc switched off the value passes whole.
        activation: `jax.nn.sigmoid`, `nn.silu` (SwiGLU), ...
        name: A prefix of the arcs' names.

    Example:
        >>> import flax.linen as nn
        >>> [arc.name for arc in gated(nn.Dense(3), nn.Dense(3), nn.silu).arcs]
        ['Dense', 'gate']
    """
    return product(value, block(gate, activation, name="gate"), name=name)


def merge(how: Merge, *fs: Layer, name: str | None = None) -> Graph:
    """Side by side on one input, read through a merge: part i writes port i.

    Args:
        how: `Concat()`, `Product()`, `Max()`, `Mean()`, `Attention()`, `Experts()`, or
            any frozen function of a tuple of ports.
        *fs: Modules, functions or graphs.
        name: A prefix of the arcs' names.

    Example:
        >>> import dagjax as dj, flax.linen as nn
        >>> head = merge(dj.Attention(), *(nn.Dense(8, name=n) for n in "qkv"))
        >>> head.arcs
        (Arc('k': in -> out[1], Dense(8)), Arc('q': in -> out[0], Dense(8)),
         Arc('v': in -> out[2], Dense(8)))
    """
    parts = [_open(part, single=True) for part in _parts(fs)]
    wires = _Wires(parts[0])
    for i, part in enumerate(parts):
        wires.add(i, part, "in", "out", port=i)
    wires.merges["out"] = how
    return wires.graph(name)


def residual(f: Layer, shortcut: Any = None, *, name: str | None = None) -> Graph:
    """`x -> shortcut(x) + f(x)`; the shortcut is an arc too and can be pruned.

    Args:
        f: The branch: a module, a function or a graph.
        shortcut: What stands beside it; None: the identity.
        name: A prefix of the arcs' names.

    Example:
        >>> import flax.linen as nn
        >>> [arc.name for arc in residual(nn.Dense(3), name="block1").arcs]
        ['block1/Dense', 'block1/skip']
    """
    if shortcut is None:
        shortcut = Graph([Arc("skip", "in", "out", identity)], "in", "out")
    return parallel(shortcut, f, name=name)


def as_graph(f: Layer) -> Graph:
    """A graph as it is; a module or a function as a graph of one arc."""
    if isinstance(f, Graph):
        return f
    fn = as_function(f)
    return Graph([Arc(fn.name, "in", "out", fn)], "in", "out")


class GraphBuilder:
    """Arbitrary graphs, node by node and arc by arc.

    Example:
        >>> import flax.linen as nn
        >>> b = GraphBuilder()
        >>> left, right = b.input("left"), b.input("right")
        >>> h = b.arc("fc_left", left, "h", nn.Dense(8))
        >>> h = b.arc("fc_right", right, "h", nn.Dense(8))
        >>> y = b.arc("readout", h, "y", nn.Dense(3))
        >>> b.build(outputs=[h, y])
        Graph(4 nodes, 3 arcs, 2 levels: left, right -> h, y)
    """

    def __init__(self) -> None:
        self._arcs: list[Arc] = []
        self._inputs: list[str] = []
        self._merges: dict[str, Merge] = {}

    def input(self, name: str) -> str:
        """Declare an input node; returns its name."""
        self._inputs.append(name)
        return name

    def merge(self, node: str, merge: Merge) -> str:
        """Let a node read its ports through a merge; returns its name."""
        self._merges[node] = merge
        return node

    def arc(
        self,
        name: str,
        source: str,
        target: str,
        fn: Layer,
        port: int | None = None,
        tied: str | None = None,
    ) -> str:
        """Add an arc; returns the name of its target."""
        self._arcs.append(Arc(name, source, target, fn, port, tied))
        return target

    def build(self, outputs: str | Iterable[str]) -> Graph:
        """The validated graph."""
        return Graph(self._arcs, self._inputs, outputs, self._merges)


class _Wires:
    """Arcs between nodes that are not named yet."""

    def __init__(self, first: Graph):
        self.arcs: list[tuple[int, Arc]] = []  # with the number of its part
        self.merges: dict[_Node, Merge] = {}
        self.spaces = {"in": first.space_of.get(first.inputs[0])}

    def add(
        self, i: int, part: Graph, source: _Node, target: _Node, port: int | None = None
    ) -> None:
        """Lay a part between two nodes; its last arcs write the port."""
        end = part.outputs[0]
        place = {part.inputs[0]: source, end: target}
        at = lambda node: place.get(node, (i, node))
        for arc in part.arcs:
            last = port if arc.target == end and port is not None else arc.port
            ends: Any = {"source": at(arc.source), "target": at(arc.target)}
            self.arcs.append((i, dataclasses.replace(arc, port=last, **ends)))
        self.merges |= {at(node): merge for node, merge in part.merges}

    def graph(self, name: str | None) -> Graph:
        """Name nodes by position and arcs uniquely."""
        nodes = dict.fromkeys(n for _, a in self.arcs for n in (a.source, a.target))
        inner = [node for node in nodes if node not in ("in", "out")]
        called: dict[_Node, str] = {"in": "in", "out": "out"}
        called |= {node: f"n{i}" for i, node in enumerate(inner, 1)}
        names = self._names(f"{name}/" if name else "")
        arcs = [
            Arc(
                names[i, arc.name], called[arc.source], called[arc.target], arc.fn,
                arc.port, None if arc.tied is None else names[i, arc.tied],
            )
            for i, arc in self.arcs
        ]  # fmt: skip
        merges = {called[node]: merge for node, merge in self.merges.items()}
        spaces = {node: space for node, space in self.spaces.items() if space}
        return Graph(arcs, "in", "out", merges, spaces)

    def _names(self, prefix: str) -> dict[tuple[int, str], str]:
        """Unique names of arcs, and of what they are tied to within their part."""
        old = [(i, arc.name) for i, arc in self.arcs]
        old += [(i, arc.tied) for i, arc in self.arcs if arc.tied is not None]
        old = list(dict.fromkeys(old))
        return dict(zip(old, _unique(prefix + n for _, n in old), strict=True))


def _parts(fs: Iterable[Any]) -> list[Graph]:
    parts = [as_graph(f) for f in fs]
    if not parts:
        raise GraphError("nothing to combine; give at least one function or graph")
    for part in parts:
        if len(part.inputs) != 1 or len(part.outputs) != 1 or not part.arcs:
            raise GraphError(
                f"{part!r} cannot be combined: a part has one input, one output and at "
                "least one arc; use GraphBuilder for others"
            )
    return parts


def _open(part: Graph, single: bool = False) -> Graph:
    """A part that ends in a plain sum (`single`: in one arc), by an identity arc."""
    end = part.outputs[0]
    crowded = single and len(part.arcs_into(end)) > 1
    if end not in part.merge_of and not crowded:
        return part
    return series(part, Graph([Arc("pass", "in", "out", identity)], "in", "out"))


def _unique(names: Iterable[str]) -> list[str]:
    """Number what comes twice: `Dense, Dense_1, Dense_2`."""
    taken: dict[str, None] = {}
    for name in names:
        base, n = re.sub(r"_\d+$", "", name), 0
        while name in taken:
            n += 1
            name = f"{base}_{n}"
        taken[name] = None
    return list(taken)
