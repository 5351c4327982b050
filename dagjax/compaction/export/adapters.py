"""A network as what other training loops take: a pair of apply and parameters, NNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.mask_checks import named, network
from dagjax.compaction.channels.traced_network import example_of, traced_network_of
from dagjax.compaction.removal.rounding import differing, runs_of
from dagjax.compaction.removal.verify import random_inputs
from dagjax.graph.core.network import Network
from dagjax.types import Params, PyTree


def as_function(net: Network) -> tuple[Callable[..., Any], Any]:
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
    params = network(net).params
    return jax.tree_util.Partial(_apply, net.replace(params=None)), params


def _apply(net: Network, params: Params, *xs: PyTree) -> PyTree:
    return net.replace(params=params)(*xs)


class NNXNetwork(nnx.Module):
    """A network as a Flax NNX module; `weights` holds an `nnx.Param` for each path."""

    def __init__(self, net: Network):
        leaves = named(net.params)
        self.weights = nnx.data({name: nnx.Param(x) for name, x in leaves.items()})
        self.held = nnx.data(jax.tree.map(nnx.Variable, jax.tree.leaves(net.state)))
        blank = net.replace(params=None, state=None)
        trees = jax.tree.structure(net.params), jax.tree.structure(net.state)
        self.form = nnx.static((jax.tree.structure(blank), *trees))

    def network(self) -> PyTree:
        """The network with the weights that the module has now."""
        tree, params, state = self.form
        weights = [w[...] for w in self.weights.values()]
        held = [v[...] for v in self.held]
        return tree.unflatten(()).replace(
            params=params.unflatten(weights), state=state.unflatten(held)
        )

    def __call__(self, *xs: PyTree) -> PyTree:
        """The outputs at `xs`."""
        return self.network()(*xs)


def to_nnx(net: Network, model: Any = None) -> PyTree:
    """A network as a Flax NNX module, to be trained with `nnx.Optimizer`.

    Args:
        net: A DAG, or a compacted network.
        model: The module that it came from by `dj.from_nnx`: a copy with the smaller
            arrays is returned, your own class, with its training mode. That is so where
            its methods read all sizes from the arrays; it is checked in inference mode.

    Raises:
        CompactionError: If the model does not compute the same with the smaller arrays
            (it holds a number of heads, or constants were folded): leave it away.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> dag = dj.init(jax.random.key(0), dj.series(nn.Dense(3)), jnp.ones((1, 4)))
        >>> model = dj.to_nnx(dag)
        >>> model(jnp.ones((5, 4))).shape, sorted(model.weights)
        ((5, 3), ['Dense/bias', 'Dense/kernel'])
        >>> from flax import nnx
        >>> mine = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)),
        ...                       nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
        >>> net = dj.from_nnx(mine, jnp.ones((1, 4)))
        >>> small = dj.compact(net, dj.prune_units(net, density=0.5)).net
        >>> dj.to_nnx(small, mine).layers[0].kernel.shape
        (4, 4)
    """
    return NNXNetwork(network(net)) if model is None else _filled(network(net), model)


def _filled(net: Network, model: nnx.Module) -> nnx.Module:
    """A copy of the model with the network's arrays."""
    copy = nnx.clone(model)
    try:
        nnx.update(copy, net.params, net.user_state)
        judge = nnx.clone(copy)
        judge.eval()
        source = traced_network_of(net, example_of(net))
        xs = random_inputs(source)
        again = lambda: runs_of(source.body, jax.tree.leaves((net, xs)))
        ours, theirs = jax.tree.leaves(net(*xs)), jax.tree.leaves(judge(*xs))
        same = not differing(ours, theirs, again)
    except Exception as error:
        raise CompactionError(f"{_NOT_HELD} ({str(error).splitlines()[0]})") from error
    if not same:
        raise CompactionError(_NOT_HELD)
    return copy


_NOT_HELD = (
    "the model does not compute the same with the smaller arrays: it holds sizes (a "
    "number of heads), or constants were folded; dj.to_nnx(net) without the model does"
)
