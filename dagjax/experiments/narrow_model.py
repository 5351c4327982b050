"""A compacted network as a graph of narrower layers, for its mode of training."""

from __future__ import annotations

import jax
import numpy as np

from dagjax.compaction.removal.compacted import Small
from dagjax.experiments.model import Model
from dagjax.graph.core.functions import Function
from dagjax.graph.core.nested import Nested
from dagjax.graph.core.topology import Arc, Graph
from dagjax.graph.rewrite.width import has_features, with_features, with_functions
from dagjax.types import Array, Params

_TOLERANCE = 1e-4  # of the largest output


def narrow_model(model: Model, small: Small, x: Array) -> Model:
    """The graph with the widths of a compacted network: it can train batch norms.

    `dj.compact` cuts the function of inference; a graph whose layers have as many
    features as were kept is the same function there (compared at `x`), and has its
    mode of training. A dead channel before a batch norm emits the shift, 0 at the
    start: where something but a relu reads it, the masked network trains that shift
    and the two part.

    Raises:
        ValueError: If there is no such graph.
    """
    narrow = Model(_graph(model.graph, small.params), model.gated)
    theta, state = {"params": small.params, "gates": {}}, small.state["user"]
    why = "it has a training mode (batch norm, dropout), and "
    if any(np.any(x) for x in jax.tree.leaves(small.state["folded"])):
        raise ValueError(f"{why}dead channels emit constants that would be trained")
    try:
        wanted = narrow.shapes(x)
    except Exception as error:  # whatever a module says to another width
        raise ValueError(f"{why}its layers cannot be narrowed") from error
    shape = lambda tree: jax.tree.map(np.shape, tree)
    if shape((theta, state)) != shape(wanted[:2]):
        raise ValueError(f"{why}its layers cannot be narrowed to what is left")
    if not _close(jax.jit(narrow.apply)(theta, state, x)[0], small(x)):
        raise ValueError(f"{why}narrower layers are another function")
    return narrow


def _graph(graph: Graph, params: Params) -> Graph:
    """The same layers, as wide as their kernels."""

    def change(arc: Arc) -> Function:
        fn, arc_params = arc.fn, params.get(arc.params_name, {})
        if isinstance(fn, Nested):
            return Nested(_graph(fn.fn, arc_params))
        kernel = arc_params.get("kernel") if isinstance(arc_params, dict) else None
        if kernel is None or not has_features(fn):
            return fn
        return with_features(fn, kernel.shape[-1])

    return with_functions(graph, change)


def _close(one: Array, two: Array) -> bool:
    one, two = np.asarray(one), np.asarray(two)
    return bool(np.abs(one - two).max() <= _TOLERANCE * max(np.abs(one).max(), 1e-30))
