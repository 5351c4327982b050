"""Functions to trace, small ones with one property each."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """A residual block with batch statistics."""

    width: int

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.Conv(self.width, (3, 3))(x)
        h = nn.relu(nn.BatchNorm(use_running_average=not train)(h))
        h = nn.Conv(self.width, (3, 3))(h)
        return nn.relu(x + h)


class ResNet(nn.Module):
    """Two residual blocks, dropout, a readout."""

    width: int = 2

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        for _ in range(2):
            x = Block(self.width)(x, train)
        x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(3)(x)


def dense(params, x):
    return x @ params["kernel"] + params["bias"][None]


def norm(params, x):
    """Layer norm, whose diamonds close within one value."""
    mean = x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6)
    return (x - mean) * scale * params["scale"][None]


def attend(q, k, v):
    return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v


def transformer(params, x):
    """A pre-norm block on `[B, T, d]`."""
    p, h = params["attention"], x * params["norm"][None, None]
    x = x + attend(h @ p["q"], h @ p["k"], h @ p["v"]) @ p["out"]
    return x + jax.nn.gelu(x @ params["up"]) @ params["down"]


def kernels(shapes, seed=0):
    """A tree of random arrays of a tree of shapes."""
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draw = lambda key, shape: jax.random.normal(key, shape) / shape[0] ** 0.5
    return tree.unflatten(map(draw, keys, leaves))


TRANSFORMER = {
    "attention": {"q": (4, 4), "k": (4, 4), "v": (4, 4), "out": (4, 4)},
    "norm": (4,),
    "up": (4, 6),
    "down": (6, 4),
}
