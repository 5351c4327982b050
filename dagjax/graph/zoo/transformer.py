"""Transformers whose attention heads are arcs: ViT and GPT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax

from dagjax.graph.core.combine import block, gated, merge, parallel, residual, series
from dagjax.graph.core.merges import Attention, Experts
from dagjax.graph.core.topology import Graph
from dagjax.graph.zoo.layers import (
    Shape,
    part_of,
    patch_embedding,
    patch_size,
    reading,
    reading_images,
    token_mean,
)
from dagjax.types import Conv, PyTree

_NORMAL = nn.initializers.normal(0.02)  # of tables, as in GPT-2


def transformer_block(
    heads: int = 4,
    features: int = 64,
    *,
    hidden: int | None = None,
    mlp: str = "gelu",
    causal: bool = False,
    name: str | None = None,
) -> Graph:
    """Attention heads and a skip, then a perceptron and a skip (Vaswani et al. 2017).

    Normalized before each arc (Xiong et al. 2020), `2 (1 + heads)` paths. A head is one
    additive arc, `norm > attention of (q, k, v) > out`. The norms have no scale and
    bias, which the dense layers that read them take in: `W' = W diag(s)`,
    `b' = b + W b_s`. Nor has `out` a bias: the weights of the attention sum to 1, so
    that the bias of `v` does its work.

    Args:
        heads: Number of heads.
        features: Of a token; each head has `features / heads`.
        hidden: Width of the perceptron; None: four times the features.
        mlp: "gelu", "swiglu" (Shazeer 2020), or "experts": four perceptrons, two a
            token (Shazeer et al. 2017).
        causal: Whether a token sees only those up to itself.
        name: A prefix of the arcs' names.

    Raises:
        ValueError: If the heads do not divide the features, or there is no such
            perceptron.

    Example:
        >>> import dagjax as dj
        >>> once = transformer_block(heads=4)
        >>> once, dj.count_paths(dj.series(once, once))
        (Graph(3 nodes, 7 arcs, 2 levels: in -> out), 100)
    """
    if heads < 1 or features % heads:
        raise ValueError(f"{heads} heads: expected a divisor of {features} features")
    if mlp not in MLPS:
        raise ValueError(f"mlp {mlp!r}: expected {', '.join(MLPS)}")
    attended = [_head(heads, features, causal, i) for i in range(1, heads + 1)]
    perceptron = MLPS[mlp](features, 4 * features if hidden is None else hidden)
    branch = block(_norm(), perceptron, name="branch")
    attention = residual(parallel(*attended), name="attention")
    return series(attention, residual(branch, name="mlp"), name=name)


def vit(
    depth: int = 12,
    classes: int = 1000,
    *,
    heads: int = 12,
    features: int = 768,
    hidden: int | None = None,
    patch: int | None = None,
    mlp: str = "gelu",
    input_shape: Shape = (224, 224, 3),
    conv: Conv | None = None,
) -> Graph:
    """A vision transformer (Dosovitskiy et al. 2021), by default ViT-B/16.

    It reads out the mean of the tokens instead of a class token (Beyer et al. 2022).

    Args:
        depth: Number of blocks.
        classes: Number of outputs.
        heads: Of a block.
        features: Of a token.
        hidden: Width of the perceptrons; None: four times the features.
        patch: Pixels a side of a patch; None: 16, and 4 for images below 64 pixels.
        mlp: See `transformer_block`.
        input_shape: Without the batch axis.
        conv: `conv_general_dilated` of the patch embedding; None: XLA's.

    Raises:
        ValueError: If the patches do not tile the image; see also `transformer_block`.

    Example:
        >>> vit(2, 10, heads=4, features=64, input_shape=(32, 32, 3))
        Graph(7 nodes, 16 arcs, 6 levels: in -> out)
    """
    patch = patch_size(patch, input_shape)
    embed = patch_embedding(features, patch, Positions(), conv=conv)
    blocks = [
        transformer_block(heads, features, hidden=hidden, mlp=mlp, name=f"block{i + 1}")
        for i in range(depth)
    ]
    head = block(_norm(), token_mean, nn.Dense(classes), name="head")
    return reading_images(series(embed, *blocks, head), input_shape)


def gpt(
    depth: int = 12,
    vocabulary: int = 50257,
    *,
    heads: int = 12,
    features: int = 768,
    hidden: int | None = None,
    mlp: str = "gelu",
    input_shape: Shape = (1024,),
) -> Graph:
    """A causal language model, by default GPT-2 small (Radford et al. 2019).

    Token ids `[B, T]`, integers, to logits `[B, T, vocabulary]`. The readout is tied to
    the embedding.

    Args:
        depth: Number of blocks.
        vocabulary: Number of tokens.
        heads: Of a block.
        features: Of a token.
        hidden: Width of the perceptrons; None: four times the features.
        mlp: See `transformer_block`.
        input_shape: `(context,)`: the largest number of tokens; fewer will do.

    Raises:
        ValueError: If the input shape is not `(context,)`; see also
            `transformer_block`.

    Example:
        >>> gpt(2, 256, heads=4, features=64, input_shape=(32,))
        Graph(9 nodes, 18 arcs, 8 levels: in -> out)
    """
    if len(input_shape) != 1:
        raise ValueError(
            f"gpt input_shape {tuple(input_shape)}: expected (context,), of token ids"
        )
    options: dict[str, PyTree] = {"hidden": hidden, "mlp": mlp, "causal": True}
    graph = series(
        nn.Embed(vocabulary, features, embedding_init=_NORMAL, name="embed"),
        Positions(*input_shape, name="positions"),
        *(
            transformer_block(heads, features, **options, name=f"block{i + 1}")
            for i in range(depth)
        ),
        nn.LayerNorm(name="norm"),
        Unembed(vocabulary, name="readout"),
    )
    return reading(_tied(graph, "readout", "embed"), input_shape, "int32")


class Positions(nn.Module):
    """`x + p`, with a learned vector for every position."""

    length: int | None = None  # how many; None: as at initialization

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        tokens, features = x.shape[-2:]
        shape = (self.length or tokens, features)
        table = self.param("embedding", _NORMAL, shape)
        return x + table[None, :tokens]


class Unembed(nn.Module):
    """`E x`, the readout with the table of an embedding that it is tied to."""

    vocabulary: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, vocabulary]`."""
        table = self.param("embedding", _NORMAL, (self.vocabulary, x.shape[-1]))
        return x @ table.T


