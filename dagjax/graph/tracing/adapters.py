"""Flax modules as functions to trace."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from dagjax.graph.core.dag import DAG
from dagjax.graph.core.functions import Linen
from dagjax.graph.tracing.naming import path_of
from dagjax.graph.tracing.plan import Granularity
from dagjax.graph.tracing.trace import trace
from dagjax.jaxprs.messages import TraceError
from dagjax.types import Key, Params, PyTree, State


def from_linen(
    module: nn.Module,
    variables: PyTree,
    *inputs: PyTree,
    granularity: Granularity = "layers",
    train: bool = False,
    key: Key | None = None,
    unroll: bool = False,
) -> DAG:
    """A Flax Linen module with its variables as a DAG.

    Args:
        module: The module; mode flags that it has are set as `train` says.
        variables: What `module.init` gave; `dag.params` is `variables["params"]`.
        *inputs: Arrays or shapes.
        granularity: As for `dagjax.trace`.
        train: Whether dropout draws and `dag.apply` returns updated statistics.
        key: For random layers in train mode; then the last input of the DAG.
        unroll: As for `dagjax.trace`.

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
    state = dict(variables)
    params = state.pop("params", {})
    fn = functools.partial(_apply_linen, Linen(module), train, key is not None)
    vars(fn)["__qualname__"] = type(module).__name__  # what messages call it
    keys = () if key is None else (key,)
    return trace(
        fn, params, *inputs, *keys, granularity=granularity, state=state, unroll=unroll
    )


def _apply_linen(
    function: Linen, train: bool, random: bool, params: Params, state: State, *x: PyTree
) -> tuple[Any, Any]:
    *data, key = x if random else (*x, None)
    return function.call(params, state, data, train, key)


def from_nnx(
    model: Any,
    *inputs: Any,
    granularity: Granularity = "layers",
    unroll: bool = False,
) -> DAG:
    """A Flax NNX model as a DAG, in the mode it is in (`model.eval()` before).

    `dag.params` is `nnx.state(model, nnx.Param)`, so an `nnx.Optimizer` and
    `nnx.update(model, dag.params)` fit; all other variables are `dag.state["user"]`,
    but for what the model sows (`nnx.Intermediate`), which is left out.

    Args:
        model: The model; it is not changed.
        *inputs: Arrays or shapes.
        granularity: As for `dagjax.trace`.
        unroll: As for `dagjax.trace`.

    Example:
        >>> import dagjax as dj, jax.numpy as jnp
        >>> from flax import nnx
        >>> net = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu)
        >>> dj.from_nnx(net, jnp.ones((1, 4))).graph.arcs
        (Arc('layers/0': x -> out, dense 4x8 > relu),)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"a Flax NNX module was expected, got a {type(model).__name__}")
    model = nnx.clone(model)
    nnx.pop(model, nnx.Intermediate)  # what an earlier call has left there
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    fn = functools.partial(_apply_nnx, graphdef)
    vars(fn)["__qualname__"] = type(model).__name__  # what messages call it
    return trace(
        fn, params, *inputs, granularity=granularity, state=rest, unroll=unroll
    )


def _apply_nnx(graphdef: Any, params: Any, state: Any, *x: PyTree) -> tuple[Any, Any]:
    """The model's value and state; what it sows is neither.

    Raises:
        TraceError: If the call makes variables that the model did not have.
    """
    model = nnx.merge(graphdef, params, state)
    y = model(*x)
    nnx.pop(model, nnx.Intermediate)
    new = nnx.split(model, nnx.Param, ...)[2]
    paths = lambda tree: {p for p, _ in jax.tree_util.tree_leaves_with_path(tree)}
    if new_paths := sorted(map(path_of, paths(new) - paths(state))):
        raise TraceError(
            f"the call makes new variables ({', '.join(new_paths)}); make them before "
            "the model is traced, as init_cache does"
        )
    return y, new
