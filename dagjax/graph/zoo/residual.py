"""Residual networks: pairs {skip, branch} in stages."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn

from dagjax.graph.core.combine import block, residual, series
from dagjax.graph.core.topology import Graph
from dagjax.graph.zoo.layers import (
    Shape,
    conv2d,
    conv_bn,
    global_mean,
    is_small,
    max_pool,
    reading_images,
)
from dagjax.types import Conv


def resnet(
    depth: int = 20,
    classes: int = 10,
    *,
    width: int = 16,
    input_shape: Shape = (32, 32, 3),
    conv: Conv | None = None,
) -> Graph:
    """A residual network for small images (He et al. 2016), with projection shortcuts.

    Stem, then `(depth - 2) / 2` pairs {skip, branch} in three stages, then a head:
    ResNet-20 has 12 nodes, 20 arcs, 11 levels and 512 paths.

    Args:
        depth: 6 n + 2: 8, 14, 20, 32, 44, 56, ...
        classes: Number of outputs.
        width: Channels of the first stage.
        input_shape: Without the batch axis.
        conv: `conv_general_dilated` of the convolutions; None: XLA's.

    Raises:
        ValueError: If the depth is not 6 n + 2.

    Example:
        >>> import dagjax as dj
        >>> graph = resnet(20)
        >>> len(graph.nodes), len(graph.arcs), graph.depth, dj.count_paths(graph)
        (12, 20, 11, 512)
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"resnet depth {depth}: expected 8, 14, 20, ... (6 n + 2)")
    parts = [block(*conv_bn(width, 3, conv=conv), name="stem")]
    for stage, stride, _ in _blocks(3 * [(depth - 2) // 6]):
        name = f"block{len(parts)}"
        parts.append(_basic(width * 2**stage, stride, conv, name=name))
    parts.append(block(nn.relu, global_mean, nn.Dense(classes), name="head"))
    return reading_images(series(*parts), input_shape)


def resnet50(classes: int = 1000, **options: Any) -> Graph:
    """ResNet-50 (He et al. 2016), the `bottleneck_resnet` of 3, 4, 6 and 3 blocks.

    Example:
        >>> resnet50()
        Graph(19 nodes, 34 arcs, 18 levels: in -> out)
    """
    return bottleneck_resnet((3, 4, 6, 3), classes, **options)


def bottleneck_resnet(
    stages: Sequence[int] = (3, 4, 6, 3),
    classes: int = 1000,
    *,
    width: int = 64,
    small: bool | None = None,
    input_shape: Shape = (224, 224, 3),
    conv: Conv | None = None,
) -> Graph:
    """A residual network of bottlenecks (He et al. 2016).

    Version 1.5, with the stride in the 3x3 convolution. (3, 4, 23, 3) is ResNet-101,
    (3, 8, 36, 3) is ResNet-152.

    Args:
        stages: Blocks of each stage.
        classes: Number of outputs.
        width: Channels inside the blocks of the first stage; they double each stage and
            are four times as many outside.
        small: Whether the stem is one 3x3 convolution, without stride and pool; None:
            for images below 64 pixels.
        input_shape: Without the batch axis.
        conv: `conv_general_dilated` of the convolutions; None: XLA's.

    Raises:
        ValueError: If a stage is empty.

    Example:
        >>> bottleneck_resnet((2, 2), 10, input_shape=(32, 32, 3))
        Graph(7 nodes, 10 arcs, 6 levels: in -> out)
    """
    if not stages or min(stages) < 1:
        raise ValueError(f"stages {stages}: expected at least one block in each")
    small = is_small(input_shape) if small is None else small
    stem = conv_bn(width, 3, conv=conv)
    if not small:
        stem = (*conv_bn(width, 7, 2, conv=conv), max_pool(3, 2))
    parts = [block(*stem, name="stem")]
    for stage, stride, first in _blocks(stages):
        wide, name = width * 2**stage, f"block{len(parts)}"
        parts.append(_bottleneck(wide, stride, first, conv, name=name))
    parts.append(block(nn.relu, global_mean, nn.Dense(classes), name="head"))
    return reading_images(series(*parts), input_shape)


def wide_resnet(
    depth: int = 28,
    classes: int = 10,
    *,
    widen: int = 10,
    width: int = 16,
    input_shape: Shape = (32, 32, 3),
    conv: Conv | None = None,
) -> Graph:
    """A wide residual network, normalized before it is activated.

    Zagoruyko & Komodakis (2016). The first block of a stage has an arc "pre" that both
    its branch and its projection read.

    Args:
        depth: 6 n + 4: 10, 16, 22, 28, 40, ...
        classes: Number of outputs.
        widen: Factor k of the channels, 16 k, 32 k and 64 k in the three stages.
        width: In place of the 16.
        input_shape: Without the batch axis.
        conv: `conv_general_dilated` of the convolutions; None: XLA's.

    Raises:
        ValueError: If the depth is not 6 n + 4.

    Example:
        >>> wide_resnet(28, widen=10)
        Graph(18 nodes, 29 arcs, 17 levels: in -> out)
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"wide_resnet depth {depth}: expected 10, 16, ... (6 n + 4)")
    parts = [block(conv2d(width, 3, conv=conv), name="stem")]
    for stage, stride, first in _blocks(3 * [(depth - 4) // 6]):
        wide, name = widen * width * 2**stage, f"block{len(parts)}"
        parts.append(_preactivated(wide, stride, first, conv, name=name))
    last = [nn.BatchNorm(), nn.relu, global_mean, nn.Dense(classes)]
    return reading_images(series(*parts, block(*last, name="head")), input_shape)


def _blocks(stages: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
    """Of every block its stage, its stride, and whether it is the first there."""
    for stage, count in enumerate(stages):
        for i in range(count):
            yield stage, 2 if stage and i == 0 else 1, i == 0


def _basic(features: int, stride: int, conv: Conv | None, name: str) -> Graph:
    layers = functools.partial(conv_bn, conv=conv)
    convs = layers(features, 3, stride), layers(features, 3)
    branch = block(nn.relu, *convs[0], nn.relu, *convs[1], name="branch")
    project = () if stride == 1 else layers(features, 1, stride)
    return residual(branch, block(nn.relu, *project, name="skip"), name=name)


def _bottleneck(
    features: int, stride: int, first: bool, conv: Conv | None, name: str
) -> Graph:
    layers = functools.partial(conv_bn, conv=conv)
    branch = block(
        nn.relu, *layers(features, 1),
        nn.relu, *layers(features, 3, stride),
        nn.relu, *layers(4 * features, 1),
        name="branch",
    )  # fmt: skip
    project = layers(4 * features, 1, stride) if first else ()
    return residual(branch, block(nn.relu, *project, name="skip"), name=name)


def _preactivated(
    features: int, stride: int, first: bool, conv: Conv | None, name: str
) -> Graph:
    layer = functools.partial(conv2d, conv=conv)
    pre = [nn.BatchNorm(), nn.relu]
    convs = [layer(features, 3, stride), *pre, layer(features, 3)]
    if not first:
        return residual(block(*pre, *convs, name="branch"), name=name)
    skip = block(layer(features, 1, stride), name="skip")
    pair = residual(block(*convs, name="branch"), skip)
    return series(block(*pre, name="pre"), pair, name=name)