def _head(heads: int, features: int, causal: bool, number: int) -> Graph:
    """`norm > attention of (q, k, v) > out`, one arc."""
    qkv = (nn.Dense(features // heads, name=name) for name in "qkv")
    out = nn.Dense(features, use_bias=False, **part_of(heads))
    return block(_norm(), merge(Attention(causal), *qkv), out, name=f"head{number}")


def _norm() -> nn.LayerNorm:
    return nn.LayerNorm(use_bias=False, use_scale=False)


def _gelu(features: int, hidden: int) -> Graph:
    return series(nn.Dense(hidden), nn.gelu, nn.Dense(features))


def _swiglu(features: int, hidden: int) -> Graph:
    unit = gated(nn.Dense(hidden), nn.Dense(hidden), nn.silu)
    return series(unit, nn.Dense(features))


def _experts(features: int, hidden: int, count: int = 4, top: int = 2) -> Graph:
    names = [f"expert{i + 1}" for i in range(count)]
    experts = [block(_gelu(features, hidden), name=name) for name in names]
    return merge(Experts(top), nn.Dense(count, name="router"), *experts)


MLPS: dict[str, Callable[[int, int], Graph]] = {
    "gelu": _gelu,
    "swiglu": _swiglu,
    "experts": _experts,
}


def _tied(graph: Graph, arc: str, to: str) -> Graph:
    arcs = [dataclasses.replace(a, tied=to) if a.name == arc else a for a in graph.arcs]
    return graph.replace(arcs=arcs)
