"""A network as a program: its leaves are arguments beside the data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable

import jax

from dagjax.compaction.channels.coupling import Channels, CompactionError
from dagjax.compaction.channels.mask_checks import network
from dagjax.graph.core.network import Network
from dagjax.graph.tracing.naming import path_of
from dagjax.jaxprs.program import Program, program_of
from dagjax.jaxprs.versions import shape_of, trace_context
from dagjax.types import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class TracedNetwork:
    """A network, traced at shapes of its inputs.

    Args:
        body: Its program, of its leaves and the leaves of the inputs.
        result: The tree of its result.
        free: How many leaves it has.
        inputs: The shapes of the inputs, a tuple of trees.
    """

    body: Program
    result: PyTree
    free: int
    inputs: tuple[PyTree, ...]

    @functools.cached_property
    def channels(self) -> Channels:
        """Which indices of its values are cut together."""
        return Channels(self.body, self.free, self._outputs)

    @property
    def _outputs(self) -> list[str]:
        tree = self.result.unflatten(range(self.result.num_leaves))
        return [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

    @functools.cached_property
    def _loose(self) -> Channels:
        return Channels(self.body, self.free, self._outputs, coupled=False)

    def channels_of(self, coupled: bool) -> Channels:
        """The same with the features of kernels tied to channels, or not."""
        return self.channels if coupled else self._loose


def traced_network_of(
    net: Network, inputs: tuple[PyTree, ...] | None = None
) -> TracedNetwork:
    """A network's program; traced once for networks of one structure.

    Args:
        net: A DAG or a compacted network.
        inputs: Shapes of its inputs; by default those that it was made for.
    """
    inputs = example_of(net) if inputs is None else inputs
    leaves, tree = jax.tree.flatten(net)
    xs, form = jax.tree.flatten(inputs)
    shapes = tuple(map(shape_of, leaves)), form, tuple(map(shape_of, xs))
    return _traced(trace_context(), tree, *shapes)


@functools.lru_cache(maxsize=16)
def _traced(
    context: Hashable, tree: PyTree, shapes: PyTree, form: PyTree, xs: PyTree
) -> TracedNetwork:
    del context
    inputs = form.unflatten(xs)
    run = lambda leaves, xs: tree.unflatten(leaves)(*xs)
    closed, result = jax.make_jaxpr(run, return_shape=True)(list(shapes), inputs)
    body = program_of(closed)
    return TracedNetwork(body, jax.tree.structure(result), len(shapes), inputs)


def example_of(net: Network) -> tuple[PyTree, ...]:
    """Shapes of inputs that the network takes.

    Raises:
        CompactionError: If the network does not know them.
    """
    inputs = network(net).example_inputs
    if inputs is None:
        raise CompactionError("the graph knows no shapes; make the network by dj.init")
    return inputs


def resized(inputs: tuple[PyTree, ...], batch: int) -> tuple[PyTree, ...]:
    """Shapes of inputs at another batch size, the first axis of the first of them."""
    old = batch_of(inputs)
    size = lambda x: x.update(shape=(batch, *x.shape[1:]))
    return jax.tree.map(lambda x: size(x) if x.shape[:1] == (old,) else x, inputs)


def batch_of(inputs: tuple[PyTree, ...]) -> int | None:
    """The batch size of inputs, None if none has an axis."""
    return next((x.shape[0] for x in jax.tree.leaves(inputs) if x.shape), None)
