"""Unit lower-triangular block matrices: rows and columns are the nodes of a graph."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

Vector = dict[str, jax.Array]  # {node: [dimension]}
Blocks = dict[tuple[str, str], jax.Array]  # {(row, column): [rows, columns]}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["blocks"], meta_fields=["nodes"]
)
@dataclasses.dataclass(frozen=True)
class BlockMatrix:
    """`I + sum of blocks`, each block left of the diagonal.

    The product of two, the inverse and the absolute value are of the same kind; every
    determinant is 1.

    Args:
        blocks: `{(row, column): array}`; what is absent is 0, the diagonal is I.
        nodes: `(name, dimension)` of the nodes in level order.

    Example:
        >>> import jax.numpy as jnp
        >>> L = BlockMatrix({("y", "x"): 2 * jnp.ones((1, 1))}, (("x", 1), ("y", 1)))
        >>> print((L @ L).dense())
        [[1. 0.]
         [4. 1.]]
        >>> print(L.inverse().dense())
        [[ 1.  0.]
         [-2.  1.]]
    """

    blocks: Blocks
    nodes: tuple[tuple[str, int], ...]

    @property
    def sizes(self) -> dict[str, int]:
        """`{node: dimension}`, in level order."""
        return dict(self.nodes)

    def __matmul__(self, other: BlockMatrix) -> BlockMatrix:
        """`(I + A)(I + B) = I + A + B + A B`."""
        products = [
            ((row, column), left @ right)
            for (row, middle), left in self.blocks.items()
            for (_, column), right in other._rows.get(middle, ())
        ]
        terms = itertools.chain(self.blocks.items(), other.blocks.items(), products)
        return BlockMatrix(summed(terms), self.nodes)

    def __call__(self, vector: Vector) -> Vector:
        """The matrix times a vector."""
        result = dict(vector)
        for (row, column), block in self.blocks.items():
            result[row] = result[row] + block @ vector[column]
        return result

    def inverse(self) -> BlockMatrix:
        """By forward substitution: `X = I - A X`, row by row."""
        rows: dict[str, Blocks] = {}
        for node, _ in self.nodes:
            row: Blocks = {}
            for (_, middle), block in self._rows.get(node, ()):
                terms = {(node, column): block @ b for (_, column), b in
                         rows.get(middle, {}).items()}  # fmt: skip
                for place, term in {(node, middle): block, **terms}.items():
                    row[place] = row[place] - term if place in row else -term
            rows[node] = row
        return BlockMatrix({p: b for row in rows.values() for p, b in row.items()},
                           self.nodes)  # fmt: skip

    def block(self, row: str, column: str) -> jax.Array:
        """One block; the identity on the diagonal, 0 where nothing stands."""
        shape, dtype = (self.sizes[row], self.sizes[column]), self.dtype
        if row == column:
            return jnp.eye(*shape, dtype=dtype)
        return self.blocks.get((row, column), jnp.zeros(shape, dtype))

    @property
    def dtype(self) -> jnp.dtype:
        """Of the blocks."""
        return jnp.result_type(*self.blocks.values(), jnp.float32)

    def dense(self) -> jax.Array:
        """The whole matrix, `[dimension, dimension]`."""
        names = [name for name, _ in self.nodes]
        return jnp.block([[self.block(r, c) for c in names] for r in names])

    def __abs__(self) -> BlockMatrix:
        """Entry by entry: products of these sum absolute weights over all paths."""
        return BlockMatrix({p: abs(b) for p, b in self.blocks.items()}, self.nodes)

    @functools.cached_property
    def _rows(self) -> dict[str, list[tuple[tuple[str, str], jax.Array]]]:
        rows: dict[str, list[tuple[tuple[str, str], jax.Array]]] = {}
        for place, block in self.blocks.items():
            rows.setdefault(place[0], []).append((place, block))
        return rows

    def __repr__(self) -> str:
        n = sum(size for _, size in self.nodes)
        places = ", ".join(f"{row} <- {column}" for row, column in self.blocks)
        return f"BlockMatrix({n} x {n}: I + [{places}])"


def summed(terms: Iterable[tuple[tuple[str, str], jax.Array]]) -> Blocks:
    """`{place: sum of the blocks there}`."""
    total: Blocks = {}
    for place, block in terms:
        total[place] = total[place] + block if place in total else block
    return total


def product(matrices: Iterable[BlockMatrix]) -> BlockMatrix:
    """`L_n ... L_1` of the factors `L_1, ..., L_n`.

    Args:
        matrices: At least one; the first is applied first.
    """
    return functools.reduce(lambda done, factor: factor @ done, matrices)
