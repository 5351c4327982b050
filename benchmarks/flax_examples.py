"""Networks of the kinds that the Flax repository shows, written anew, for tracing.

Each is a function `fn(params, state, *inputs)`, or without `state`, at two sizes: the
usual one, of which only shapes are needed, and a small one that runs quickly.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
    """A module with the shapes of its inputs, at two sizes, and its branches.

    Args:
        full: The module and its inputs at the usual size.
        small: The same with fewer layers or shorter inputs.
        sums: How many sums it is written with, at the usual size.
        merges: `{kind: number}`.
        paths: From inputs to outputs.
    """

    full: tuple[nn.Module, tuple[Any, ...]]
    small: tuple[nn.Module, tuple[Any, ...]]
    sums: int
    merges: dict[str, int]
    paths: int


class Cnn(nn.Module):
    """Two convolutions and two dense layers for digits."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Logits."""
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(256)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


class Vae(nn.Module):
    """A variational autoencoder; it draws with a key that is an argument."""

    latent: int

    @nn.compact
    def __call__(self, x: Any, key: Any) -> Any:
        """Reconstruction, mean and log variance."""
        h = nn.relu(nn.Dense(500, name="encode")(x))
        mean = nn.Dense(self.latent, name="mean")(h)
        logvar = nn.Dense(self.latent, name="logvar")(h)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        h = nn.relu(nn.Dense(500, name="decode")(z))
        return nn.Dense(x.shape[-1], name="pixels")(h), mean, logvar


class Seq2seq(nn.Module):
    """Two LSTMs; the second starts where the first ended."""

    hidden: int

    @nn.compact
    def __call__(self, source: Any, target: Any) -> Any:
        """Logits of each step."""
        encoder = nn.RNN(nn.LSTMCell(self.hidden), return_carry=True, name="encoder")
        carry, _ = encoder(source)
        decoder = nn.RNN(nn.LSTMCell(self.hidden), name="decoder")
        return nn.Dense(target.shape[-1])(decoder(target, initial_carry=carry))


class Bottleneck(nn.Module):
    """A block of a ResNet v1.5: the stride is in the 3x3 convolution."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """`relu(branch(x) + shortcut(x))`."""
        norm = lambda: nn.BatchNorm(use_running_average=True)
        y = nn.relu(norm()(nn.Conv(self.width, (1, 1), use_bias=False)(x)))
        strides = (self.stride, self.stride)
        y = nn.Conv(self.width, (3, 3), strides, use_bias=False)(y)
        y = nn.Conv(4 * self.width, (1, 1), use_bias=False)(nn.relu(norm()(y)))
        y = norm()(y)
        if x.shape != y.shape:
            x = nn.Conv(4 * self.width, (1, 1), strides, use_bias=False)(x)
            x = norm()(x)
        return nn.relu(y + x)


class Resnet50(nn.Module):
    """ResNet-50 v1.5."""

    stages: tuple[int, ...] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Logits."""
        x = nn.Conv(64, (7, 7), (2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = Bottleneck(64 * 2**stage, stride)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


def sinusoids(length: int, features: int) -> np.ndarray:
    """Sines and cosines of positions, at wave lengths from 2 pi to 20000 pi."""
    rates = 10000.0 ** -(np.arange(0, features, 2) / features)
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], 1, dtype=np.float32)


