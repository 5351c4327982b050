"""Flax modules as functions to trace."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
from flax import nnx

from dagjax.graph.core.dag import DAG
from dagjax.graph.core.functions import Linen
from dagjax.graph.tracing.plan import Granularity
from dagjax.graph.tracing.trace import trace
from dagjax.types import Key, PyTree


def from_linen(
    module: nn.Module,
    variables: Any,
    *inputs: Any,
    granularity: Granularity = "layers",
    train: bool = False,
    key: Key | None = None,
) -> DAG:
    """A Flax Linen module with its variables as a DAG.

    Args:
        module: The module; mode flags that it has are set as `train` says.
        variables: What `module.init` gave; `dag.params` is `variables["params"]`.
        *inputs: Arrays or shapes.
        granularity: As for `dagjax.trace`.
        train: Whether dropout draws and `dag.apply` returns updated statistics.
        key: For random layers in train mode; then the last input of the DAG.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> net = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
        >>> variables = net.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> dj.from_linen(net, variables, jnp.ones((1, 4))).graph.arcs
        (Arc('layers_0': x -> layers_0, dense 4x8 > relu), ...)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"a Flax Linen module was expected, got {type(module).__name__}"
        )
    held = dict(variables)
    params = held.pop("params", {})
    fn = functools.partial(_apply_linen, Linen(module), train, key is not None)
    vars(fn)["__qualname__"] = type(module).__name__  # what messages call it
    keys = () if key is None else (key,)
    return trace(fn, params, *inputs, *keys, granularity=granularity, state=held)


def _apply_linen(
    function: Linen, train: bool, random: bool, params: Any, state: Any, *x: PyTree
) -> tuple[Any, Any]:
    *data, key = x if random else (*x, None)
    return function.call(params, state, data, train, key)


def from_nnx(model: Any, *inputs: Any, granularity: Granularity = "layers") -> DAG:
    """A Flax NNX model as a DAG, in the mode it is in (`model.eval()` before).

    `dag.params` is `nnx.state(model, nnx.Param)`, so an `nnx.Optimizer` and
    `nnx.update(model, dag.params)` fit; all other variables are `dag.state["user"]`.

    Args:
        model: The model; it is not changed.
        *inputs: Arrays or shapes.
        granularity: As for `dagjax.trace`.

    Example:
        >>> import dagjax as dj, jax.numpy as jnp
        >>> from flax import nnx
        >>> net = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu)
        >>> dj.from_nnx(net, jnp.ones((1, 4))).graph.arcs
        (Arc('layers/0': x -> out, dense 4x8 > relu),)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"a Flax NNX module was expected, got a {type(model).__name__}")
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    fn = functools.partial(_apply_nnx, graphdef)
    vars(fn)["__qualname__"] = type(model).__name__  # what messages call it
    return trace(fn, params, *inputs, granularity=granularity, state=rest)


def _apply_nnx(graphdef: Any, params: Any, state: Any, *x: PyTree) -> tuple[Any, Any]:
    model = nnx.merge(graphdef, params, state)
    y = model(*x)
    return y, nnx.split(model, nnx.Param, ...)[2]
