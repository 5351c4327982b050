"""U-Net: down, across and up again, one arc a stage."""

from __future__ import annotations

import functools

import flax.linen as nn

from dagjax.graph.core.combine import GraphBuilder, block, series
from dagjax.graph.core.merges import Concat
from dagjax.graph.core.topology import Graph
from dagjax.graph.zoo.layers import (
    Shape,
    conv2d,
    conv_bn,
    image,
    max_pool,
    reading_images,
)
from dagjax.types import Conv, Layer


def unet_core(depth: int = 4, *, width: int = 64, conv: Conv | None = None) -> Graph:
    """A U-Net (Ronneberger et al. 2015) without stem and head.

    Down `relu > pool > conv > bn > relu > conv > bn`, from level to level, and up
    `conv > bn > relu > conv > bn > relu > transposed conv` from one concatenation to
    the next, where a skip arc arrives from the same level: d + 1 paths.

    Args:
        depth: How often the images are halved.
        width: Channels of the first level; they double level by level.
        conv: `conv_general_dilated` of the convolutions; None: XLA's.

    Raises:
        ValueError: If the depth is not positive.

    Example:
        >>> import dagjax as dj
        >>> unet_core(3), dj.count_paths(unet_core(3))
        (Graph(7 nodes, 9 arcs, 6 levels: down0 -> up0), 4)
    """
    if depth < 1:
        raise ValueError(f"unet depth {depth}: expected at least 1")
    b = GraphBuilder()
    twice = functools.partial(_twice, conv=conv)
    node = b.input("down0")
    for i in range(1, depth + 1):
        down = series(nn.relu, max_pool(2, 2), *twice(width * 2**i))
        node = b.arc(f"down{i}", node, f"down{i}", down)
    before: list[Layer] = []
    for i in reversed(range(depth)):
        up = series(*before, nn.relu, _transposed(width * 2**i))
        b.merge(f"up{i}", Concat())
        b.arc(f"skip{i}", f"down{i}", f"up{i}", nn.relu, port=0)
        node = b.arc(f"up{i}", node, f"up{i}", up, port=1)
        before = twice(width * 2**i)
    return b.build(node)


def unet(
    depth: int = 4,
    classes: int = 2,
    *,
    width: int = 64,
    input_shape: Shape = (256, 256, 1),
    conv: Conv | None = None,
) -> Graph:
    """U-Net (Ronneberger et al. 2015), padded and batch normalized: a class a pixel.

    Args:
        depth: How often the images are halved.
        classes: Channels of the output.
        width: Channels of the first level; they double level by level.
        input_shape: Without the batch axis; sides divisible by `2**depth`.
        conv: `conv_general_dilated` of the convolutions; None: XLA's. Transposed
            convolutions are always XLA's.

    Raises:
        ValueError: If the depth is not positive or does not fit the images.

    Example:
        >>> unet(4)
        Graph(11 nodes, 14 arcs, 10 levels: in -> out)
    """
    if any(side % 2**depth for side in image(input_shape)[:2]):
        raise ValueError(
            f"unet input_shape {tuple(input_shape)}: expected height and width "
            f"divisible by {2**depth}, for depth {depth}"
        )
    stem = block(*_twice(width, conv), name="stem")
    readout = conv2d(classes, 1, bias=True, conv=conv)
    head = block(*_twice(width, conv), nn.relu, readout, name="head")
    core = unet_core(depth, width=width, conv=conv)
    return reading_images(series(stem, core, head), input_shape)


def _twice(features: int, conv: Conv | None) -> list[Layer]:
    layers = functools.partial(conv_bn, features, 3, conv=conv)
    return [*layers(), nn.relu, *layers()]


def _transposed(features: int) -> nn.ConvTranspose:
    return nn.ConvTranspose(features, (2, 2), (2, 2))