class Layer(nn.Module):
    """A pre-LN layer: attention, to a memory too if there is one, and an MLP."""

    heads: int

    @nn.compact
    def __call__(self, x: Any, mask: Any, memory: Any = None, seen: Any = None) -> Any:
        """`x` with what each part adds to it."""
        attend = lambda name: nn.MultiHeadDotProductAttention(self.heads, name=name)
        y = nn.LayerNorm()(x)
        x = x + attend("self")(y, y, mask=mask)
        if memory is not None:
            x = x + attend("cross")(nn.LayerNorm()(x), memory, mask=seen)
        y = nn.gelu(nn.Dense(4 * x.shape[-1], name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="down")(y)


class LanguageModel(nn.Module):
    """A decoder of tokens under a causal mask."""

    layers: int
    features: int
    heads: int
    words: int

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        """Logits of the next tokens."""
        shifted = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
        x = nn.Embed(self.words, self.features)(shifted)
        x = x + sinusoids(tokens.shape[1], self.features)
        for _ in range(self.layers):
            x = Layer(self.heads)(x, nn.make_causal_mask(tokens))
        return nn.Dense(self.words)(nn.LayerNorm()(x))


class Translator(nn.Module):
    """An encoder and a decoder of tokens; padding, token 0, is masked."""

    layers: int
    features: int
    heads: int
    words: int

    @nn.compact
    def __call__(self, source: Any, target: Any) -> Any:
        """Logits, by the table that embeds the tokens."""
        table = nn.Embed(self.words, self.features)
        place = lambda tokens: sinusoids(tokens.shape[1], self.features)
        memory = table(source) + place(source)
        mask = nn.make_attention_mask(source > 0, source > 0)
        for _ in range(self.layers):
            memory = Layer(self.heads)(memory, mask)
        memory = nn.LayerNorm()(memory)
        y = table(jnp.pad(target, ((0, 0), (1, 0)))[:, :-1]) + place(target)
        mask = nn.make_attention_mask(target > 0, target > 0)
        mask = nn.combine_masks(mask, nn.make_causal_mask(target))
        seen = nn.make_attention_mask(target > 0, source > 0)
        for _ in range(self.layers):
            y = Layer(self.heads)(y, mask, memory, seen)
        return table.attend(nn.LayerNorm()(y)) / np.sqrt(self.features)


class GraphNet(nn.Module):
    """Graph convolutions: each node sums what its neighbours send it."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, nodes: Any, senders: Any, receivers: Any) -> Any:
        """Logits of each node."""
        count = lambda to: jax.ops.segment_sum(jnp.ones(to.shape), to, nodes.shape[0])
        out, into = (
            jax.lax.rsqrt(1 + count(to))[:, None] for to in (senders, receivers)
        )
        for width in self.features:
            sent = nn.Dense(width)(nodes) * out
            heard = jax.ops.segment_sum(sent[senders], receivers, nodes.shape[0])
            nodes = nn.relu((sent + heard) * into)
        return nn.Dense(7)(nodes)


class ActorCritic(nn.Module):
    """Frames of a game to log-probabilities of actions and a value."""

    @nn.compact
    def __call__(self, frames: Any) -> Any:
        """Policy and value."""
        x = frames.astype(jnp.float32) / 255
        for features, size, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            x = nn.Conv(features, (size, size), (stride, stride))(x)
            x = nn.relu(x)
        x = nn.relu(nn.Dense(512)(x.reshape(x.shape[0], -1)))
        return nn.log_softmax(nn.Dense(6, name="logits")(x)), nn.Dense(1)(x)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of an array of numbers."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def words(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of an array of tokens or indices."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


KEY = jax.eval_shape(jax.random.key, 0)
FRAMES = jax.ShapeDtypeStruct((1, 84, 84, 4), jnp.uint8)


def edges(count: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Senders and receivers."""
    return words(count), words(count)


def translator_paths(layers: int) -> int:
    """Paths through queries, keys, values, masks and past each part."""
    memory, y = 1, 1
    for _ in range(layers):
        memory = 2 * (memory + 3 * memory + 1)
    for _ in range(layers):
        y = y + 3 * y + 1
        y = 2 * (y + y + 2 * memory + 2)
    return y


EXAMPLES = {
    "mnist cnn": Example(
        (Cnn(), (floats(1, 28, 28, 1),)),
        (Cnn(), (floats(2, 28, 28, 1),)),
        0, {}, 1,
    ),
    "vae": Example(
        (Vae(20), (floats(1, 784), KEY)), (Vae(20), (floats(2, 784), KEY)), 1, {}, 4
    ),
    "seq2seq lstm": Example(
        (Seq2seq(512), (floats(1, 40, 64), floats(1, 30, 64))),
        (Seq2seq(32), (floats(2, 9, 15), floats(2, 6, 15))),
        0, {"scan": 1}, 3,
    ),
    "resnet-50 v1.5": Example(
        (Resnet50(), (floats(1, 224, 224, 3),)),
        (Resnet50(), (floats(2, 32, 32, 3),)),
        16, {}, 2**16,
    ),
    "transformer lm": Example(
        (LanguageModel(6, 512, 8, 30000), (words(1, 512),)),
        (LanguageModel(3, 32, 4, 50), (words(2, 16),)),
        12, {"attention": 6}, 8**6,
    ),
    "translator": Example(
        (Translator(6, 1024, 16, 32000), (words(1, 256), words(1, 256))),
        (Translator(2, 32, 4, 50), (words(2, 16), words(2, 12))),
        30, {"attention": 18, "and": 1}, translator_paths(6),
    ),
    "graph net": Example(
        (GraphNet((64, 64)), (floats(2708, 1433), *edges(10556))),
        (GraphNet((64, 64)), (floats(40, 30), *edges(100))),
        2, {"product": 4, "gather": 2, "scatter-add": 2}, 19,
    ),
    "actor-critic": Example(
        (ActorCritic(), (FRAMES,)),
        (ActorCritic(), (FRAMES,)),
        0, {}, 2,
    ),
}  # fmt: skip
