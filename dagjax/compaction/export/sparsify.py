"""What cannot be cut, executed sparsely where that was measured to pay."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.compaction.channels.mask_checks import with_values
from dagjax.compaction.channels.traced_network import (
    TracedNetwork,
    example_of,
    traced_network_of,
)
from dagjax.compaction.removal.compact import mask_leaves, masked
from dagjax.graph.core.dag import count_params
from dagjax.graph.core.network import Network
from dagjax.graph.tracing.naming import path_of
from dagjax.jaxprs.interpret import Evaluation
from dagjax.jaxprs.program import Equation
from dagjax.jaxprs.versions import Atom, Var, shape_of
from dagjax.types import Array, Mask, Params, PyTree, State

# Time of a product with a matrix in BCSR over that of the dense one, by the share of
# zeros; CPU, 1024 x 1024, eight examples (benchmarks/sparsify.py; one example: 1.1 and
# 0.44, more of them: less). Between two rows nothing is assumed: the lower one holds.
PAYS = ((0.95, 0.57), (0.99, 0.31))
_ROWS = 8  # fewer are padded: products with a vector or two take four times as long
_SMALL = 256 * 256  # entries below which the call costs more than the product


@dataclasses.dataclass(frozen=True)
class Choice:
    """How one matrix is executed.

    Args:
        path: The parameter.
        zeros: Its share of zeros.
        sparse: Whether it is held in BCSR.
        why: In words.
    """

    path: str
    zeros: float
    sparse: bool
    why: str


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "state"],
    meta_fields=["form", "choices"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Sparse:
    """A network some of whose matrices are held as their entries.

    Args:
        form: The network's structure and shapes, static.
        choices: What is sparse, and why the rest is not.
        params: The tree of the parameters; a sparse one is the vector of its entries.
        state: `{"user": what is not trained, "rows": {place: (indices, starts)}}`.
    """

    form: _Form
    choices: tuple[Choice, ...]
    params: Params
    state: State

    def __call__(self, *xs: PyTree) -> jax.Array:
        """The outputs at `xs`."""
        source = self.form.source(jax.tree.map(shape_of, xs))
        leaves = jax.tree.leaves((self.params, self.state["user"]))
        args = [*leaves, *map(jnp.asarray, jax.tree.leaves(xs))]
        made = _run(source, args, self.state["rows"])
        return jax.tree.unflatten(source.result, made)

    @property
    def example_inputs(self) -> tuple[PyTree, ...]:
        """Shapes of inputs that it takes."""
        return self.form.inputs

    @property
    def updated_state(self) -> tuple[str, ...]:
        """Paths of the state that each call updates."""
        return self._dense.updated_state

    @property
    def user_state(self) -> PyTree:
        """That of the dense network."""
        return self._dense.user_state

    @property
    def _dense(self) -> PyTree:
        """The network that it was made of; its sparse matrices are the entries."""
        leaves = jax.tree.leaves((self.params, self.state["user"]))
        return self.form.tree.unflatten(leaves)

    def replace(self, **changes: Any) -> Sparse:
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        held = [c for c in self.choices if c.sparse]
        lines = [
            f"{c.path}: {c.zeros:.3f} zeros, {'BCSR' if c.sparse else 'dense'}: {c.why}"
            for c in self.choices
        ]
        head = f"Sparse({len(held)} of {len(self.choices)} matrices in BCSR, "
        return "\n".join([f"{head}{count_params(self.params):,} parameters)", *lines])


@dataclasses.dataclass(frozen=True)
class _Form:
    tree: PyTree
    shapes: tuple[PyTree, ...]
    inputs: tuple[PyTree, ...]

    def source(self, inputs: tuple[PyTree, ...]) -> TracedNetwork:
        return traced_network_of(self.tree.unflatten(self.shapes), inputs)


def sparsify(net: Network, mask: Mask, *, force: bool = False) -> Sparse:
    """Hold matrices that are mostly zeros as their entries, where that is quicker.

    On a CPU dense layers go to `jax.experimental.sparse.BCSR` from 95 percent of zeros
    on, where it was measured to take 0.57 of the time (0.31 at 99 percent; eight
    examples or more); all else stays dense, and the result says so. The parameters of a
    sparse matrix are the vector of its kept entries, with gradients.

    Args:
        net: A DAG, or a compacted network.
        mask: Bools like `net.params`; None for a leaf that is kept.
        force: Hold every matrix that can be so in BCSR, whatever it costs.

    Returns:
        A network with the values of the masked one.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> x = jnp.ones((2, 300))
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(400), nn.Dense(3)), x)
        >>> keep = lambda w: jax.random.uniform(jax.random.key(1), w.shape) < 0.02
        >>> mask = jax.tree.map(keep, dag.params)
        >>> net = dj.sparsify(dag, mask)
        >>> [(c.path, c.sparse) for c in net.choices]
        [('Dense/kernel', True), ('Dense_1/kernel', False)]
        >>> full = dag.replace(params=dj.masks.apply(mask, dag.params))
        >>> bool(jnp.allclose(net(x), full(x), atol=1e-5))
        True
    """
    source, flat = traced_network_of(with_values(net)), mask_leaves(net, mask)
    leaves = jax.tree.leaves((net.params, net.state))
    leaves = masked(leaves, flat)
    named = jax.tree_util.tree_leaves_with_path(net.params)
    able = _matrices(source, len(flat))
    choices, rows = [], {}
    for place, (path, _) in enumerate(named):
        if leaves[place].ndim < 2:
            continue
        choice = _choice(path_of(path), leaves[place], place in able, force)
        choices.append(choice)
        if choice.sparse:
            kept = flat[place] if flat[place] is not None else leaves[place] != 0
            leaves[place], rows[place] = _entries(leaves[place], np.asarray(kept))
    tree = jax.tree.structure((net.params, net.state))
    params, state = tree.unflatten(leaves)
    shapes = tuple(map(shape_of, jax.tree.leaves(net)))
    form = _Form(jax.tree.structure(net), shapes, example_of(net))
    return Sparse(form, tuple(choices), params, {"user": state, "rows": rows})


def _choice(path: str, x: Array, able: bool, force: bool) -> Choice:
    zeros = float(np.mean(np.asarray(x) == 0))
    say = lambda sparse, why: Choice(path, zeros, sparse, why)
    if not able:
        return say(False, "no product of data with this matrix alone")
    if force:
        return say(True, "as asked")
    if jax.default_backend() != "cpu":
        return say(False, f"nothing was measured on {jax.default_backend()}")
    if x.size < _SMALL:
        return say(False, f"smaller than {_SMALL:,} entries")
    times = [time for share, time in PAYS if zeros >= share]
    if not times:
        return say(False, f"pays from {PAYS[0][0]} zeros on")
    return say(True, f"{times[-1]} of the dense time was measured")


def _matrices(source: TracedNetwork, count: int) -> set[int]:
    """Places of parameters that only one product `x @ w` reads."""
    places = {v: i for i, v in enumerate(source.body.invars[:count])}
    readers: dict[int, list[Equation]] = {}
    for step in source.body.walk():
        for v in step.reads:
            if v in places:
                readers.setdefault(places[v], []).append(step)
    return {
        place
        for place, steps in readers.items()
        if len(steps) == 1 and _is_plain(steps[0], source.body.invars[place])
    }


def _is_plain(step: Equation, kernel: Atom) -> bool:
    if step.name != "dot_general" or step.eqn.invars[1] is not kernel:
        return False
    (lhs, rhs), (batch, _) = step.eqn.params["dimension_numbers"]
    last = len(step.eqn.invars[0].aval.shape) - 1
    plain = (tuple(lhs), tuple(rhs), tuple(batch)) == ((last,), (0,), ())
    return plain and len(kernel.aval.shape) == 2


def _entries(x: Array, kept: np.ndarray) -> tuple[Array, PyTree]:
    """The entries of the transposed matrix, row by row, and where they lie."""
    rows, columns = np.nonzero(kept.T)
    starts = np.searchsorted(rows, np.arange(kept.shape[1] + 1))
    entries = np.asarray(x).T[rows, columns]
    put = lambda a: jax.device_put(a.astype(np.int32))
    return jax.device_put(entries), (put(columns), put(starts))


class _SparseEvaluation(Evaluation):
    """Evaluates products with sparse matrices by their entries.

    Args:
        where: `{matrix: where its entries lie}`.
    """

    def __init__(self, where: dict[Var, PyTree]):
        self.where = where

    def equation(self, equation: Equation, values: list[PyTree]) -> PyTree:
        """The primitive, or the product with a sparse matrix."""
        where = [self.where[v] for v in equation.reads if v in self.where]
        if not where:
            return super().equation(equation, values)
        return [_product(equation, where[0], *values)]


def _run(
    source: TracedNetwork, args: list[PyTree], rows: dict[int, PyTree]
) -> list[PyTree]:
    """The program, some of whose parameters are the entries of sparse matrices."""
    where = {source.body.invars[leaf]: entries for leaf, entries in rows.items()}
    return _SparseEvaluation(where).run(source.body, args)


class DenseEvaluation(Evaluation):
    """Evaluates sparse products with dense matrices: code that any XLA knows."""

    def equation(self, equation: Equation, values: list[PyTree]) -> PyTree:
        """The primitive, or the product with the matrix of its entries."""
        if equation.name != "bcsr_dot_general":
            return super().equation(equation, values)
        from jax.experimental import sparse

        *entries, x = values
        params = equation.eqn.params
        matrix = sparse.BCSR(tuple(entries), shape=params["lhs_spinfo"].shape)
        numbers = params["dimension_numbers"]
        return [jax.lax.dot_general(matrix.todense(), x, numbers)]


def _product(step: Equation, where: PyTree, x: Array, entries: jax.Array) -> jax.Array:
    """`x @ w = (w^T x^T)^T`."""
    from jax.experimental import sparse  # it loads scipy.sparse

    columns, starts = where
    ins, outs = step.eqn.invars[1].aval.shape
    matrix = sparse.BCSR((entries, columns, starts), shape=(outs, ins))
    rows = x.reshape(-1, ins)
    padded = jnp.pad(rows, ((0, max(_ROWS - len(rows), 0)), (0, 0)))
    y = (matrix @ padded.T).T[: len(rows)]
    return y.reshape(*x.shape[:-1], outs).astype(step.eqn.outvars[0].aval.dtype)
