"""GoogLeNet: modules of four branches side by side."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn

from dagjax.graph.core.combine import block, concat, series
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

Pair = tuple[int, int]
Widths = tuple[int, Pair, Pair, int]

# Szegedy et al. (2015), table 1: modules 3a to 5b, a pool between the stages.
GOOGLENET: tuple[tuple[Widths, ...], ...] = (
    (
        (64, (96, 128), (16, 32), 32),
        (128, (128, 192), (32, 96), 64),
    ),
    (
        (192, (96, 208), (16, 48), 64),
        (160, (112, 224), (24, 64), 64),
        (128, (128, 256), (24, 64), 64),
        (112, (144, 288), (32, 64), 64),
        (256, (160, 320), (32, 128), 128),
    ),
    (
        (256, (160, 320), (32, 128), 128),
        (384, (192, 384), (48, 128), 128),
    ),
)


def inception_module(
    widths: Widths = GOOGLENET[0][0],
    *,
    name: str | None = None,
    conv: Conv | None = None,
) -> Graph:
    """Four branches of two arcs, concatenated (Szegedy et al. 2015).

    1x1; 1x1, 3x3; 1x1, 5x5; pool, 1x1. Every convolution is normalized (Ioffe & Szegedy
    2015), in the first branch by the second arc.

    Args:
        widths: Channels of the 1x1 branch, (reduced, output) of the 3x3 and of the 5x5
            branch, channels after the pool.
        name: A prefix of the arcs' names.
        conv: `conv_general_dilated` of the convolutions; None: XLA's.

    Example:
        >>> import dagjax as dj
        >>> module = inception_module()
        >>> module, dj.count_paths(dj.series(module, module))
        (Graph(6 nodes, 8 arcs, 2 levels: in -> out), 16)
    """
    one, three, five, pooled = widths
    layers = functools.partial(conv_bn, conv=conv)
    reduce = lambda features, name: block(nn.relu, *layers(features, 1), name=name)
    spread = lambda features, size: block(
        nn.relu, *layers(features, size), name=f"conv{size}"
    )
    return concat(
        series(
            block(nn.relu, conv2d(one, 1, conv=conv), name="conv1"),
            block(nn.BatchNorm(), name="norm1"),
        ),
        series(reduce(three[0], "reduce3"), spread(three[1], 3)),
        series(reduce(five[0], "reduce5"), spread(five[1], 5)),
        series(block(max_pool(3, 1), name="pool"), reduce(pooled, "project")),
        name=name,
    )


def inception(
    classes: int = 1000,
    stages: Sequence[Sequence[Widths]] = GOOGLENET,
    *,
    width: int = 64,
    small: bool | None = None,
    dropout: float = 0.4,
    input_shape: Shape = (224, 224, 3),
    conv: Conv | None = None,
) -> Graph:
    """GoogLeNet (Szegedy et al. 2015), batch normalized, without auxiliary heads.

    Args:
        classes: Number of outputs.
        stages: Widths of the modules, see `inception_module`; a pool comes between the
            stages.
        width: Channels of the first convolution; the last one of the stem has three
            times as many.
        small: Whether the stem is one 3x3 convolution, without stride and pool; None:
            for images below 64 pixels.
        dropout: Rate before the readout.
        input_shape: Without the batch axis.
        conv: `conv_general_dilated` of the convolutions; None: XLA's.

    Example:
        >>> inception()
        Graph(52 nodes, 78 arcs, 24 levels: in -> out)
    """
    small = is_small(input_shape) if small is None else small
    parts = _stem(width, small, conv)
    for i, modules in enumerate(stages, 1):
        if i > 1:
            parts.append(block(max_pool(3, 2), name=f"pool{i}"))
        for j, widths in enumerate(modules, 1):
            name = f"stage{i}/module{j}"
            parts.append(inception_module(widths, name=name, conv=conv))
    drop = [nn.Dropout(dropout)] if dropout else []
    head = block(nn.relu, global_mean, *drop, nn.Dense(classes), name="head")
    return reading_images(series(*parts, head), input_shape)


def _stem(width: int, small: bool, conv: Conv | None) -> list[Graph]:
    layers = functools.partial(conv_bn, conv=conv)
    if small:
        return [block(*layers(3 * width, 3), name="stem")]
    return [
        block(*layers(width, 7, 2), max_pool(3, 2), name="stem1"),
        block(nn.relu, *layers(width, 1), name="stem2"),
        block(nn.relu, *layers(3 * width, 3), max_pool(3, 2), name="stem3"),
    ]
