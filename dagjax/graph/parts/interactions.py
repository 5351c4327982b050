"""What sets of arcs do together, and what each arc is worth.

With `h(m)` the output for gates m, the interaction of a set A of arcs is (Moebius,
Harsanyi 1963)

    Delta_A = sum over B within A of (-1)^|A - B| h(B)
    h(m) = sum over A within m of Delta_A

and the Shapley value (1953) of an arc is the sum of `Delta_A / |A|` over the sets that
contain it: its mean marginal contribution over all orders in which arcs can be added.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from dagjax.graph.core.dag import DAG
from dagjax.graph.parts.subnetworks import (
    LIMIT,
    Readout,
    all_subnetworks,
    all_vectors,
    names_of,
)
from dagjax.types import Array, PyTree

Progress = Callable[[int, int], None]


class Interactions(NamedTuple):
    """`Delta_A` of all sets A of arcs, in double precision."""

    arcs: tuple[str, ...]
    sets: np.ndarray  # [set, arc], bool
    deltas: np.ndarray  # [set, ...]

    def of(self, *arcs: str) -> np.ndarray:
        """The interaction of one set.

        Args:
            *arcs: Names; none for the empty set.

        Raises:
            ValueError: If an arc is none of those whose gates varied.
        """
        for arc in arcs:
            if arc not in self.arcs:
                raise ValueError(f"no arc {arc!r}; the arcs are {', '.join(self.arcs)}")
        place = np.array([arc in arcs for arc in self.arcs])
        return self.deltas[(self.sets == place).all(1).argmax()]

    def support(self, tolerance: float = 1e-6) -> dict[frozenset[str], float]:
        """`{set of arcs: largest entry}` of the interactions that are not zero.

        Args:
            tolerance: Relative to the largest entry of all.
        """
        flat = self.deltas.reshape(len(self.deltas), -1)
        size = np.abs(flat).max(1, initial=0)
        rows = np.flatnonzero(size > tolerance * size.max(initial=0))
        named = lambda row: frozenset(np.array(self.arcs)[self.sets[row]].tolist())
        return {named(row): float(size[row]) for row in rows}


def interactions(
    dag: DAG,
    *xs: PyTree,
    arcs: Iterable[str] | None = None,
    readout: Readout | None = None,
    progress: Progress | None = None,
) -> Interactions:
    """The exact decomposition of the output into interactions of arcs.

    For arcs with f(0) = 0 an interaction can be other than zero only for
    sub-architectures (`dj.subgraphs`) with one arc into the output: it is what a path
    is in a nonlinear network. In a linear one it is the path's product.

    Args:
        dag: The network.
        *xs: One array `[B, ...]` for each input node.
        arcs: Whose interactions; None: of all arcs, up to 20.
        readout: Of what; None: of the output.
        progress: Called with (gate vectors done, all).

    Example:
        >>> import dagjax as dj, jax, jax.numpy as jnp
        >>> dag = dj.init(jax.random.key(0), dj.residual(jnp.tanh), jnp.ones((1, 1)))
        >>> found = dj.interactions(dag, jnp.ones((1, 1)))
        >>> sorted(map(sorted, found.support()))     # they add up: none of both
        [['skip'], ['tanh']]
    """
    names, gates, outputs = all_subnetworks(
        dag, *xs, arcs=arcs, readout=readout, progress=progress
    )
    values = _cube(outputs, len(names))
    for axis in range(len(names)):
        off, on = np.split(values, 2, axis)
        values = np.concatenate([off, on - off], axis)
    deltas = values.reshape(len(gates), *values.shape[len(names) :])
    return Interactions(names, gates, deltas)


class Shapley(NamedTuple):
    """The worth of every arc, shaped like what was read."""

    values: dict[str, np.ndarray]
    errors: dict[str, np.ndarray] | None  # standard errors; None: exact
    total: np.ndarray  # h(all) - h(none), the sum of the values


def shapley(
    dag: DAG,
    *xs: PyTree,
    arcs: Iterable[str] | None = None,
    readout: Readout | None = None,
    samples: int | None = None,
    key: jax.Array | None = None,
    progress: Progress | None = None,
) -> Shapley:
    """The Shapley value of every arc: exact, or sampled with standard errors.

    Sampled values are unbiased: means over random orders, each with its reverse, of
    what an arc adds to those before it. Gate vectors of all orders are evaluated
    together and share what lies below (see `dj.all_subnetworks`).

    Args:
        dag: The network.
        *xs: One array `[B, ...]` for each input node.
        arcs: The players; None: all arcs. The others stay open.
        readout: The game's value, such as a loss; None: the output.
        samples: Pairs of orders; None: exact up to 20 arcs, else 100.
        key: For sampling.
        progress: Called with (gate vectors done, all).

    Raises:
        ValueError: If it has to sample and has no key.

    Example:
        >>> import dagjax as dj, jax, jax.numpy as jnp
        >>> dag = dj.init(jax.random.key(0), dj.residual(jnp.tanh), jnp.ones((1, 1)))
        >>> worth = dj.shapley(dag, jnp.ones((1, 1)))
        >>> {arc: round(float(value[0, 0]), 3) for arc, value in worth.values.items()}
        {'skip': 1.0, 'tanh': 0.762}
    """
    names = names_of(dag.graph, arcs)
    if not names or (samples is not None and samples < 1):
        raise ValueError(f"{len(names)} arcs, {samples} samples: at least one of each")
    evaluate = functools.partial(
        all_subnetworks, dag, *xs, arcs=names, readout=readout, progress=progress
    )
    if samples is None and len(names) <= LIMIT:
        return _exact(names, _cube(evaluate().outputs, len(names)))
    if key is None:
        raise ValueError(
            f"Shapley values are sampled if samples are given or arcs are more than "
            f"{LIMIT} (here {len(names)}); give key=jax.random.key(...)"
        )
    orders = _orders(key, 100 if samples is None else samples, len(names))
    outputs = evaluate(gates=_chains(orders)).outputs
    return _sampled(names, orders, _wide(outputs))


def _cube(outputs: Array, n: int) -> np.ndarray:
    """`[2, ..., 2, *shape]`, an axis for each arc."""
    values = _wide(outputs)
    return values.reshape((2,) * n + values.shape[1:])


def _wide(outputs: Array) -> np.ndarray:
    """One array in double precision."""
    if not isinstance(outputs, np.ndarray):
        raise ValueError(
            f"interactions are those of one array, got {jax.tree.structure(outputs)}: "
            "give a readout that returns one"
        )
    return outputs.astype(np.promote_types(outputs.dtype, np.float64))


def _exact(names: tuple[str, ...], cube: np.ndarray) -> Shapley:
    """The mean over sizes of the mean over sets of what an arc adds."""
    n = len(names)
    size = all_vectors(n - 1).sum(1) if n > 1 else np.zeros(1, int)
    weight = np.array([1 / (n * math.comb(n - 1, s)) for s in range(n)])[size]
    rest = cube.shape[n:]
    adds = lambda i: np.diff(cube, axis=i).reshape(-1, *rest)
    values = {a: np.tensordot(weight, adds(i), 1) for i, a in enumerate(names)}
    return Shapley(values, None, cube[(1,) * n] - cube[(0,) * n])


def _orders(key: jax.Array, samples: int, n: int) -> np.ndarray:
    """`[sample, 2, n]`: random orders and their reverses."""
    draw = jax.vmap(lambda key: jax.random.permutation(key, n))
    orders = np.asarray(draw(jax.random.split(key, samples)))
    return np.stack([orders, orders[:, ::-1]], 1)


def _chains(orders: np.ndarray) -> np.ndarray:
    """`[sample * 2 * (n + 1), n]`: arcs added one after the other, from none to all."""
    n = orders.shape[-1]
    position = np.argsort(orders, -1)
    chains = position[..., None, :] < np.arange(n + 1)[:, None]
    return chains.reshape(-1, n)


def _sampled(
    names: tuple[str, ...], orders: np.ndarray, outputs: np.ndarray
) -> Shapley:
    samples, _, n = orders.shape
    values = outputs.reshape(samples, 2, n + 1, *outputs.shape[1:])
    adds = np.diff(values, axis=2)
    position = np.argsort(orders, -1)
    index = position.reshape(position.shape + (1,) * (adds.ndim - 3))
    pairs = np.take_along_axis(adds, index, 2).mean(1)  # [sample, arc, ...]
    mean = pairs.mean(0)
    spread = pairs.std(0, ddof=1) if samples > 1 else np.full_like(mean, np.nan)
    return Shapley(
        dict(zip(names, mean, strict=True)),
        dict(zip(names, spread / math.sqrt(samples), strict=True)),
        values[0, 0, -1] - values[0, 0, 0],
    )
