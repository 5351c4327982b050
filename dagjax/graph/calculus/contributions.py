"""What every arc contributes to the output: a sum that is the same at every level.

With M = L_n ... L_1 and the affine arcs `G u + c` at a point, for any level l below
that of the output t

    h_t = sum over arcs u -> v that cross l of M_tv G h_u
        + sum over nodes v above l          of M_tv b'_v

(solve the rows above l of (I - N) h = b' with the rows up to l given). An independent
reconstruction from the abstract of arXiv:2306.09707.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dagjax.graph.calculus.linearize import Linearization
from dagjax.graph.core.topology import Graph
from dagjax.types import PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arcs", "nodes"],
    meta_fields=["graph", "output"],
)
@dataclasses.dataclass(frozen=True)
class Contributions:
    """Parts of the output's value, each shaped like it; a pytree.

    Args:
        arcs: `{arc: M_tv G h_u}`.
        nodes: `{node: M_tv b'_v}`: inputs, biases and other constants.
        graph: The graph.
        output: The node t.
    """

    arcs: dict[str, jax.Array]
    nodes: dict[str, jax.Array]
    graph: Graph
    output: str

    def cut(self, level: int) -> jax.Array:
        """The sum over what crosses a level: the output's value, whatever the level.

        Args:
            level: From -1 (everything is above) to the output's level less 1.

        Raises:
            ValueError: If the level is not below the output's.
        """
        levels = self.graph.levels
        if not -1 <= level < levels[self.output]:
            raise ValueError(
                f"level {level}: a cut lies below {self.output!r}, at a level from -1 "
                f"to {levels[self.output] - 1}"
            )
        crossing = [
            self.arcs[arc.name]
            for arc in self.graph.arcs
            if levels[arc.source] <= level < levels[arc.target]
        ]
        above = [part for node, part in self.nodes.items() if levels[node] > level]
        return sum([*crossing, *above], jnp.zeros_like(self.nodes[self.output]))

    def __repr__(self) -> str:
        return f"Contributions({len(self.arcs)} arcs to {self.output!r})"


@functools.partial(jax.jit, static_argnames="output")
def contributions(lin: Linearization, output: str | None = None) -> Contributions:
    """What every arc contributes to the value of the output.

    All arcs from one vectorized forward pass, without matrices.

    Args:
        lin: A network at a point, `dj.linearize(dag, x)`.
        output: A node; None: the network's output.

    Returns:
        A part for each arc and node, shaped like the output.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> x = jnp.array([[1.0, -2.0, 3.0]])
        >>> graph = dj.residual(dj.series(nn.Dense(3), nn.relu))
        >>> dag = dj.init(jax.random.key(0), graph, x)
        >>> parts = dj.contributions(dj.linearize(dag, x))
        >>> sorted(parts.arcs)
        ['Dense', 'relu', 'skip']
        >>> bool(jnp.allclose(parts.cut(1), dag(x), atol=1e-5))
        True
    """
    graph, flows = lin.dag.graph, lin.flows()
    end = lin.output_node(output)
    ones = {arc.name: jnp.ones(()) for arc in graph.arcs}
    sources = {node: jnp.ones(()) for node in graph.nodes}

    def seen(arcs: dict[str, PyTree], nodes: dict[str, PyTree]) -> jax.Array:
        """The output with every part scaled: linear in the scales."""
        z = {node: _scaled(nodes[node], lin.b[node]) for node in graph.nodes}
        for level, row in enumerate(graph.at_level):
            z = lin.factor(level, z) if level else z
            for arc in row:
                flow = _scaled(arcs[arc.name], flows[arc.name])
                z[arc.target] = jax.tree.map(jnp.add, z[arc.target], flow)
        return lin.read(end, z)

    parts = jax.jacfwd(seen, argnums=(0, 1))(ones, sources)
    constant = lin.shown(end) - lin.read(end, lin.floats())
    nodes = parts[1] | {end: parts[1][end] + constant}
    return Contributions(parts[0], nodes, graph, end)


def _scaled(scale: Any, z: Any) -> Any:
    return jax.tree.map(lambda leaf: scale.astype(leaf.dtype) * leaf, z)
