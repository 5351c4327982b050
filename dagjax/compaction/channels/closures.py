"""What goes with a class: the products that it is a factor of, and theirs."""

from __future__ import annotations

from typing import Any

import numpy as np

from dagjax.compaction.channels.labels import Array, Classes


def closures(classes: Classes, chosen: Array) -> Any:
    """`[chosen, classes]`, a sparse matrix of bools: what is removed with each class.

    Args:
        classes: Those of a program.
        chosen: Some of them.
    """
    from scipy import sparse

    count, factors = classes.count, classes.of[classes.factors]
    flat = np.repeat(classes.of[classes.flat], factors.shape[1])
    free = factors.ravel() != classes.pinned
    pairs = (factors.ravel()[free], flat[free])
    step = sparse.coo_matrix((np.ones(free.sum(), bool), pairs), (count, count)).tocsr()
    rows = np.arange(len(chosen))
    reach = sparse.coo_matrix(
        (np.ones(len(chosen), bool), (rows, chosen)), (len(chosen), count)
    ).tocsr()
    while True:  # products of products: each pass goes one deeper, so this ends
        more = (reach + reach @ step).astype(bool)
        if more.nnz == reach.nnz:
            closure = sparse.csr_matrix(more)
            closure.sort_indices()
            return closure
        reach = more


def over_closures(closure: Any, values: Array, join: np.ufunc = np.add) -> Array:
    """`[chosen]`: what the classes that go together have, summed or the largest.

    Args:
        closure: As `closures` gives it.
        values: `[classes]`.
        join: `np.add` or `np.maximum`.
    """
    if join is np.add:
        return closure @ values
    result, pairs = np.zeros(closure.shape[0]), closure.tocoo()
    join.at(result, pairs.row, values[pairs.col])
    return result
