"""A network as what other training loops take: a pair of apply and parameters, NNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from dagjax.graph.tracing.naming import path_of


def as_function(net: Any) -> tuple[Callable[..., Any], Any]:
    """A network as a pure function `apply(params, *inputs)` and its parameters.

    `apply` is a pytree that holds what is not trained: pass it into compiled functions
    as an argument, or close over it.

    Args:
        net: A DAG, or a compacted network.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(3)), jnp.ones((1, 4)))
        >>> apply, params = dj.as_function(dag)
        >>> jax.jit(apply)(params, jnp.ones((5, 4))).shape
        (5, 3)
    """
    return jax.tree_util.Partial(_apply, net.replace(params=None)), net.params


def _apply(net: Any, params: Any, *xs: Any) -> Any:
    return net.replace(params=params)(*xs)


class NNXNetwork(nnx.Module):
    """A network as a Flax NNX module; `weights` holds an `nnx.Param` for each path."""

    def __init__(self, net: Any):
        leaves = jax.tree_util.tree_leaves_with_path(net.params)
        self.weights = nnx.data({path_of(p): nnx.Param(x) for p, x in leaves})
        self.held = nnx.data(jax.tree.map(nnx.Variable, jax.tree.leaves(net.state)))
        blank = net.replace(params=None, state=None)
        trees = jax.tree.structure(net.params), jax.tree.structure(net.state)
        self.form = nnx.static((jax.tree.structure(blank), *trees))

    def network(self) -> Any:
        """The network with the weights that the module has now."""
        tree, params, state = self.form
        weights = [w[...] for w in self.weights.values()]
        held = [v[...] for v in self.held]
        return tree.unflatten(()).replace(
            params=params.unflatten(weights), state=state.unflatten(held)
        )

    def __call__(self, *xs: Any) -> Any:
        """The outputs at `xs`."""
        return self.network()(*xs)


def to_nnx(net: Any) -> NNXNetwork:
    """A network as a Flax NNX module, to be trained with `nnx.Optimizer`.

    Args:
        net: A DAG, or a compacted network.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(3)), jnp.ones((1, 4)))
        >>> model = dj.to_nnx(dag)
        >>> model(jnp.ones((5, 4))).shape, sorted(model.weights)
        ((5, 3), ['Dense/bias', 'Dense/kernel'])
    """
    return NNXNetwork(net)
