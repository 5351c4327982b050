"""Networks of the literature as graphs; nodes are sums before the activation.

A node's activation is folded into its outgoing arcs, so an arc reads `relu > layer`.
Every network takes `input_shape` (without the batch axis), which `show` reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dagjax.graph.combine import block, residual, series
from dagjax.graph.functions import flatten
from dagjax.graph.topology import Graph, Space

Shape = tuple[int, ...]


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
    return _on(series(*layers), input_shape)


def lenet_300_100(classes: int = 10, *, input_shape: Shape = (28, 28, 1)) -> Graph:
    """LeNet-300-100 (LeCun et al. 1998), the fully connected net of ticket papers."""
    return mlp((300, 100, classes), input_shape=input_shape)


def lenet5(
    classes: int = 10, *, input_shape: Shape = (28, 28, 1), conv: Any = None
) -> Graph:
    """LeNet-5 (LeCun et al. 1998) with relu and average pooling.

    Args:
        classes: Number of outputs.
        input_shape: Below 20 pixels the second convolution is padded, so that it fits.
        conv: `conv_general_dilated` of the convolutions; None: XLA's.
    """
    pool = functools.partial(nn.avg_pool, window_shape=(2, 2), strides=(2, 2))
    padding = "VALID" if input_shape[0] >= 20 else "SAME"
    layers = [
        block(_conv(6, 5, conv=conv), name="conv1"),
        block(nn.relu, pool, _conv(16, 5, padding=padding, conv=conv), name="conv2"),
        block(nn.relu, pool, flatten, nn.Dense(120), name="fc1"),
        block(nn.relu, nn.Dense(84), name="fc2"),
        block(nn.relu, nn.Dense(classes), name="fc3"),
    ]
    return _on(series(*layers), input_shape)


def conv2(classes: int = 10, **options: Any) -> Graph:
    """Conv-2 of Frankle & Carbin (2019): 64, 64, pool, two dense layers of 256."""
    return _frankle((64,), classes, **options)


def conv4(classes: int = 10, **options: Any) -> Graph:
    """Conv-4 of Frankle & Carbin (2019): 64, 64, pool, 128, 128, pool, dense 256."""
    return _frankle((64, 128), classes, **options)


def conv6(classes: int = 10, **options: Any) -> Graph:
    """Conv-6 of Frankle & Carbin (2019): Conv-4 with 256, 256, pool more."""
    return _frankle((64, 128, 256), classes, **options)


def resnet(
    depth: int = 20,
    classes: int = 10,
    *,
    width: int = 16,
    input_shape: Shape = (32, 32, 3),
    conv: Any = None,
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
    parts = [block(_conv(width, 3, conv=conv), nn.BatchNorm(), name="stem")]
    per_stage = (depth - 2) // 6
    for i in range(3 * per_stage):
        stage, first = i // per_stage, i % per_stage == 0
        stride = 2 if stage and first else 1
        parts.append(_basic(width * 2**stage, stride, conv, name=f"block{i + 1}"))
    parts.append(block(nn.relu, global_mean, nn.Dense(classes), name="head"))
    return _on(series(*parts), input_shape)


def global_mean(x: jax.Array) -> jax.Array:
    """`[B, H, W, C] -> [B, C]`, the mean over the pixels."""
    return jnp.mean(x, (1, 2))


def _basic(features: int, stride: int, conv: Any, name: str) -> Graph:
    branch = block(
        nn.relu,
        _conv(features, 3, stride, conv=conv), nn.BatchNorm(), nn.relu,
        _conv(features, 3, conv=conv), nn.BatchNorm(),
        name="branch",
    )  # fmt: skip
    if stride == 1:
        return residual(branch, block(nn.relu, name="skip"), name=name)
    project = _conv(features, 1, stride, conv=conv)
    skip = block(nn.relu, project, nn.BatchNorm(), name="skip")
    return residual(branch, skip, name=name)


def _frankle(
    widths: Sequence[int],
    classes: int,
    *,
    input_shape: Shape = (32, 32, 3),
    conv: Any = None,
) -> Graph:
    pool = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
    layers, before = [], []
    for i, width in enumerate(widths):
        for j in (1, 2):
            layer = _conv(width, 3, conv=conv, bias=True)
            layers.append(block(*before, layer, name=f"conv{2 * i + j}"))
            before = [nn.relu]
        before = [nn.relu, pool]
    layers.append(block(*before, flatten, nn.Dense(256), name="fc1"))
    layers.append(block(nn.relu, nn.Dense(256), name="fc2"))
    layers.append(block(nn.relu, nn.Dense(classes), name="fc3"))
    return _on(series(*layers), input_shape)


def _conv(
    features: int,
    size: int,
    stride: int = 1,
    *,
    padding: str = "SAME",
    conv: Any = None,
    bias: bool | None = None,
) -> nn.Conv:
    return nn.Conv(
        features,
        (size, size),
        stride,
        padding=padding,
        use_bias=size == 5 if bias is None else bias,
        conv_general_dilated=conv,
    )


def _on(graph: Graph, input_shape: Shape) -> Graph:
    return graph.replace(spaces={"in": Space(tuple(input_shape), "float32")})


NETS: dict[str, Callable[..., Graph]] = {
    "mlp": lambda classes=10, **options: mlp((256, 256, classes), **options),
    "lenet-300-100": lenet_300_100,
    "lenet5": lenet5,
    "conv2": conv2,
    "conv4": conv4,
    "conv6": conv6,
    **{f"resnet{d}": functools.partial(resnet, d) for d in (8, 20, 32, 56)},
}


def by_name(name: str, **options: Any) -> Graph:
    """A network of the zoo by its name on the command line.

    Args:
        name: One of `NETS`.
        **options: `classes`, `input_shape`, ...

    Raises:
        ValueError: If there is no such network; the message lists them.

    Example:
        >>> by_name("resnet20").depth
        11
    """
    if name not in NETS:
        raise ValueError(f"no net named {name!r}; nets are {', '.join(NETS)}")
    return NETS[name](**options)


def takes_conv(name: str) -> bool:
    """Whether a network of the zoo has convolutions, to be given as `conv=`."""
    return name in NETS and not name.startswith(("mlp", "lenet-300"))
