"""ResNet-18, ResNet-50 and ViT-B/16 in Flax NNX, as torchvision has them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

conv = functools.partial(nnx.Conv, use_bias=False)


class Norm(nnx.BatchNorm):
    """Batch normalization by stored statistics."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        super().__init__(width, use_running_average=True, epsilon=1e-5, rngs=rngs)


class Basic(nnx.Module):
    """Two 3x3 convolutions beside a skip."""

    widen = 1

    def __init__(self, ins: int, width: int, strides: int, rngs: nnx.Rngs):
        step = {"padding": 1, "rngs": rngs}
        self.conv1 = conv(ins, width, (3, 3), (strides, strides), **step)
        self.bn1 = Norm(width, rngs)
        self.conv2 = conv(width, width, (3, 3), **step)
        self.bn2 = Norm(width, rngs)
        self.down = _down(ins, width, strides, rngs)

    def __call__(self, x: Any) -> Any:
        """The block."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(self.bn2(self.conv2(y)) + (self.down(x) if self.down else x))


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 beside a skip."""

    widen = 4

    def __init__(self, ins: int, width: int, strides: int, rngs: nnx.Rngs):
        self.conv1 = conv(ins, width, (1, 1), rngs=rngs)
        self.bn1 = Norm(width, rngs)
        steps = (strides, strides)
        self.conv2 = conv(width, width, (3, 3), steps, padding=1, rngs=rngs)
        self.bn2 = Norm(width, rngs)
        self.conv3 = conv(width, 4 * width, (1, 1), rngs=rngs)
        self.bn3 = Norm(4 * width, rngs)
        self.down = _down(ins, 4 * width, strides, rngs)

    def __call__(self, x: Any) -> Any:
        """The block."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        return nnx.relu(self.bn3(self.conv3(y)) + (self.down(x) if self.down else x))


def _down(ins: int, outs: int, strides: int, rngs: nnx.Rngs) -> Any:
    if ins == outs and strides == 1:
        return None
    step = conv(ins, outs, (1, 1), (strides, strides), rngs=rngs)
    return nnx.Sequential(step, Norm(outs, rngs))


class ResNet(nnx.Module):
    """He et al. 2016, for images of 224 pixels."""

    def __init__(self, block: Any, depths: tuple[int, ...], rngs: nnx.Rngs):
        self.conv1 = conv(3, 64, (7, 7), (2, 2), padding=3, rngs=rngs)
        self.bn1 = Norm(64, rngs)
        blocks, ins = [], 64
        for stage, depth in enumerate(depths):
            for i in range(depth):
                width, strides = 64 * 2**stage, 2 if stage and not i else 1
                blocks.append(block(ins, width, strides, rngs))
                ins = width * block.widen
        self.blocks = nnx.List(blocks)
        self.fc = nnx.Linear(ins, 1000, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Logits."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((1, 2)))


class Layer(nnx.Module):
    """A transformer layer, norms first."""

    def __init__(self, width: int, heads: int, hidden: int, rngs: nnx.Rngs):
        self.ln1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.ln2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """The layer."""
        x = x + self.attention(self.ln1(x))
        return x + self.down(nnx.gelu(self.up(self.ln2(x))))


class ViT(nnx.Module):
    """Dosovitskiy et al. 2021, patches of 16 pixels."""

    def __init__(self, rngs: nnx.Rngs, size: int = 224, width: int = 768):
        self.patches = nnx.Conv(3, width, (16, 16), (16, 16), rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, width)))
        draw = jax.random.normal(rngs.params(), (1, (size // 16) ** 2 + 1, width))
        self.position = nnx.Param(0.02 * draw)
        layers = [Layer(width, 12, 4 * width, rngs) for _ in range(12)]
        self.layers = nnx.List(layers)
        self.ln = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 1000, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Logits."""
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token, x], 1) + self.position[...]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.ln(x)[:, 0])


MODELS = {
    "resnet18": lambda rngs: ResNet(Basic, (2, 2, 2, 2), rngs),
    "resnet50": lambda rngs: ResNet(Bottleneck, (3, 4, 6, 3), rngs),
    "vit_b_16": lambda rngs: ViT(rngs),
}


def make(name: str) -> nnx.Module:
    """A model with random weights and the statistics of a trained one's kind."""
    model = MODELS[name](nnx.Rngs(0))
    model.eval()
    return model
