"""Thousands of small arcs as a few large ones: gather, vmap, segment sum.

The values of all nodes of one shape stand in one array, the stack. Equal arcs of one
level become one arc that gathers its sources from the stack, applies the function to
all of them with stacked parameters, and sums what arrives at each target. The stack of
level l is that of the levels below with new rows: `f_l = [I; Phi_l] f_{l-1}`, the
rectangular form of the level factor.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.graph.core.dag import DAG
from dagjax.graph.core.functions import Function, Params, State
from dagjax.graph.core.initialize import draw_stacked
from dagjax.graph.core.levels import is_traced
from dagjax.graph.core.merges import Concat
from dagjax.graph.core.topology import Arc, Graph, GraphError, Space
from dagjax.types import Key, PyTree


class Bundle(Function):
    """Equal arcs side by side, from the rows of a stack to new rows.

    Each reads the row of its source and adds to that of its target, of so many `rows`;
    `shared` arcs are tied to one set of parameters.
    """

    def __init__(
        self,
        fn: Function,
        names: tuple[str, ...],
        sources: tuple[int, ...],
        targets: tuple[int, ...],
        rows: int,
        shared: bool,
    ):
        super().__init__(fn, (fn, names, sources, targets, rows, shared), fn.name)
        self.names, self.rows, self.shared = names, rows, shared
        self.sources, self.targets = np.array(sources), np.array(targets)

    def init(self, key: jax.Array, x: PyTree) -> tuple[Params, State]:
        """Stacked initial values, one draw an arc (one for all if they are tied)."""
        one = jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype)
        if self.shared:
            return self.fn.init(key, one)
        return draw_stacked(key, self.fn, one, self.names)

    def apply(
        self, params: Params, state: State, x: PyTree, *, train: bool, key: Key | None
    ) -> tuple[PyTree, State]:
        """`[B, rows below, ...] -> [B, rows, ...]`, zero where no arc leads."""
        keys = None if key is None else jax.random.split(key, len(self.names))
        axis = None if self.shared else 0
        run = lambda p, s, x, k: self.fn.apply(p, s, x, train=train, key=k)
        x = jnp.take(x, self.sources, 1)
        if self.shared and train and jax.tree.leaves(state):  # one by one
            one = lambda state, xk: run(params, state, *xk)[::-1]
            new_state, y = jax.lax.scan(one, state, (jnp.moveaxis(x, 1, 0), keys))
        else:
            axes = (axis, axis, 1, None if keys is None else 0)
            y, new_state = jax.vmap(run, axes)(params, state, x, keys)
            if self.shared or not jax.tree.leaves(new_state):
                new_state = state
        total = jax.ops.segment_sum(y, self.targets, self.rows)
        return jnp.moveaxis(total, 0, 1), new_state

    def __repr__(self) -> str:
        return f"{len(self.names)} x {self.fn!r}"


def as_row(x: jax.Array) -> jax.Array:
    """`[B, ...] -> [B, 1, ...]`."""
    return x[:, None]


@dataclasses.dataclass(frozen=True)
class Extend:
    """The rows so far, and zeros for new ones."""

    rows: int

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, fewer rows, ...] -> [B, rows, ...]`."""
        pads = [(0, 0)] * x.ndim
        pads[1] = (0, self.rows - x.shape[1])
        return jnp.pad(x, pads)


