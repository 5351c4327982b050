"""What the networks of the zoo share: convolutions, pools, patches, shapes of inputs.

A node's activation is folded into its outgoing arcs, so an arc reads
`relu > conv > bn`. Max pooling commutes with relu and may stand before the node.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dagjax.graph.core.combine import block
from dagjax.graph.core.topology import Graph, Space
from dagjax.types import Conv, Layer, PyTree

Shape = tuple[int, ...]

SMALL = 64  # pixels: smaller images get stems and heads that do not shrink them


def conv2d(
    features: int,
    size: int,
    stride: int = 1,
    *,
    padding: str = "SAME",
    bias: bool = False,
    groups: int = 1,
    parts: int = 1,
    conv: Conv | None = None,
) -> nn.Conv:
    """A square convolution, `parts` of which are summed (for the initial variance)."""
    return nn.Conv(
        features,
        (size, size),
        stride,
        padding=padding,
        use_bias=bias,
        feature_group_count=groups,
        conv_general_dilated=conv,
        **part_of(parts),
    )


def conv_bn(
    features: int,
    size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    conv: Conv | None = None,
) -> tuple[nn.Module, nn.Module]:
    """A convolution without bias and its batch normalization, two layers of a block."""
    return conv2d(features, size, stride, groups=groups, conv=conv), nn.BatchNorm()


def part_of(parts: int) -> dict[str, PyTree]:
    """`kernel_init` of one arc of several that stand for one layer.

    The kernel of a layer that reads a concatenation is cut into parts, an arc each, and
    initialized as a whole; every part has its share of the variance.
    """
    if parts == 1:
        return {}
    scaled = nn.initializers.variance_scaling
    return {"kernel_init": scaled(1 / parts, "fan_in", "truncated_normal")}


def max_pool(size: int, stride: int, padding: str = "SAME") -> Callable[..., jax.Array]:
    """The largest value of every square window."""
    window, strides = (size, size), (stride, stride)
    return functools.partial(
        nn.max_pool, window_shape=window, strides=strides, padding=padding
    )


def avg_pool(size: int) -> Callable[..., jax.Array]:
    """The mean of every square window, side by side."""
    window = (size, size)
    return functools.partial(nn.avg_pool, window_shape=window, strides=window)


def global_mean(x: jax.Array) -> jax.Array:
    """`[B, H, W, C] -> [B, C]`, the mean over the pixels."""
    return jnp.mean(x, (1, 2))


def token_mean(x: jax.Array) -> jax.Array:
    """`[B, T, D] -> [B, D]`, the mean over the tokens."""
    return jnp.mean(x, 1)


def as_tokens(x: jax.Array) -> jax.Array:
    """`[B, H, W, D] -> [B, H W, D]`, row by row."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def patch_size(patch: int | None, input_shape: Shape) -> int:
    """The pixels a side of a patch; None: 16, for small images 4.

    Raises:
        ValueError: If such patches do not tile the images.
    """
    if patch is None:
        patch = 4 if is_small(input_shape) else 16
    if any(side % patch for side in image(input_shape)[:2]):
        raise ValueError(
            f"input_shape {tuple(input_shape)}: expected height and width divisible by "
            f"the patch size {patch}"
        )
    return patch


def patch_embedding(
    features: int, patch: int, *after: Layer, conv: Conv | None = None
) -> Graph:
    """One arc from an image to tokens, one a patch, and what comes after."""
    cut = conv2d(features, patch, patch, padding="VALID", bias=True, conv=conv)
    return block(cut, as_tokens, *after, name="embed")


def image(input_shape: Shape) -> Shape:
    """The shape, if it is one of images.

    Raises:
        ValueError: If it is not.
    """
    if len(input_shape) != 3:
        raise ValueError(
            f"input_shape {tuple(input_shape)}: expected (height, width, channels)"
        )
    return tuple(input_shape)


def is_small(input_shape: Shape) -> bool:
    """Whether images are of the kind of CIFAR rather than ImageNet."""
    return min(image(input_shape)[:2]) < SMALL


def reading(graph: Graph, input_shape: Shape, dtype: str = "float32") -> Graph:
    """The graph with the shape of its input, without batch axis, which `show` reads."""
    (node,) = graph.inputs
    return graph.replace(spaces={node: Space(tuple(input_shape), dtype)})


def reading_images(graph: Graph, input_shape: Shape) -> Graph:
    """The graph with the shape of its images."""
    return reading(graph, image(input_shape))
