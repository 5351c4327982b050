"""The factors at a point: honest lower-triangular matrices.

At a point the arcs are affine, `f(u) = G u + c`, and with N the matrix of the G

    h = (I - N)^-1 b' = L_n ... L_1 b',    L_l = I + N_l,    b' = b + c

(value: G holds the nonlinear parts at the point; jacobian: G is the derivative). It is
a product of matrices, so any bracketing will do, determinants are 1 and the inverse
subtracts. An independent reconstruction from the abstract of arXiv:2306.09707.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dagjax.graph.calculus import breakpoints as kink
from dagjax.graph.calculus.freeze import freeze
from dagjax.graph.calculus.matrices import BlockMatrix, Vector, product, summed
from dagjax.graph.calculus.tangent import (
    Tangent,
    basis,
    filled,
    flat,
    floats,
    is_float_at,
)
from dagjax.graph.core.dag import DAG, inject
from dagjax.graph.core.levels import Values, apply_levels, is_traced, sweep
from dagjax.graph.core.topology import Arc, GraphError
from dagjax.types import PyTree

_ENTRIES = 2**27  # of dense blocks: 512 MiB in single precision


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["dag", "values", "b", "gates"],
    meta_fields=["kind"],
)
@dataclasses.dataclass(frozen=True)
class Linearization:
    """A network at a point as a product of unit lower-triangular matrices.

    A pytree. `push` and `pull` multiply by the product and by its transpose without a
    matrix (one jvp or vjp an arc); `matrices()` holds the factors' blocks densely.

    Args:
        dag: The network.
        values: `h`, the values of all nodes at the point.
        b: The injection with the arcs' constants: `h = L_n ... L_1 b`.
        gates: `{arc: gate}` or None.
        kind: "value" or "jacobian".
    """

    dag: DAG
    values: Values
    b: Tangent
    gates: dict[str, PyTree] | None
    kind: Literal["value", "jacobian"]

    @functools.partial(jax.jit, static_argnums=1)
    def factor(self, level: int, z: Tangent) -> Tangent:
        """`L_l z` without the matrix."""
        flow = self._flow(self.dag.graph.at_level[level], z)
        return z | jax.tree.map(jnp.add, {v: z[v] for v in flow}, flow)

    @jax.jit
    def push(self, z: Tangent) -> Tangent:
        """`L_n ... L_1 z`, forward mode.

        Args:
            z: `{node: value}`, shaped like `values`.
        """
        for level in range(1, self.dag.graph.depth + 1):
            z = self.factor(level, z)
        return z

    @jax.jit
    def pull(self, z: Tangent) -> Tangent:
        """`L_1^T ... L_n^T z`, reverse mode.

        Args:
            z: `{node: value}`, a cotangent.
        """
        for level in reversed(range(1, self.dag.graph.depth + 1)):
            z = self._pull_level(level, z)
        return z

    @jax.jit
    def inverse(self, z: Tangent) -> Tangent:
        """`(I - N) z`, which is `L_1^-1 ... L_n^-1 z`."""
        flow = self._flow(self.dag.graph.arcs, z)
        return z | jax.tree.map(jnp.subtract, {v: z[v] for v in flow}, flow)

    @functools.partial(jax.jit, static_argnames=("output", "input"))
    def jacobian(self, output: str | None = None, input: str | None = None) -> Any:  # noqa: A002
        """The block of the product from one node to what another one shows.

        Args:
            output: A node; None: the network's output.
            input: A node that is a sum; None: the network's input.

        Returns:
            `[*shape of the output, *shape of the input]`, as `jax.jacobian`.
        """
        output, start = self.output_node(output), self._input_node(input)
        y, seen = self.shown(output), self.values[start]
        zeros = self._zeros()
        forth = lambda t: self.read(output, self.push(zeros | {start: t}))
        back = lambda c: self.pull(zeros | {output: self._read_back(output, c)})[start]
        if y.size < seen.size:
            rows = jax.vmap(back)(basis(y))
            return rows.reshape(*y.shape, *seen.shape)
        columns = jax.vmap(forth, out_axes=-1)(basis(seen))
        return columns.reshape(*y.shape, *seen.shape)

    @jax.jit
    def matrices(self) -> tuple[BlockMatrix, ...]:
        """The factors `L_1, ..., L_n` with dense blocks, one matrix each.

        Of a batch every example is a part of the point: give one example, or vmap.

        Raises:
            ValueError: If the blocks would take more than 512 MiB.
        """
        self._check_size()
        make = lambda arcs: BlockMatrix(self._blocks(arcs), self._nodes())
        return tuple(make(arcs) for arcs in self.dag.graph.at_level[1:])

    def product(self) -> BlockMatrix:
        """`L_n ... L_1 = (I - N)^-1`, dense: the sum over all paths."""
        return product((BlockMatrix({}, self._nodes()), *self.matrices()))

    def vector(self, z: Tangent) -> Vector:
        """A state as the vectors that the matrices multiply: `{node: [dimension]}`.

        A merge node's vector holds the values and presences of its ports.
        """
        return {node: flat(z[node]) for node in self.dag.graph.nodes}

    @functools.partial(jax.jit, static_argnames="ord")
    def path_norms(self, ord: Any = 2) -> BlockMatrix:  # noqa: A002
        """`Lambda = (I - |N|)^-1`, |N| the norms of the arcs at the point.

        Its entry `(v, u)` sums over all paths from u to v the products of the norms of
        their arcs' matrices, a bound on how much of a change at u reaches v.

        Args:
            ord: As of `jnp.linalg.norm`.
        """
        ones = tuple((node, 1) for node in self.dag.graph.nodes)
        wide = lambda block: block.astype(jnp.promote_types(block.dtype, jnp.float32))
        norm = lambda block: jnp.linalg.norm(wide(block), ord=ord)[None, None]
        norms = lambda arc: ((p, norm(b)) for p, b in self._blocks([arc]).items())
        self._check_size()
        return product(
            BlockMatrix(summed(term for arc in arcs for term in norms(arc)), ones)
            for arcs in self.dag.graph.at_level
        )

    @jax.jit
    def flows(self) -> dict[str, PyTree]:
        """`{arc: G h_u}`, the linear part of what each arc delivers."""
        values = floats(self.values)
        return {
            arc.name: self._flow([arc], values)[arc.target]
            for arc in self.dag.graph.arcs
        }

    def _flow(self, arcs: Sequence[Arc], z: Tangent) -> Tangent:
        """`N z`, N of some arcs, by one jvp; rows that no arc leads into are absent."""
        read = dict.fromkeys(arc.source for arc in arcs)
        point = floats({node: self.values[node] for node in read})
        step = {node: z[node] for node in read}
        return jax.jvp(self._increments(arcs), (point,), (step,))[1]

    def _pull_level(self, level: int, z: Tangent) -> Tangent:
        arcs = self.dag.graph.at_level[level]
        read = dict.fromkeys(arc.source for arc in arcs)
        point = floats({node: self.values[node] for node in read})
        rows, pull = jax.vjp(self._increments(arcs), point)
        (back,) = pull({node: z[node] for node in rows})
        return z | jax.tree.map(jnp.add, {node: z[node] for node in read}, back)

    def _increments(self, arcs: Iterable[Arc]) -> Callable[[Tangent], Tangent]:
        """`z -> N(z)`, of the nodes that arcs read, with the derivative of the kind."""
        arcs = tuple(arcs)
        targets = dict.fromkeys(arc.target for arc in arcs)
        zeros = jax.tree.map(jnp.zeros_like, {v: self.values[v] for v in targets})

        def increments(z: Tangent) -> Tangent:
            return floats(
                sweep(
                    self.dag.graph, arcs, self.dag.params, self.dag.state,
                    filled(self.values, z), gates=self.gates, onto=zeros,
                )[0]
            )  # fmt: skip

        return freeze(increments) if self.kind == "value" else increments

    def _blocks(self, arcs: Iterable[Arc]) -> dict[tuple[str, str], jax.Array]:
        """Dense blocks of the node pairs that some arcs join."""
        pairs: dict[tuple[str, str], list[Arc]] = {}
        for arc in arcs:
            if all(is_float_at(self.values, n) for n in (arc.source, arc.target)):
                pairs.setdefault((arc.target, arc.source), []).append(arc)
        return {pair: self._block(*pair, joined) for pair, joined in pairs.items()}

    def _block(self, row: str, column: str, arcs: list[Arc]) -> jax.Array:
        increments, point = self._increments(arcs), floats(self.values[column])
        f = lambda u: increments({column: u})[row]
        y, back = jax.vjp(f, point)
        if flat(y).size < flat(point).size:
            return jax.vmap(lambda c: flat(back(c)[0]))(basis(y))
        forth = lambda t: flat(jax.jvp(f, (point,), (t,))[1])
        return jax.vmap(forth, out_axes=-1)(basis(point))

    def _check_size(self) -> None:
        size = lambda node: sum(
            leaf.size for leaf in jax.tree.leaves(self.values[node])
        )
        pairs = {(arc.target, arc.source) for arc in self.dag.graph.arcs}
        entries = sum(size(row) * size(column) for row, column in pairs)
        if entries > _ENTRIES:
            raise ValueError(
                f"dense blocks of this point have {entries:,} entries, up to "
                f"{_ENTRIES:,} are made; give one example instead of a batch, or use "
                "push, pull, jacobian and contributions, which need no matrices"
            )

    def _nodes(self) -> tuple[tuple[str, int], ...]:
        """Nodes with the dimensions of their vectors."""
        return tuple((node, v.size) for node, v in self.vector(self.values).items())

    def _zeros(self) -> Tangent:
        return jax.tree.map(jnp.zeros_like, floats(self.values))

    def floats(self) -> Tangent:
        """The values as a tangent: None stands for integers."""
        return floats(self.values)

    def output_node(self, output: str | None) -> str:
        """The node asked for; None: the network's output, if it has one."""
        output = self._named(output, self.dag.graph.outputs, "output")
        if not is_float_at(self.values, output):
            raise GraphError(f"node {output!r} shows integers; nothing is linear there")
        return output

    def _input_node(self, start: str | None) -> str:
        start = self._named(start, self.dag.graph.inputs, "input")
        if start in self.dag.graph.merge_of or not is_float_at(self.values, start):
            raise GraphError(
                f"node {start!r} holds ports or integers; nothing is differentiated "
                "in them, name a sum node above it"
            )
        return start

    def _named(self, node: str | None, nodes: tuple[str, ...], what: str) -> str:
        if node is None and len(nodes) != 1:
            raise GraphError(f"name one {what} of {', '.join(nodes)}")
        if node is not None:
            self.dag.graph.check_nodes(node)
        return next(iter(nodes)) if node is None else node

    def shown(self, node: str) -> jax.Array:
        """The value that an arc sees at a node."""
        return self.dag.read(node, self.values[node])

    def _reading(self, node: str) -> Callable[[Any], jax.Array]:
        """The merge of a node as a function of its ports of floats."""
        values = {node: self.values[node]}
        merge = lambda z: self.dag.read(node, filled(values, {node: z})[node])
        return freeze(merge) if self.kind == "value" else merge

    def read(self, node: str, z: Tangent) -> jax.Array:
        """What an arc sees of a tangent at a node: through its merge."""
        return jax.jvp(self._reading(node), (self._at(node),), (z[node],))[1]

    def _read_back(self, node: str, cotangent: jax.Array) -> Any:
        return jax.vjp(self._reading(node), self._at(node))[1](cotangent)[0]

    def _at(self, node: str) -> Any:
        return floats({node: self.values[node]})[node]

    def __repr__(self) -> str:
        return f"Linearization({self.kind} of {self.dag!r})"


