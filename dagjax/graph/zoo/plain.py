"""Chains of layers, one arc each: perceptrons, LeNets, Frankle's nets, VGG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from dagjax.graph.core.combine import block, series
from dagjax.graph.core.functions import flatten
from dagjax.graph.core.topology import Graph
from dagjax.graph.zoo.layers import (
    Shape,
    avg_pool,
    conv2d,
    is_small,
    max_pool,
    reading,
    reading_images,
)
from dagjax.types import Conv, Layer

_VGG = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def mlp(
    features: Sequence[int] = (256, 256, 10),
    *,
    activation: Callable[[jax.Array], jax.Array] = nn.relu,
    input_shape: Shape = (28, 28, 1),
) -> Graph:
    """A multilayer perceptron, one arc a layer.

    Args:
        features: Widths of the layers; the last one is the output.
        activation: Between the layers.
        input_shape: Without the batch axis.

    Example:
        >>> mlp((8, 8, 3)).depth
        3
    """
    first, *rest = features
    layers = [block(flatten, nn.Dense(first), name="fc1")]
    for i, width in enumerate(rest, 2):
        layers.append(block(activation, nn.Dense(width), name=f"fc{i}"))
    return reading(series(*layers), input_shape)


def lenet_300_100(classes: int = 10, *, input_shape: Shape = (28, 28, 1)) -> Graph:
    """LeNet-300-100 (LeCun et al. 1998), the fully connected net of ticket papers."""
    return mlp((300, 100, classes), input_shape=input_shape)


def lenet5(
    classes: int = 10, *, input_shape: Shape = (28, 28, 1), conv: Conv | None = None
) -> Graph:
    """LeNet-5 (LeCun et al. 1998) with relu and average pooling.

    Args:
        classes: Number of outputs.
        input_shape: Below 20 pixels the second convolution is padded, so that it fits.
        conv: `conv_general_dilated` of the convolutions; None: XLA's.
    """
    padding = "VALID" if input_shape[0] >= 20 else "SAME"
    first = conv2d(6, 5, bias=True, conv=conv)
    second = conv2d(16, 5, padding=padding, bias=True, conv=conv)
    layers = [
        block(first, name="conv1"),
        block(nn.relu, avg_pool(2), second, name="conv2"),
        *_dense([nn.relu, avg_pool(2)], (120, 84, classes)),
    ]
    return reading_images(series(*layers), input_shape)


def conv2(classes: int = 10, **options: Any) -> Graph:
    """Conv-2 of Frankle & Carbin (2019): 64, 64, pool, two dense layers of 256."""
    return _frankle((64,), classes, **options)


def conv4(classes: int = 10, **options: Any) -> Graph:
    """Conv-4 of Frankle & Carbin (2019): 64, 64, pool, 128, 128, pool, dense 256."""
    return _frankle((64, 128), classes, **options)


def conv6(classes: int = 10, **options: Any) -> Graph:
    """Conv-6 of Frankle & Carbin (2019): Conv-4 with 256, 256, pool more."""
    return _frankle((64, 128, 256), classes, **options)


def vgg(
    depth: int = 16,
    classes: int = 1000,
    *,
    width: int = 64,
    hidden: Sequence[int] | None = None,
    batch_norm: bool = False,
    dropout: float = 0.5,
    input_shape: Shape = (224, 224, 3),
    conv: Conv | None = None,
) -> Graph:
    """VGG (Simonyan & Zisserman 2015): 3x3 convolutions in five stages, dense layers.

    Args:
        depth: Layers with weights in the original: 11, 13, 16 or 19.
        classes: Number of outputs.
        width: Channels of the first stage; they double up to 8 times that.
        hidden: Widths of the dense layers before the readout; None: (4096, 4096), and
            for images below 64 pixels none, as is usual there.
        batch_norm: After every convolution (Ioffe & Szegedy 2015).
        dropout: Rate after each hidden dense layer.
        input_shape: Without the batch axis.
        conv: `conv_general_dilated` of the convolutions; None: XLA's.

    Raises:
        ValueError: If there is no VGG of this depth.

    Example:
        >>> vgg(16), vgg(16, 10, input_shape=(32, 32, 3))
        (Graph(17 nodes, 16 arcs, 16 levels: in -> out),
         Graph(15 nodes, 14 arcs, 14 levels: in -> out))
    """
    if depth not in _VGG:
        raise ValueError(f"vgg depth {depth}: expected {', '.join(map(str, _VGG))}")
    if hidden is None:
        hidden = () if is_small(input_shape) else (4096, 4096)
    widths = [width * factor for factor in (1, 2, 4, 8, 8)]
    norm = [nn.BatchNorm()] if batch_norm else []
    convs = _convolutions(widths, _VGG[depth], *norm, pool="SAME", conv=conv)
    drop = [nn.Dropout(dropout)] if dropout else []
    head = _dense([nn.relu, max_pool(2, 2)], (*hidden, classes), *drop)
    return reading_images(series(*convs, *head), input_shape)


def _frankle(
    widths: Sequence[int],
    classes: int,
    *,
    input_shape: Shape = (32, 32, 3),
    conv: Conv | None = None,
) -> Graph:
    convs = _convolutions(widths, [2] * len(widths), pool="VALID", conv=conv)
    head = _dense([nn.relu, max_pool(2, 2, "VALID")], (256, 256, classes))
    return reading_images(series(*convs, *head), input_shape)


def _convolutions(
    widths: Sequence[int],
    repeats: Sequence[int],
    *norm: Layer,
    pool: str,
    conv: Conv | None,
) -> list[Graph]:
    """Stages of 3x3 convolutions with a pool of this padding between them."""
    layers, before = [], []
    for width, repeat in zip(widths, repeats, strict=True):
        for _ in range(repeat):
            layer = conv2d(width, 3, bias=True, conv=conv)
            layers.append(block(*before, layer, *norm, name=f"conv{len(layers) + 1}"))
            before = [nn.relu]
        before = [nn.relu, max_pool(2, 2, pool)]
    return layers


def _dense(before: list[Layer], widths: Sequence[int], *drop: Layer) -> list[Graph]:
    """Dense layers on an image, the last one the readout."""
    layers, before = [], [*before, flatten]
    for i, width in enumerate(widths, 1):
        layers.append(block(*before, nn.Dense(width), name=f"fc{i}"))
        before = [nn.relu, *drop]
    return layers
