"""MLP-Mixer: perceptrons across tokens, perceptrons across channels."""

from __future__ import annotations

import flax.linen as nn
import jax

from dagjax.graph.core.combine import block, residual, series
from dagjax.graph.core.topology import Graph
from dagjax.graph.zoo.layers import (
    Shape,
    patch_embedding,
    patch_size,
    reading_images,
    token_mean,
)
from dagjax.types import Conv, Layer


def mixer(
    depth: int = 12,
    classes: int = 1000,
    *,
    features: int = 768,
    token_hidden: int = 384,
    hidden: int = 3072,
    patch: int | None = None,
    input_shape: Shape = (224, 224, 3),
    conv: Conv | None = None,
) -> Graph:
    """MLP-Mixer (Tolstikhin et al. 2021), by default Mixer-B/16; 4^depth paths.

    Args:
        depth: Number of blocks, each a pair {skip, tokens} and one {skip, channels}.
        classes: Number of outputs.
        features: Of a token.
        token_hidden: Width of the perceptrons across tokens.
        hidden: Width of the perceptrons across channels.
        patch: Pixels a side of a patch; None: 16, and 4 for images below 64 pixels.
        input_shape: Without the batch axis.
        conv: `conv_general_dilated` of the patch embedding; None: XLA's.

    Raises:
        ValueError: If the patches do not tile the image.

    Example:
        >>> mixer(2, 10, features=64, input_shape=(32, 32, 3))
        Graph(7 nodes, 10 arcs, 6 levels: in -> out)
    """
    patch = patch_size(patch, input_shape)
    height, width, _ = input_shape
    tokens = (height // patch) * (width // patch)
    embed = patch_embedding(features, patch, conv=conv)
    blocks = [
        _block(tokens, features, token_hidden, hidden, name=f"block{i + 1}")
        for i in range(depth)
    ]
    head = block(nn.LayerNorm(), token_mean, nn.Dense(classes), name="head")
    return reading_images(series(embed, *blocks, head), input_shape)


def swap(x: jax.Array) -> jax.Array:
    """`[B, T, D] -> [B, D, T]`: tokens become channels and channels tokens."""
    return x.swapaxes(1, 2)


def _block(
    tokens: int, features: int, token_hidden: int, hidden: int, name: str
) -> Graph:
    across_tokens = block(
        nn.LayerNorm(), swap, *_perceptron(token_hidden, tokens), swap, name="branch"
    )
    across_channels = block(
        nn.LayerNorm(), *_perceptron(hidden, features), name="branch"
    )
    return series(
        residual(across_tokens, name="tokens"),
        residual(across_channels, name="channels"),
        name=name,
    )


def _perceptron(hidden: int, features: int) -> list[Layer]:
    return [nn.Dense(hidden), nn.gelu, nn.Dense(features)]