def linearize(
    dag: DAG,
    *xs: PyTree,
    kind: Literal["value", "jacobian"] = "value",
    gates: Mapping[str, Any] | None = None,
    tolerance: float = 1e-6,
) -> Linearization:
    """The network at a point as a product of lower-triangular matrices.

    "value": rectifiers are 0 or 1 (un-rectified), softmax weights, normalizing factors
    and smooth gates are numbers, other smooth activations secants: the product times
    the constants is the value. "jacobian": every arc's derivative: the product is the
    derivative of the network. For piecewise linear arcs both are the same.

    Args:
        dag: The network, in inference mode.
        *xs: One array `[B, ...]` for each input node; the batch is one point.
        kind: Which matrices.
        gates: `{arc: gate}`; 1 where not named.
        tolerance: Relative distance from a kink below which a warning names the node
            (not under jit, where values are not known); 0: no check.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.residual(dj.series(nn.Dense(3), nn.relu))
        >>> x = jnp.array([[1.0, -2.0, 3.0]])
        >>> dag = dj.init(jax.random.key(0), graph, x)
        >>> lin = dj.linearize(dag, x)
        >>> L1, L2 = lin.matrices()
        >>> h = (L2 @ L1)(lin.vector(lin.b))
        >>> bool(jnp.allclose(h["out"], dag(x)[0], atol=1e-5))
        True
    """
    if kind not in ("value", "jacobian"):
        raise ValueError(f"kind {kind!r}: expected 'value' or 'jacobian'")
    dag.graph.select(gates or ())
    point = _point(dag, xs, None if gates is None else dict(gates), kind)
    if tolerance and not is_traced(point):
        kink.warn(dag.graph, _near_kinks(point, tolerance), tolerance)
    return point


@functools.partial(jax.jit, static_argnames="kind")
def _point(
    dag: DAG, xs: PyTree, gates: Any, kind: Literal["value", "jacobian"]
) -> Linearization:
    values = inject(dag, *xs)
    values, _ = apply_levels(dag.graph, dag.params, dag.state, values, gates=gates)
    point = Linearization(dag, values, {}, gates, kind)
    return dataclasses.replace(point, b=point.inverse(floats(values)))


@jax.jit
def _near_kinks(point: Linearization, tolerance: Any) -> dict[str, jax.Array]:
    exact, values = dataclasses.replace(point, kind="jacobian"), floats(point.values)
    return {
        arc.name: kink.near_kink(exact._increments([arc]), values, tolerance)
        for arc in point.dag.graph.arcs
    }
