"""How much each entry matters: `score(key, params, mask, batch) -> scores`.

Higher is kept. Builders that need a loss take `loss(params, batch) -> scalar`. `params`
may be weights or gates: the mask says what is scored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from dagjax.sparsity import masks
from dagjax.types import Mask, Params, PyTree

Loss = Callable[[Any, Any], jax.Array]


class Score(Protocol):
    """A pure function of parameters, mask and data."""

    def __call__(
        self, key: jax.Array, params: Params, mask: Mask, batch: PyTree
    ) -> PyTree:
        """Scores shaped like the mask, None where it is None."""
        ...


def magnitude(key: jax.Array, params: Params, mask: Mask, batch: PyTree) -> PyTree:
    """`|w|` (Han et al. 2015).

    Example:
        >>> import jax.numpy as jnp
        >>> w = jnp.array([-2.0, 1.0])
        >>> print(magnitude(None, w, masks.full(w, lambda path, x: True), None))
        [2. 1.]
    """
    del key, batch
    return masks.tree_map(lambda _, w: _absolute(w), mask, params)


def _absolute(w: jax.Array) -> jax.Array:
    """Magnitudes; of signed integers without a sign, as the least has no negative."""
    if not jnp.issubdtype(w.dtype, jnp.signedinteger):
        return jnp.abs(w)
    unsigned = jnp.dtype(f"u{w.dtype}")
    return jax.lax.bitcast_convert_type(jnp.abs(w), unsigned)


def random(key: jax.Array, params: Params, mask: Mask, batch: PyTree) -> PyTree:
    """Uniform in [0, 1): the control of every other score."""
    del params, batch
    leaves, tree = jax.tree.flatten(mask)
    keys = jax.random.split(key, len(leaves))
    draws = [jax.random.uniform(k, m.shape) for k, m in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, draws)


def taylor(loss: Loss) -> Score:
    """`|w * dloss/dw|`, the first-order change of the loss (Molchanov et al. 2017).

    Args:
        loss: `loss(params, batch) -> scalar`.

    Example:
        >>> import jax.numpy as jnp
        >>> score = taylor(lambda w, batch: (w * batch).sum())
        >>> w = jnp.array([1.0, 2.0])
        >>> mask = masks.full(w, lambda path, x: True)
        >>> print(score(None, w, mask, jnp.array([3.0, -5.0])))
        [ 3. 10.]
    """

    def score(key: jax.Array, params: Params, mask: Mask, batch: PyTree) -> PyTree:
        del key
        grads = jax.grad(loss)(masks.apply(mask, params), batch)
        return masks.tree_map(lambda _, w, g: jnp.abs(w * g), mask, params, grads)

    return score


def gate(loss: Loss) -> Score:
    """`|dloss/dgate|` at open gates: all arcs from one forward and one backward pass.

    The gradient with respect to the gate of an arc `u -> v` is `<dloss/dh_v, f(h_u)>`.

    Args:
        loss: `loss(gates, batch) -> scalar`.

    Example:
        >>> import dagjax as dj, jax, jax.numpy as jnp
        >>> x = jnp.ones((2, 8, 8, 1))
        >>> dag = dj.init(jax.random.key(0), dj.zoo.resnet(8), x)
        >>> score = gate(lambda gates, x: dag(x, gates=gates).sum())
        >>> mask = masks.full(dj.gates(dag), lambda path, g: True)
        >>> sorted(score(None, dj.gates(dag), mask, x))[:3]
        ['block1/branch', 'block1/skip', 'block2/branch']
    """

    def score(key: jax.Array, params: Params, mask: Mask, batch: PyTree) -> PyTree:
        del key
        open_gate = lambda _, g: jnp.ones_like(g)
        gates = masks.tree_map(open_gate, mask, params, hole=lambda g: g)
        grads = jax.grad(loss)(masks.apply(mask, gates), batch)
        return masks.tree_map(lambda _, g: jnp.abs(g), mask, grads)

    return score
