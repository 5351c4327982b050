"""MobileNetV2: inverted residuals around depthwise convolutions."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn

from dagjax.graph.core.combine import block, residual, series
from dagjax.graph.core.topology import Graph
from dagjax.graph.zoo.layers import (
    Shape,
    conv_bn,
    global_mean,
    is_small,
    reading_images,
)
from dagjax.types import Conv, Layer

# Sandler et al. (2018), table 2: expansion, channels, blocks, stride of the first.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet(
    classes: int = 1000,
    stages: Sequence[tuple[int, int, int, int]] = STAGES,
    *,
    width: float = 1.0,
    small: bool | None = None,
    dropout: float = 0.2,
    input_shape: Shape = (224, 224, 3),
    conv: Conv | None = None,
) -> Graph:
    """MobileNetV2 (Sandler et al. 2018): nodes are linear, the branches expand.

    A block has a skip arc where it keeps the shape.

    Args:
        classes: Number of outputs.
        stages: (expansion, channels, blocks, stride of the first block) of each.
        width: Multiplies all channels, rounded to multiples of 8.
        small: Whether the stem and the second stage keep the size of the images; None:
            for images below 64 pixels.
        dropout: Rate before the readout.
        input_shape: Without the batch axis.
        conv: `conv_general_dilated` of the convolutions; None: XLA's.

    Example:
        >>> import dagjax as dj
        >>> mobilenet(), dj.count_paths(mobilenet())
        (Graph(21 nodes, 30 arcs, 20 levels: in -> out), 1024)
    """
    small = is_small(input_shape) if small is None else small
    layers = functools.partial(conv_bn, conv=conv)
    inputs = _rounded(32 * width)
    parts = [block(*layers(inputs, 3, 1 if small else 2), name="stem")]
    before = [nn.relu6]  # of the stem, which alone is not linear
    for stage, (expansion, channels, blocks, stride) in enumerate(stages):
        for i in range(blocks):
            stride = 1 if i or (small and stage == 1) else stride
            sizes = inputs, inputs * expansion, _rounded(channels * width)
            name = f"block{len(parts)}"
            parts.append(_inverted(sizes, stride, before, conv, name=name))
            inputs, before = sizes[-1], []
    drop = [nn.Dropout(dropout)] if dropout else []
    parts.append(block(*layers(_rounded(1280 * max(1.0, width)), 1), name="last"))
    head = block(nn.relu6, global_mean, *drop, nn.Dense(classes), name="head")
    return reading_images(series(*parts, head), input_shape)


def _inverted(
    sizes: tuple[int, int, int],
    stride: int,
    before: list[Layer],
    conv: Conv | None,
    name: str,
) -> Graph:
    """Expand, convolve channel by channel, project; with a skip arc if shapes agree."""
    inputs, inner, outputs = sizes
    layers = functools.partial(conv_bn, conv=conv)
    expand = [*layers(inner, 1), nn.relu6] if inner != inputs else []
    depthwise = [*layers(inner, 3, stride, groups=inner), nn.relu6]
    convs = [*before, *expand, *depthwise, *layers(outputs, 1)]
    if stride != 1 or inputs != outputs:
        return block(*convs, name=f"{name}/branch")
    skip = block(*before, name="skip") if before else None
    return residual(block(*convs, name="branch"), skip, name=name)


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, but not less than nine tenths."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8