@dataclasses.dataclass(frozen=True)
class Pick:
    """One row of a stack."""

    row: int

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, rows, ...] -> [B, ...]`."""
        return x[:, self.row]


def bundle(dag: DAG) -> DAG:
    """The same network with equal arcs of a level as one arc; for thousands of arcs.

    Arcs are equal if they have one function, one shape of input and of output. Inputs
    and outputs keep their names; parameters are stacked along a new first axis, which
    masks and optimizers take as they take others (biases become matrices: say which
    leaves are prunable). `dj.unbundle` takes the parameters back.

    Args:
        dag: A network of sum nodes.

    Raises:
        GraphError: If a node is a merge or has no batch axis, or the network is traced.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.parallel(*[dj.series(nn.Dense(1), nn.tanh) for _ in range(50)])
        >>> dag = dj.init(jax.random.key(0), graph, jnp.ones((2, 1)))
        >>> small = dj.bundle(dag)
        >>> len(dag.graph.arcs), len(small.graph.arcs)
        (100, 6)
        >>> x = jnp.ones((2, 1))
        >>> bool(jnp.allclose(small(x), dag(x), atol=1e-5))
        True
    """
    _check(dag.graph)
    graph = _Stacks(dag.graph).laid()
    params, state = {}, {}
    for arc in graph.arcs:
        if isinstance(arc.fn, Bundle):
            parts = [dag.graph.by_name[name].params_name for name in arc.fn.names]
            for new, old in ((params, dag.params), (state, dag.state)):
                trees = [old[name] for name in parts if name in old]
                if trees:
                    stacked = trees[0] if arc.fn.shared else _stacked(trees)
                    new[arc.params_name] = stacked
    return DAG(graph, params, state)


def unbundle(bundled: DAG, graph: Graph) -> DAG:
    """The parameters of a bundled network in the graph that it was made from.

    Args:
        bundled: What `dj.bundle` returned, trained perhaps.
        graph: The graph of the network that it was given.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.parallel(nn.Dense(1), nn.Dense(1))
        >>> dag = dj.init(jax.random.key(0), graph, jnp.ones((2, 1)))
        >>> again = dj.unbundle(dj.bundle(dag), dag.graph)
        >>> again.graph == dag.graph, jax.tree.map(jnp.shape, again.params)
        (True, {'Dense': {'bias': (1,), 'kernel': (1, 1)}, 'Dense_1': ...})
    """
    params, state = {}, {}
    for arc in bundled.graph.arcs:
        if isinstance(arc.fn, Bundle):
            graph.select(arc.fn.names)
            for new, old in ((params, bundled.params), (state, bundled.state)):
                if arc.params_name in old:
                    new |= dict(_unstacked(graph, arc.fn, old[arc.params_name]))
    return DAG(graph, params, state)


class _Stack(NamedTuple):
    """The array of all nodes of one shape up to a level."""

    node: str
    rows: int


class _Stacks:
    """Lays a graph of sum nodes with known shapes out as stacks, level by level."""

    def __init__(self, graph: Graph):
        kinds = dict.fromkeys(graph.space_of[node] for node in graph.nodes)
        number = {space: i for i, space in enumerate(kinds)}
        self.graph, self.shapes = graph, list(kinds)
        self.kind = {node: number[graph.space_of[node]] for node in graph.nodes}
        self.uses = Counter(arc.params_name for arc in graph.arcs)
        self.row: dict[str, int] = {}
        self.tops: dict[int, _Stack] = {}  # of each kind
        self.arcs: list[Arc] = []
        ends = (*graph.inputs, *graph.outputs)
        self.spaces: dict[str, PyTree] = {n: graph.space_of[n] for n in ends}
        self.merges: dict[str, Concat] = {}

    def laid(self) -> Graph:
        """The graph of stacks."""
        levels: list[list[str]] = [[] for _ in range(self.graph.depth + 1)]
        for node, level in self.graph.levels.items():
            levels[level].append(node)
        self._ground(levels[0])
        for level, nodes in enumerate(levels[1:], 1):
            below, self.tops = self.tops, self.tops | self._grow(level, nodes)
            self.arcs += self._bundles(level, below)
        for node in {*self.graph.outputs} - {*self.graph.inputs}:
            top = self.tops[self.kind[node]]
            self.arcs.append(Arc(f"pick {node}", top.node, node, Pick(self.row[node])))
        graph = self.graph
        ends = graph.inputs, graph.outputs
        return Graph(self.arcs, *ends, self.merges, self.spaces)

    def _ground(self, nodes: list[str]) -> None:
        """The stacks of level 0: its nodes side by side, of which inputs are fed."""
        for kind in dict.fromkeys(self.kind[node] for node in nodes):
            rows = [node for node in nodes if self.kind[node] == kind]
            ground, shape = _Stack(f"stack{kind}/0", len(rows)), self.shapes[kind]
            for row, node in enumerate(rows):
                self.row[node] = row
                if node in self.graph.inputs:
                    self.arcs.append(
                        Arc(f"place {node}", node, ground.node, as_row, row)
                    )
            one = Space((1, *shape.shape), shape.dtype)
            self.spaces[ground.node] = (one,) * len(rows)
            self.merges[ground.node] = Concat(1)
            self.tops[kind] = ground

    def _grow(self, level: int, nodes: list[str]) -> dict[int, _Stack]:
        """New rows for the nodes of a level."""
        grown: dict[int, _Stack] = {}
        for kind in dict.fromkeys(self.kind[node] for node in nodes):
            rows = [node for node in nodes if self.kind[node] == kind]
            old = self.tops.get(kind, _Stack("", 0))
            top = _Stack(f"stack{kind}/{level}", old.rows + len(rows))
            self.row |= {node: old.rows + i for i, node in enumerate(rows)}
            shape = self.shapes[kind]
            self.spaces[top.node] = Space((top.rows, *shape.shape), shape.dtype)
            if old.rows:
                keep = Arc(f"{top.node}/keep", old.node, top.node, Extend(top.rows))
                self.arcs.append(keep)
            grown[kind] = top
        return grown

    def _bundles(self, level: int, below: dict[int, _Stack]) -> Iterator[Arc]:
        """The arcs into one level, equal ones together."""
        groups: dict[Any, list[Arc]] = {}
        for arc in self.graph.at_level[level]:
            ends = self.kind[arc.source], self.kind[arc.target]
            tied = arc.params_name if self.uses[arc.params_name] > 1 else None
            groups.setdefault((arc.fn, *ends, tied), []).append(arc)
        for i, ((fn, source, target, tied), arcs) in enumerate(groups.items()):
            top = self.tops[target]
            function = Bundle(
                fn,
                tuple(arc.name for arc in arcs),
                tuple(self.row[arc.source] for arc in arcs),
                tuple(self.row[arc.target] for arc in arcs),
                top.rows,
                tied is not None,
            )
            name = f"level{level}/{fn.name}" + (f"_{i}" if i else "")
            yield Arc(name, below[source].node, top.node, function, None, tied)


def _check(graph: Graph) -> None:
    if traced := [arc for arc in graph.arcs if arc.reads_all_params]:
        raise GraphError(
            f"{traced[0]!r} is traced and reads the user's own tree of parameters; "
            "bundle stacks the parameters of arcs that were built"
        )
    for node in graph.nodes:
        if node in graph.merge_of:
            raise GraphError(
                f"node {node!r} is a {graph.merge_of[node]!r}; bundle sums, and put "
                "merges into arcs before (dagjax.contract)"
            )
        if node not in graph.space_of:
            raise GraphError(
                f"the shape of node {node!r} is not known; dagjax.init finds it"
            )
        if not graph.space_of[node].batched:
            raise GraphError(f"node {node!r} has no batch axis; it cannot be stacked")


def _stacked(trees: list[PyTree]) -> Any:
    """Along a new first axis; on the host, where a thousand operands do not matter."""
    if is_traced(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    join = lambda *leaves: jnp.asarray(np.stack(leaves))
    return jax.tree.map(join, *jax.device_get(trees))


def _unstacked(graph: Graph, fn: Bundle, tree: PyTree) -> Iterator[tuple[str, Any]]:
    for i, name in enumerate(fn.names):
        part = tree if fn.shared else jax.tree.map(lambda leaf, i=i: leaf[i], tree)
        yield graph.by_name[name].params_name, part
