"""The level factors: the network as a product of unit lower-triangular maps.

    L_l = I + N_l,    network = L_n o ... o L_1,    L_l^{-1} = I - N_l

N_l is the arc operator restricted to the rows of level l. It reads lower levels only,
so a factor is undone by subtracting what it added (lifting), whatever the arcs are.
An independent reconstruction from the abstract of arXiv:2306.09707.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from dagjax.graph.core.dag import DAG, parts_of
from dagjax.graph.core.functions import Params, State
from dagjax.graph.core.levels import Values, sweep
from dagjax.graph.core.topology import Arc, Graph
from dagjax.types import PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "state", "gates", "key"],
    meta_fields=["graph", "arcs", "train", "sign"],
)
@dataclasses.dataclass(frozen=True)
class Factor:
    """A map `z -> z + sign * N(z)` of the values of all nodes, N the sum of some arcs.

    A pytree and a callable from state to state. The state `z` is `{node: value}`.
    """

    params: dict[str, Params]
    state: dict[str, State]
    gates: dict[str, PyTree] | None
    key: jax.Array | None
    graph: Graph
    arcs: tuple[str, ...]
    train: bool = False
    sign: int = 1

    def __call__(self, z: Values) -> Values:
        """Rows that an arc leads into gain (or lose) its value, all others pass."""
        arcs = self.graph.select(self.arcs)
        return sweep(
            self.graph, arcs, self.params, self.state, z,
            gates=self.gates, train=self.train, key=self.key, sign=self.sign,
        )[0]  # fmt: skip

    def inverse(self) -> Factor:
        """The factor that subtracts what this one added."""
        return dataclasses.replace(self, sign=-self.sign)

    def __repr__(self) -> str:
        return f"Factor(I {'+' if self.sign > 0 else '-'} {', '.join(self.arcs)})"


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["factors"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Composition:
    """Maps applied one after the other, the first one first."""

    factors: tuple[Factor, ...]

    def __call__(self, z: Values) -> Values:
        """`L_n(... L_1(z))`."""
        for factor in self.factors:
            z = factor(z)
        return z

    def __iter__(self) -> Iterator[Factor]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)

    def __getitem__(self, index: int) -> Factor:
        return self.factors[index]


def factors(
    dag: DAG,
    *,
    gates: Mapping[str, Any] | None = None,
    train: bool = False,
    key: jax.Array | None = None,
) -> tuple[Factor, ...]:
    """The level factors `L_1, ..., L_n`, whose composition is the network.

    Args:
        dag: The network.
        gates: `{arc: gate}`; None: all 1.
        train: Mode of batch norm and dropout, as in `DAG.apply`.
        key: For random arcs in train mode.

    Returns:
        One factor for each level, the first level first.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.residual(dj.series(nn.Dense(3), nn.relu))
        >>> x = jnp.ones((2, 3))
        >>> dag = dj.init(jax.random.key(0), graph, x)
        >>> h = dj.compose(dj.factors(dag))(dj.inject(dag, x))
        >>> bool((h["out"] == dag(x)).all())
        True
    """
    make = functools.partial(_factor, dag, gates, train, key)
    return tuple(make(arcs) for arcs in dag.graph.at_level[1:])


def elementary(
    dag: DAG,
    *,
    gates: Mapping[str, Any] | None = None,
    train: bool = False,
    key: jax.Array | None = None,
) -> tuple[Factor, ...]:
    """One factor `E_e` for each arc, in an order whose composition is the network.

    Any order in which an arc comes after those that end where it starts will do.

    Args:
        dag: The network.
        gates: `{arc: gate}`; None: all 1.
        train: Mode of batch norm and dropout.
        key: For random arcs in train mode.

    Example:
        >>> import dagjax as dj, jax, jax.numpy as jnp
        >>> x = jnp.ones((1, 28, 28, 1))
        >>> dj.elementary(dj.init(jax.random.key(0), dj.zoo.lenet_300_100(), x))
        (Factor(I + fc1), Factor(I + fc2), Factor(I + fc3))
    """
    make = functools.partial(_factor, dag, gates, train, key)
    return tuple(make((arc,)) for arc in dag.graph.arcs)


def parallel_sweep(
    dag: DAG,
    *,
    gates: Mapping[str, Any] | None = None,
    train: bool = False,
    key: jax.Array | None = None,
) -> Factor:
    """`I + N = L_1 o ... o L_n`: one step in which every arc reads the old values.

    Args:
        dag: The network.
        gates: `{arc: gate}`; None: all 1.
        train: Mode of batch norm and dropout.
        key: For random arcs in train mode.
    """
    return _factor(dag, gates, train, key, dag.graph.arcs)


def compose(factors: Iterable[Factor]) -> Composition:
    """Apply factors one after the other: `z -> L_n(... L_1(z))`.

    Args:
        factors: The first one is applied first.

    Returns:
        A pytree and a callable from state to state.
    """
    return Composition(tuple(factors))


def inverse(factors: Iterable[Factor]) -> Composition:
    """`L_1^{-1} o ... o L_n^{-1}`, each factor subtracting what it added.

    Args:
        factors: Factors whose composition is to be undone; no arc need be invertible.

    Returns:
        The composition of the inverses in reverse order, itself a sequence of factors.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> x = jnp.ones((2, 3))
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(3), nn.relu), x)
        >>> h = dj.compose(dj.factors(dag))(dj.inject(dag, x))
        >>> b = dj.inverse(dj.factors(dag))(h)
        >>> {node: float(abs(value).max()) for node, value in b.items()}
        {'in': 1.0, 'n1': 0.0, 'out': 0.0}
    """
    return Composition(tuple(factor.inverse() for factor in reversed(tuple(factors))))


def _factor(
    dag: DAG,
    gates: Mapping[str, Any] | None,
    train: bool,
    key: jax.Array | None,
    arcs: Iterable[Arc],
) -> Factor:
    dag.graph.select(gates or ())  # names that do not exist
    arcs = tuple(arcs)
    names = tuple(arc.name for arc in arcs)
    params, state = parts_of(dag, arcs)
    return Factor(
        params=params,
        state=state,
        gates=None if gates is None else {n: gates[n] for n in names if n in gates},
        key=key,
        graph=dag.graph,
        arcs=names,
        train=train,
    )
