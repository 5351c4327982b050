"""Densely connected networks, whose concatenations are sums.

A convolution of a concatenation is the sum of convolutions of its pieces. Batch
normalization and relu act channel by channel and average pooling is linear, so that an
arc `bn > relu > conv` leads from each layer to each later one, and a transition or the
readout is a sum of one arc from each layer.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn

from dagjax.graph.core.combine import GraphBuilder, series
from dagjax.graph.core.functions import identity
from dagjax.graph.core.merges import Concat
from dagjax.graph.core.topology import Graph
from dagjax.graph.zoo.layers import (
    Shape,
    avg_pool,
    conv2d,
    global_mean,
    part_of,
    reading_images,
)
from dagjax.types import Conv, PyTree

Layers = Callable[[int, int], list[PyTree]]  # of the arc from layer j of n


def dense_block(
    k: int = 4, growth: int = 12, *, readout: bool = False, conv: Conv | None = None
) -> Graph:
    """A dense block (Huang et al. 2017): every layer reads all before it.

    Args:
        k: Number of layers.
        growth: Channels of a layer.
        readout: Whether a node that concatenates all layers is the output; otherwise
            it is the last layer.
        conv: `conv_general_dilated` of the convolutions; None: XLA's.

    Raises:
        ValueError: If there is no layer.

    Example:
        >>> dense_block(4), dense_block(4, readout=True)
        (Graph(5 nodes, 10 arcs, 4 levels: x0 -> x4),
         Graph(6 nodes, 15 arcs, 5 levels: x0 -> all))
    """
    if k < 1:
        raise ValueError(f"dense_block k {k}: expected at least one layer")
    b = GraphBuilder()
    layers = _grow(b, b.input("x0"), k, growth, conv)
    if not readout:
        return b.build(layers[-1])
    b.merge("all", Concat())
    for j, layer in enumerate(layers):
        b.arc(f"{layer}_all", layer, "all", identity, port=j)
    return b.build("all")


def densenet(
    depth: int = 40,
    classes: int = 10,
    *,
    growth: int = 12,
    blocks: int = 3,
    compression: float = 1.0,
    width: int = 16,
    input_shape: Shape = (32, 32, 3),
    conv: Conv | None = None,
) -> Graph:
    """DenseNet for small images (Huang et al. 2017), without bottlenecks.

    Args:
        depth: `blocks * (n + 1) + 1` for n layers a block; 40 and 100 in the paper.
        classes: Number of outputs.
        growth: Channels of a layer.
        blocks: Number of dense blocks; between them the images are halved.
        compression: Channels after a transition, as a share of those before it.
        width: Channels of the stem.
        input_shape: Without the batch axis.
        conv: `conv_general_dilated` of the convolutions; None: XLA's.

    Raises:
        ValueError: If no number of layers a block gives this depth.

    Example:
        >>> densenet(10, growth=4)
        Graph(11 nodes, 19 arcs, 10 levels: in -> out)
    """
    k = (depth - 1) // blocks - 1 if blocks > 0 else 0
    if k < 1 or depth != blocks * (k + 1) + 1:
        raise ValueError(
            f"densenet depth {depth} of {blocks} blocks: expected a depth of "
            f"blocks * (n + 1) + 1 with at least n = 1 layer a block"
        )
    b = GraphBuilder()
    stem = conv2d(width, 3, conv=conv)
    node, layers = b.arc("stem", b.input("in"), "block1/x0", series(stem)), []
    for i in range(1, blocks + 1):
        if i > 1:
            width = int(width * compression)
            node = _gather(b, layers, f"block{i}/x0", _transition(width, conv))
        layers = _grow(b, node, k, growth, conv, f"block{i}/")
        width += k * growth
    _gather(b, layers, "out", _readout(classes))
    return reading_images(b.build("out"), input_shape)


def _grow(
    b: GraphBuilder,
    first: str,
    k: int,
    growth: int,
    conv: Conv | None,
    prefix: str = "",
) -> list[str]:
    """Layers 1 to k, each a sum of arcs from all before it; returns layers 0 to k."""
    nodes = [first]
    for i in range(1, k + 1):
        layer = lambda j, n: [conv2d(growth, 3, parts=n, conv=conv)]
        nodes.append(_gather(b, nodes, f"{prefix}x{i}", layer))
    return nodes


def _gather(b: GraphBuilder, nodes: list[str], target: str, layers: Layers) -> str:
    """Arcs `bn > relu > ...` from all nodes; returns the target."""
    for j, node in enumerate(nodes):
        after = layers(j, len(nodes))
        name = f"{node}_{target.rpartition('/')[2]}"
        b.arc(name, node, target, series(nn.BatchNorm(), nn.relu, *after))
    return target


def _transition(features: int, conv: Conv | None) -> Layers:
    return lambda j, n: [conv2d(features, 1, parts=n, conv=conv), avg_pool(2)]


def _readout(classes: int) -> Layers:
    dense = lambda j, n: nn.Dense(classes, use_bias=j == 0, **part_of(n))
    return lambda j, n: [global_mean, dense(j, n)]  # one of the sum has the bias
