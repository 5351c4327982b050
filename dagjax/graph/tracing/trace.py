"""Any JAX function as a DAG."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dagjax.graph.core.dag import DAG
from dagjax.graph.core.merges import Concat, Max, Product
from dagjax.graph.core.topology import Arc, Graph, Space
from dagjax.graph.tracing.cut import Join
from dagjax.graph.tracing.flow import Value
from dagjax.graph.tracing.naming import path_of
from dagjax.graph.tracing.plan import Granularity, Plan
from dagjax.graph.tracing.traced import Traced, TracedMerge, TracedSignature
from dagjax.graph.tracing.traced_function import TracedFunction
from dagjax.jaxprs.gc_paused import gc_paused
from dagjax.jaxprs.messages import TraceError, TraceWarning, name_of
from dagjax.jaxprs.versions import Aval, shape_of
from dagjax.types import Params, PyTree, State


@gc_paused()
def trace(
    fn: Callable[..., Any],
    params: Params,
    *inputs: PyTree,
    granularity: Granularity = "layers",
    state: State = None,
    unroll: bool = False,
) -> DAG:
    """A pure function as a DAG on its own tree of parameters.

        y = fn(params, *inputs)    or    y, state = fn(params, state, *inputs)

    The equations of the function's jaxpr are cut into arcs: where branches meet, there
    is a sum or a merge; what lies between is an arc. Nothing is computed: shapes are
    enough, and no memory is taken for them. Derivative rules, rematerialization and
    shardings inside the function stay what they are. (Ours; the DAG is that of Hwang
    2023, arXiv:2306.09707, as its abstract describes it.)

    Args:
        fn: A pure function of arrays or trees of them. Random keys among the inputs are
            no nodes; the arcs that draw read them.
        params: The parameters, any tree; `dag.params` is this tree.
        *inputs: Arrays `[B, ...]` or `jax.ShapeDtypeStruct`; the DAG takes any B.
        granularity: "layers" (an arc is a parametrized operation with the elementwise
            work after it), "blocks" (series contracted), "primitives" (every equation),
            or a function from an arc's name to its group.
        state: What is not trained, such as statistics; `dag.apply` returns it updated
            if `fn` returns `(y, state)`.
        unroll: Take `lax.scan` apart into its steps.

    Returns:
        A DAG. Its `state` holds `state` under "user", arrays that `fn` closed over
        under "consts", and keys under "keys".

    Raises:
        TraceError: If `fn` cannot be traced, has side effects, or has an output that no
            input changes.

    Example:
        >>> import dagjax as dj, jax.numpy as jnp
        >>> def net(params, x):
        ...     h = jnp.tanh(x @ params["up"])
        ...     return x + h @ params["down"]
        >>> params = {"up": jnp.ones((3, 5)), "down": jnp.ones((5, 3))}
        >>> dag = dj.trace(net, params, jnp.ones((1, 3)))
        >>> dag.graph.arcs
        (Arc('up': x -> up, dense 3x5 > tanh), Arc('down': up -> out, dense 5x3), ...)
        >>> dag(jnp.ones((7, 3))).shape
        (7, 3)
    """
    if not inputs:
        raise TraceError(
            "no inputs: dj.trace(fn, params, *inputs); Flax modules go to "
            "dj.from_linen and dj.from_nnx"
        )
    for what, tree in (("params", params), ("state", state), ("inputs", inputs)):
        _check_arrays(what, tree)
    shapes = [jax.tree.map(shape_of, tree) for tree in (params, state, inputs)]
    function = TracedFunction(fn, *shapes, granularity=granularity, unroll=unroll)
    _warn_of_unread(function.base)
    leaves = jax.tree.leaves(inputs)
    dag = dag_of(function, params, state)
    keys = [leaves[leaf] for leaf in function.base.key_places]
    return dag.replace(state=dag.state | {"keys": keys}) if keys else dag


def dag_of(function: TracedFunction, params: Params, state: State) -> DAG:
    """The DAG of a traced function, which gives it the arrays that it closed over."""
    parts = {"user": state, "consts": function.base.release()}
    dag_state = {name: part for name, part in parts.items() if jax.tree.leaves(part)}
    return DAG(_graph(function), params, dag_state)


def _graph(function: TracedFunction) -> Graph:
    plan = function.base
    arcs = [
        Arc(name, source, target, Traced(function, name), port)
        for name, (source, target, port) in plan.structure.items()
    ]
    called = plan.names.nodes
    return Graph(
        arcs,
        [called[v] for v in plan.inputs],
        dict.fromkeys(called[v] for v in plan.outvars),
        {called[v]: _merge(function, v, join) for v, join in plan.cut.merges.items()},
        {called[v]: _space(plan, v, function.batch) for v in plan.cut.nodes},
        signature=TracedSignature(function),
    )


def _merge(function: TracedFunction, value: Value, join: Join) -> Any:
    """The merge of the built graphs where there is one, else the equations."""
    (last,) = join.equations[-1:]
    alone = len(join.equations) == 1 and [*last.eqn.invars] == [*join.ports]
    alike = alone and len({v.aval.shape for v in join.ports}) == 1
    if alone and last.name == "concatenate":
        dimension, ndim = last.eqn.params["dimension"], value.aval.ndim
        return Concat(dimension - ndim if dimension == ndim - 1 else dimension)
    floats = alike and np.issubdtype(value.aval.dtype, np.inexact)
    # With one example an axis of size 1 may be another one's batch axis.
    if floats and function.batch != 1 and last.name in ("mul", "max"):
        return {"mul": Product(), "max": Max()}[last.name]
    return TracedMerge(function, function.base.names.nodes[value])


def _space(plan: Plan, value: Value, batch: int | None) -> Any:
    if value not in plan.cut.merges:
        return _space_of(value.aval, batch)
    return tuple(_space_of(v.aval, batch) for v in plan.cut.merges[value].ports)


def _space_of(aval: Aval, batch: int | None) -> Space:
    batched = aval.shape[:1] == (batch,)
    return Space(aval.shape[1:] if batched else aval.shape, str(aval.dtype), batched)


def _check_arrays(what: str, tree: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TraceError(
                f"{what}: the leaf {path_of(path)!r} is {leaf!r}, no array; "
                "make it one (jnp.asarray), bind a setting with functools.partial, or "
                "take the arrays of a model apart from the rest (eqx.partition)"
            )


def _warn_of_unread(plan: Plan) -> None:
    needed = plan.flow.cone([*plan.flow.outputs, *plan.state_values], ())
    read = {v for equation in needed for v in equation.reads}
    parameters = [
        (v, leaf) for v, leaf in plan.leaf_of.items() if leaf.tree == "params"
    ]
    unread = [leaf.path for v, leaf in parameters if v not in read]
    if unread:
        warnings.warn(
            f"{name_of(plan.function.fn)} does not use the parameters "
            f"{', '.join(unread[:8])}{', ...' if len(unread) > 8 else ''}; no arc "
            "reads them. Leave them out of params, or use them",
            TraceWarning,
            stacklevel=3,
        )
