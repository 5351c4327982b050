"""Which entries stay: `select(scores, mask, density) -> mask`.

Laws: None stays None; new is a subset of old; kept = min(alive, round(density * N))
exactly, N the number of prunable entries of the group; equal scores fall by index, the
later one first; density 1 is the identity; safe under jit and vmap with traced density.

Nothing is sorted: the threshold is found by bisection on the bits of the scores, so
that only counts are needed (of each shard, where arrays are sharded).
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from dagjax.sparsity import masks, units
from dagjax.sparsity.masks import Path
from dagjax.types import Mask, PyTree, Scalar


class Selection(Protocol):
    """Keep the entries with the highest scores."""

    def __call__(self, scores: PyTree, mask: Mask, density: Scalar) -> Mask:
        """The new mask; `density` is a kept share in (0, 1], a number or an array."""
        ...


def grouped_topk(label: Callable[[Path], Hashable]) -> Selection:
    """The highest scores within every group of leaves.

    Args:
        label: `path -> group`, path as in `jax.tree_util`.

    Example:
        >>> import jax.numpy as jnp
        >>> scores = {"a1": jnp.array([1.0, 2.0]), "a2": jnp.array([3.0, 4.0])}
        >>> select = grouped_topk(lambda path: path[0].key[0])
        >>> select(scores, {"a1": scores["a1"] > 0, "a2": scores["a2"] > 0}, 0.5)["a1"]
        Array([False, False], dtype=bool)
    """

    def select(scores: PyTree, mask: Mask, density: Scalar) -> Mask:
        _check(density)
        leaves, tree = jax.tree_util.tree_flatten_with_path(mask)
        values = jax.tree.leaves(masks.tree_map(lambda _, s: s, mask, scores))
        groups: dict[Hashable, list[int]] = {}
        for i, (path, _) in enumerate(leaves):
            groups.setdefault(label(path), []).append(i)
        new: list[PyTree] = [None] * len(leaves)
        for members in groups.values():
            alive = [leaves[i][1] for i in members]
            total = _checked_total(alive)
            ours = _comparable([values[i] for i in members])
            keep = _topk(ours, alive, _wanted(density, total))
            for i, leaf in zip(members, keep, strict=True):
                new[i] = leaf
        return jax.tree.unflatten(tree, new)

    return select


def global_topk(scores: PyTree, mask: Mask, density: Scalar) -> Mask:
    """The highest scores of the whole tree.

    Args:
        scores: A tree of arrays, shaped like the mask.
        mask: What is alive.
        density: Kept share of all prunable entries, in (0, 1].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jax.random.normal(jax.random.key(0), (10, 10))
        >>> mask = global_topk(abs(w), w == w, 0.8)
        >>> 100 - masks.kept(mask).item()
        20
    """
    return grouped_topk(lambda path: 0)(scores, mask, density)


def per_leaf_topk(scores: PyTree, mask: Mask, density: Scalar) -> Mask:
    """The highest scores of every leaf, at one density.

    Args:
        scores: A tree of arrays, shaped like the mask.
        mask: What is alive.
        density: Kept share of every leaf, in (0, 1].
    """
    return grouped_topk(masks.own_label)(scores, mask, density)


def structured(axis: int = -1, select: Selection = global_topk) -> Selection:
    """Whole slices along an axis: neurons of a dense layer, channels of a convolution.

    The leaves of one layer (kernel and bias) are cut together; a unit's score is the
    mean over its entries, and the density counts units.

    Args:
        axis: The axis along which units lie; -1 is the output axis of Flax layers.
        select: How units are chosen.

    Example:
        >>> import jax.numpy as jnp
        >>> w = {"kernel": jnp.array([[1.0, 5.0], [1.0, 0.0]])}
        >>> print(structured()(w, masks.full(w), 0.5)["kernel"])
        [[False  True]
         [False  True]]
    """

    def choose(scores: PyTree, mask: Mask, density: Scalar) -> Mask:
        alive = units.gather(mask, axis, jnp.any)
        only = lambda m, s: jnp.where(m, _wide(s), jnp.zeros((), _wide(s).dtype))
        sums = units.gather(masks.tree_map(only, mask, scores), axis, jnp.sum)
        ones = masks.tree_map(lambda m: jnp.ones(m.shape), mask)
        sizes = units.gather(ones, axis, jnp.sum)
        ratio = jax.tree.map(lambda s, n: s / n.astype(s.dtype), sums, sizes)
        kept = units.spread(select(ratio, alive, density), mask, axis)
        return masks.tree_map(jnp.logical_and, mask, kept)

    return choose


def _wide(scores: jax.Array) -> jax.Array:
    """Scores in float32, or in float64 where they are."""
    scores = jnp.asarray(scores)
    return scores.astype(jnp.float64 if scores.dtype == jnp.float64 else jnp.float32)


def _check(density: Scalar) -> None:
    if isinstance(density, numbers.Real) and not 0 < float(density) <= 1:
        raise ValueError(
            f"density {density}: expected a kept share in (0, 1]; 0.2 keeps 20 percent"
        )


@jax.jit  # called eagerly, it would compile its search anew every time
def _topk(
    scores: Sequence[jax.Array], alive: Sequence[jax.Array], wanted: Any
) -> list[jax.Array]:
    total = sum(a.size for a in alive)
    dtype = jnp.result_type(*scores)
    keys = [_order_bits(s.astype(dtype), a) for s, a in zip(scores, alive, strict=True)]
    count = lambda test: sum(jnp.sum(test(u), dtype=jnp.int32) for u in keys)
    k = jnp.minimum(wanted, count(lambda u: u > 0))
    # The largest threshold that leaves at least k entries at or above it.
    least = _largest(lambda t: count(lambda u: u >= t) - k, keys[0].dtype)
    ties = k - count(lambda u: u > least)
    starts = [sum(u.size for u in keys[:i]) for i in range(len(keys))]
    index = [
        jnp.arange(start, start + u.size, dtype=jnp.uint32).reshape(u.shape)
        for start, u in zip(starts, keys, strict=True)
    ]
    tied = list(zip(keys, index, strict=True))
    before = lambda end: sum(
        jnp.sum((u == least) & (i < end), dtype=jnp.int32) for u, i in tied
    )
    # The largest index before which no more than the missing ties lie.
    spare = lambda end: ties - before(end)
    end = _largest(spare, jnp.uint32, total.bit_length())
    return [(u > least) | ((u == least) & (i < end) & (u > 0)) for u, i in tied]


def _wanted(density: Scalar, total: int) -> jax.Array:
    """`round(density * total)`, half to even.

    A float32 density may be a little less than the number that is meant; a product that
    only rounding makes a half is rounded down.
    """
    if isinstance(density, numbers.Real):
        return jnp.asarray(round(float(density) * total), jnp.int32)
    share, count = jnp.asarray(density, jnp.float32), jnp.float32(total)
    product = share * count
    low, rest = jnp.floor(product), _rounding_error(share, count, product)
    below = (product - low == 0.5) & (rest < 0)
    return jnp.where(below, low, jnp.round(product)).astype(jnp.int32)


def _rounding_error(a: jax.Array, b: jax.Array, product: jax.Array) -> jax.Array:
    """`a b - product`, exactly, of float32 numbers in halves (Dekker 1971)."""
    high = lambda x: (x * 4097) - (x * 4097 - x)
    a1, b1 = high(a), high(b)
    a2, b2 = a - a1, b - b1
    return ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def _checked_total(alive: Sequence[jax.Array]) -> int:
    total = sum(a.size for a in alive)
    if total >= 2**31:
        raise ValueError(
            f"{total:,} entries compete, and 2^31 - 1 at most are counted: choose by "
            "layer (dj.selection.per_leaf_topk) or by units"
        )
    return total


def _comparable(scores: Sequence[Any]) -> list[jax.Array]:
    """Scores of one type in which all of them are exact; else their ranks."""
    known = [s for s in scores if not isinstance(s, Tracer)]
    wide = len(known) == len(scores) and any(
        s.dtype.itemsize == 8 and jnp.asarray(s).dtype != s.dtype for s in known
    )
    if wide:
        return _ranks([np.asarray(s) for s in known])
    arrays = [jnp.asarray(s) for s in scores]
    integers = [jnp.issubdtype(a.dtype, jnp.integer) for a in arrays]
    if all(integers):
        largest = jnp.result_type(*arrays, jnp.int32)
        return [a.astype(largest) for a in arrays]
    return [*map(_wide, arrays)]


def _ranks(scores: Sequence[np.ndarray]) -> list[jax.Array]:
    """The place of each score among all of them; equal ones have one."""
    flat = np.concatenate([s.ravel() for s in scores])
    _, rank = np.unique(flat, return_inverse=True)
    rank = np.where(np.isnan(flat), -1, rank.reshape(-1))
    parts = np.split(rank, np.cumsum([s.size for s in scores])[:-1])
    return [
        jnp.asarray(part.reshape(s.shape), jnp.int32)
        for part, s in zip(parts, scores, strict=True)
    ]


def _largest(
    spare: Callable[[jax.Array], jax.Array], dtype: DTypeLike, bits: int | None = None
) -> jax.Array:
    """The largest number with something to spare (0 has), found bit by bit.

    The search ends early where nothing is to spare: all larger numbers of the interval
    that is left select the same entries or too few.
    """
    bits = jnp.iinfo(dtype).bits if bits is None else bits
    zero, most = jnp.zeros((), dtype), jnp.asarray(2**bits - 1, dtype)

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        bit, largest = carry
        left = spare(largest | bit)
        largest = jnp.where(left >= 0, largest | bit, largest)
        return jnp.where(left == 0, zero, bit >> jnp.ones((), dtype)), largest

    done = spare(most) >= 0
    first = jnp.where(done, zero, jnp.asarray(2 ** (bits - 1), dtype))
    largest = jnp.where(done, most, zero)
    return jax.lax.while_loop(lambda carry: carry[0] > 0, step, (first, largest))[1]


def _order_bits(scores: jax.Array, alive: jax.Array) -> jax.Array:
    """Unsigned numbers in the order of the scores; 0 for the dead, 1 for NaN."""
    unsigned = jnp.uint64 if scores.dtype.itemsize == 8 else jnp.uint32
    if jnp.issubdtype(scores.dtype, jnp.integer):
        order = _order_of_integers(scores, unsigned)
        return jnp.where(alive, order, jnp.zeros_like(order))
    bits = jax.lax.bitcast_convert_type(scores, unsigned)
    sign = jnp.ones((), unsigned) << (jnp.iinfo(unsigned).bits - 1)
    bits = jnp.where(bits == sign, jnp.zeros_like(bits), bits)  # -0.0 ties with 0.0
    order = jnp.where(bits >= sign, ~bits, bits | sign)
    order = jnp.where(jnp.isnan(scores), jnp.ones_like(order), order)
    return jnp.where(alive, order, jnp.zeros_like(order))


def _order_of_integers(scores: jax.Array, unsigned: DTypeLike) -> jax.Array:
    """Unsigned numbers in the order of integers, from 2 on; the last three are one."""
    info = jnp.iinfo(scores.dtype)
    bits = jax.lax.bitcast_convert_type(scores, unsigned)
    order = bits ^ jnp.asarray(info.min % 2**info.bits, unsigned)
    top = jnp.asarray(jnp.iinfo(unsigned).max - 2, unsigned)
    return jnp.minimum(order, top) + jnp.asarray(2, unsigned)
