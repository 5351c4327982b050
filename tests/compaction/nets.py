"""Small networks for compaction, each with one thing that is hard to cut.

Most are functions of a dict of arrays: what they do is all there is to see. A spec of
shapes gives their parameters; one-dimensional ones are never 0 or 1, as after training.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import dagjax as dj


class Net(NamedTuple):
    """A function `fn(params, *xs)`, its parameters, its inputs, and the DAG."""

    fn: Callable[..., Any]
    params: Any
    xs: tuple[Any, ...]
    dag: dj.DAG


def filled(shapes: Any, seed: int = 0) -> Any:
    """Generic values: kernels keep a signal alive, scales, variances are positive."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        shape = leaf if isinstance(leaf, tuple) else leaf.shape
        name = jax.tree_util.keystr(path[-2:])
        value = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]) or 1)
        if "var" in name or "scale" in name:
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) < 2:
            value = rng.normal(size=shape) / 2
        return jnp.asarray(value, getattr(leaf, "dtype", jnp.float32))

    is_shape = lambda s: isinstance(s, tuple) and all(isinstance(n, int) for n in s)
    return jax.tree_util.tree_map_with_path(draw, shapes, is_leaf=is_shape)


def normal(*shape: int, seed: int = 1) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def net(fn: Any, shapes: Any, *xs: Any, seed: int = 0) -> Net:
    """Traced from shapes; inputs are shapes or arrays."""
    given = tuple(normal(*x) if isinstance(x, tuple) else x for x in xs)
    params = filled(shapes, seed)

    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):  # as users write
            return fn(*args)

    return Net(run, params, given, dj.trace(run, params, *given))


def conv(
    x: Any, w: Any, strides: int = 1, padding: str = "SAME", **options: Any
) -> Any:
    return lax.conv_general_dilated(
        x, w, (strides, strides), padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), **options,
    )  # fmt: skip


def batch_norm(p: Any, x: Any) -> Any:
    scale = p["scale"] * lax.rsqrt(p["var"] + 1e-5)
    return (x - p["mean"]) * scale + p["bias"]


def norm_shapes(n: int) -> dict[str, tuple[int, ...]]:
    return {"scale": (n,), "bias": (n,), "mean": (n,), "var": (n,)}


def layer_norm(p: Any, x: Any, fast: bool = False) -> Any:
    mean = x.mean(-1, keepdims=True)
    squares = lambda: (x**2).mean(-1, keepdims=True) - mean**2
    var = squares() if fast else ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(var + 1e-3) * p["scale"] + p["bias"]


def rms_norm(p: Any, x: Any) -> Any:
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-3) * p["scale"]


def group_norm(p: Any, x: Any, groups: int, fast: bool) -> Any:
    n, h, w, c = x.shape
    y = x.reshape(n, h, w, groups, c // groups)
    mean = y.mean((1, 2, 4), keepdims=True)
    if fast:
        var = (y**2).mean((1, 2, 4), keepdims=True) - mean**2
    else:
        var = ((y - mean) ** 2).mean((1, 2, 4), keepdims=True)
    y = (y - mean) * lax.rsqrt(var + 1e-3)
    return y.reshape(x.shape) * p["scale"] + p["bias"]


# --- convolutions ---------------------------------------------------------------------


def plain(padding: str) -> Any:
    """Two convolutions with biases: zombies meet the border, or do not."""

    def run(p, x):
        x = jax.nn.relu(conv(x, p["one"], padding=padding) + p["b"])
        x = jax.nn.relu(conv(x, p["two"], padding=padding) + p["c"])
        return x.mean((1, 2)) @ p["head"]

    shapes = {
        "one": (3, 3, 2, 6),
        "b": (6,),
        "two": (3, 3, 6, 5),
        "c": (5,),
        "head": (5, 3),
    }
    return net(run, shapes, (2, 6, 6, 2))


def residual():
    """Batch norm, max pooling, a stream, flatten."""

    def run(p, x):
        x = jax.nn.relu(batch_norm(p["bn0"], conv(x, p["stem"])))
        y = jax.nn.relu(batch_norm(p["bn1"], conv(x, p["up"])))
        x = jax.nn.relu(x + batch_norm(p["bn2"], conv(y, p["down"])))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
        return x.reshape(len(x), -1) @ p["head"] + p["bias"]

    shapes = {
        "stem": (3, 3, 2, 5), "bn0": norm_shapes(5),
        "up": (3, 3, 5, 6), "bn1": norm_shapes(6),
        "down": (1, 1, 6, 5), "bn2": norm_shapes(5),
        "head": (2 * 2 * 5, 3), "bias": (3,),
    }  # fmt: skip
    return net(run, shapes, (2, 4, 4, 2))


def option_a():
    """Shortcuts padded with zeros where the stream widens."""

    def run(p, x):
        x = jax.nn.relu(conv(x, p["stem"]) + p["b"])
        y = conv(jax.nn.relu(conv(x, p["one"], 2) + p["c"]), p["two"])
        x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (1, 3)))
        return jax.nn.relu(x + y).mean((1, 2)) @ p["head"]

    shapes = {
        "stem": (3, 3, 2, 4), "b": (4,), "one": (3, 3, 4, 5), "c": (5,),
        "two": (3, 3, 5, 8), "head": (8, 3),
    }  # fmt: skip
    return net(run, shapes, (2, 4, 4, 2))


def mobile():
    """Depthwise, squeeze and excitation, hard swish."""

    def run(p, x):
        x = jax.nn.hard_swish(conv(x, p["up"]) + p["b"])
        x = conv(x, p["depth"], feature_group_count=6) + p["c"]
        gate = jax.nn.relu(x.mean((1, 2)) @ p["squeeze"] + p["d"])
        gate = jax.nn.sigmoid(gate @ p["excite"] + p["e"])
        x = conv(x * gate[:, None, None], p["down"])
        return x.mean((1, 2)) @ p["head"]

    shapes = {
        "up": (1, 1, 2, 6), "b": (6,), "depth": (3, 3, 1, 6), "c": (6,),
        "squeeze": (6, 3), "d": (3,), "excite": (3, 6), "e": (6,),
        "down": (1, 1, 6, 4), "head": (4, 3),
    }  # fmt: skip
    return net(run, shapes, (2, 4, 4, 2))


def shuffled():
    """Group convolutions with a channel shuffle between, a depth multiplier."""

    def shuffle(x, groups):
        n, h, w, c = x.shape
        x = x.reshape(n, h, w, groups, c // groups)
        return x.swapaxes(3, 4).reshape(n, h, w, c)

    def run(p, x):
        x = jax.nn.relu(conv(x, p["stem"]) + p["b"])
        x = shuffle(jax.nn.relu(conv(x, p["one"], feature_group_count=3)), 3)
        x = jax.nn.relu(conv(x, p["two"], feature_group_count=3) + p["c"])
        x = conv(x, p["wide"], feature_group_count=6)
        return x.mean((1, 2)) @ p["head"]

    shapes = {
        "stem": (3, 3, 2, 6), "b": (6,), "one": (1, 1, 2, 9), "two": (3, 3, 3, 6),
        "c": (6,), "wide": (3, 3, 1, 12), "head": (12, 3),
    }  # fmt: skip
    return net(run, shapes, (2, 4, 4, 2))


def dense_concat():
    """Every layer reads all before it, side by side."""

    def run(p, x):
        x = conv(x, p["stem"])
        for i in range(2):
            y = jax.nn.relu(batch_norm(p[f"bn{i}"], x))
            x = jnp.concatenate([x, conv(y, p[f"conv{i}"])], -1)
        return x.mean((1, 2)) @ p["head"]

    shapes = {
        "stem": (3, 3, 2, 4), "bn0": norm_shapes(4), "conv0": (3, 3, 4, 3),
        "bn1": norm_shapes(7), "conv1": (3, 3, 7, 3), "head": (10, 3),
    }  # fmt: skip
    return net(run, shapes, (2, 4, 4, 2))


def grouped_norm(fast: bool):
    def run(p, x):
        x = conv(x, p["stem"]) + p["b"]
        y = jax.nn.relu(group_norm(p["gn"], x, 2, fast))
        return (x + conv(y, p["body"])).mean((1, 2)) @ p["head"]

    shapes = {
        "stem": (3, 3, 2, 6), "b": (6,), "gn": {"scale": (6,), "bias": (6,)},
        "body": (1, 1, 6, 6), "head": (6, 3),
    }  # fmt: skip
    return net(run, shapes, (2, 3, 3, 2))


def transposed():
    """Up again by a transposed convolution, beside a skip."""

    def run(p, x):
        x = jax.nn.relu(conv(x, p["stem"]) + p["b"])
        y = jax.nn.relu(conv(x, p["down"], 2) + p["c"])
        y = lax.conv_transpose(y, p["up"], (2, 2), "SAME")
        return conv(jnp.concatenate([x, y], -1), p["head"])

    shapes = {
        "stem": (3, 3, 2, 4), "b": (4,), "down": (3, 3, 4, 5), "c": (5,),
        "up": (2, 2, 5, 3), "head": (1, 1, 7, 3),
    }  # fmt: skip
    return net(run, shapes, (2, 4, 4, 2))


# --- dense and norms ------------------------------------------------------------------


def mlp():
    def run(p, x):
        x = jax.nn.relu(x @ p["one"] + p["b"])
        x = jax.nn.gelu(x @ p["two"] + p["c"])
        return x @ p["head"] + p["d"]

    shapes = {
        "one": (4, 8),
        "b": (8,),
        "two": (8, 6),
        "c": (6,),
        "head": (6, 3),
        "d": (3,),
    }
    return net(run, shapes, (2, 4))


def normed(norm: Callable[..., Any], *affine: str):
    """A stream under norms, a residual, and a norm over cut channels at the end."""

    def run(p, x):
        x = x @ p["embed"] + p["b"]
        y = jnp.tanh(norm(p["norm1"], x) @ p["up"] + p["c"])
        x = x + y @ p["down"]
        return norm(p["norm2"], x) @ p["head"]

    scales = {name: (8,) for name in affine}
    shapes = {
        "embed": (4, 8), "b": (8,), "norm1": scales, "up": (8, 6), "c": (6,),
        "down": (6, 8), "norm2": scales, "head": (8, 3),
    }  # fmt: skip
    return net(run, shapes, (2, 4))


def softmaxed():
    """A softmax whose own axis is cut, read by a layer."""

    def run(p, x):
        x = jax.nn.softmax(x @ p["one"] + p["b"])
        y = x.max(-1, keepdims=True) + jax.nn.logsumexp(x @ p["two"], -1, keepdims=True)
        return x @ p["head"] + y

    shapes = {"one": (4, 8), "b": (8,), "two": (8, 5), "head": (8, 3)}
    return net(run, shapes, (2, 4))


def gated():
    """A gate and a value out of one matrix."""

    def run(p, x):
        a, b = jnp.split(x @ p["up"] + p["b"], 2, -1)
        return (a * jax.nn.silu(b)) @ p["down"]

    return net(run, {"up": (4, 12), "b": (12,), "down": (6, 3)}, (2, 4))


# --- attention ------------------------------------------------------------------------


def fused():
    """Queries, keys and values out of one matrix `(3, heads, size)`."""

    def run(p, x):
        b, t, _ = x.shape
        x = x @ p["embed"]
        qkv = (layer_norm(p["norm"], x) @ p["qkv"] + p["b"]).reshape(b, t, 3, 2, 4)
        q, k, v = (qkv[:, :, i] for i in range(3))
        seen = jnp.tril(jnp.ones((t, t), bool))
        logits = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(4)
        w = jax.nn.softmax(jnp.where(seen, logits, -1e9))
        y = jnp.einsum("bhts,bshk->bthk", w, v).reshape(b, t, 8)
        return (x + y @ p["out"]) @ p["head"]

    shapes = {
        "embed": (4, 6), "norm": {"scale": (6,), "bias": (6,)}, "qkv": (6, 24),
        "b": (24,), "out": (8, 6), "head": (6, 3),
    }  # fmt: skip
    return net(run, shapes, (2, 3, 4))


def rotary():
    """Grouped queries, rotary positions, root mean square norm, a tied embedding."""

    def turned(x):
        t, half = x.shape[1], x.shape[-1] // 2
        angle = jnp.arange(t)[:, None] * 10.0 ** -jnp.arange(half)
        sin, cos = jnp.sin(angle)[None, :, None], jnp.cos(angle)[None, :, None]
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def run(p, ids):
        x = p["table"][ids] + p["places"][: ids.shape[1]]
        b, t = ids.shape
        y = rms_norm(p["norm"], x)
        q = turned((y @ p["q"]).reshape(b, t, 4, 4))
        k = turned((y @ p["k"]).reshape(b, t, 2, 4))
        v = (y @ p["v"]).reshape(b, t, 2, 4)
        k, v = (jnp.repeat(z, 2, axis=2) for z in (k, v))
        w = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 2.0)
        y = jnp.einsum("bhts,bshk->bthk", w, v).reshape(b, t, 16)
        x = x + y @ p["out"]
        x = x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]
        return rms_norm(p["last"], x) @ p["table"].T

    shapes = {
        "table": (7, 6), "places": (5, 6), "norm": {"scale": (6,)}, "q": (6, 16),
        "k": (6, 8), "v": (6, 8), "out": (16, 6), "gate": (6, 5), "up": (6, 5),
        "down": (5, 6), "last": {"scale": (6,)},
    }  # fmt: skip
    return net(run, shapes, jnp.array([[0, 3, 1], [6, 2, 2]]))


def grouped_queries():
    """Queries as `(groups, repeats)` beside keys and values of a group."""

    def run(p, x):
        b, t, _ = x.shape
        q = (x @ p["q"]).reshape(b, t, 2, 3, 4)
        k = (x @ p["k"]).reshape(b, t, 2, 4)
        v = (x @ p["v"]).reshape(b, t, 2, 4)
        w = jax.nn.softmax(jnp.einsum("btgrk,bsgk->bgrts", q, k))
        y = jnp.einsum("bgrts,bsgk->btgrk", w, v).reshape(b, t, 24)
        return y @ p["out"]

    shapes = {"q": (4, 24), "k": (4, 8), "v": (4, 8), "out": (24, 3)}
    return net(run, shapes, (2, 3, 4))


# --- loops and odd things -------------------------------------------------------------


def lstm():
    """A cell whose gates are split from one matrix, by scan."""

    def run(p, x):
        def cell(carry, x):
            h, c = carry
            i, f, g, o = jnp.split(x @ p["x"] + h @ p["h"] + p["b"], 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((x.shape[0], 5))
        (h, _), hs = lax.scan(cell, (zero, zero), x.swapaxes(0, 1))
        return (h + hs.mean(0)) @ p["head"]

    shapes = {"x": (3, 20), "h": (5, 20), "b": (20,), "head": (5, 2)}
    return net(run, shapes, (2, 4, 3))


def looped():
    """A while loop and a condition inside."""

    def run(p, x):
        h = jnp.tanh(x @ p["up"] + p["b"])
        step = lambda at: (at[0] + 1, jnp.tanh(at[1] * p["scale"] + 0.1))
        h = lax.while_loop(lambda at: at[0] < 3, step, (0, h))[1]
        h = lax.cond(x.sum() > 0, lambda h: h * 2, lambda h: h + p["b"], h)
        return h @ p["down"]

    shapes = {"up": (4, 6), "b": (6,), "scale": (6,), "down": (6, 3)}
    return net(run, shapes, (2, 4))


def rules():
    """Derivative rules of one's own, rematerialization, a closed-over array."""

    @jax.custom_vjp
    def straight(x, scale):
        return jnp.round(x * 4) / 4 * scale

    straight.defvjp(
        lambda x, s: (straight(x, s), (x, s)),
        lambda res, g: (g * res[1], (g * res[0]).sum(0)),
    )
    table = jnp.asarray(np.random.default_rng(5).normal(size=(6,)), jnp.float32)

    def run(p, x):
        x = jax.nn.relu(x @ p["one"] + p["b"]) * table
        x = jax.checkpoint(lambda x: jax.nn.relu6(x @ p["two"] + p["c"]))(x)
        return straight(x, p["scale"]) @ p["head"]

    shapes = {
        "one": (4, 6), "b": (6,), "two": (6, 5), "c": (5,), "scale": (5,),
        "head": (5, 3),
    }  # fmt: skip
    return net(run, shapes, (2, 4))


def several():
    """Two inputs, outputs in a dict, parameters in a list, one of rank 0."""

    def run(p, x, ids):
        one, table, two, temperature = p
        h = jnp.tanh(x["image"] @ one) + table[ids]
        return {"logits": h @ two * temperature, "extra": (h**2).sum(-1)}

    shapes = [(4, 6), (5, 6), (6, 3), ()]
    return net(run, shapes, {"image": normal(2, 4)}, jnp.array([1, 4]))


def half():
    """Parameters in bfloat16, sums in float32."""

    def run(p, x):
        x = jax.nn.relu(x.astype(jnp.bfloat16) @ p["one"] + p["b"])
        return (x @ p["two"]).astype(jnp.float32)

    shapes = {"one": (4, 8), "b": (8,), "two": (8, 3)}
    leaf = lambda s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    return net(run, {k: leaf(s) for k, s in shapes.items()}, (2, 4))


# --- Flax -----------------------------------------------------------------------------


class Linen(nn.Module):
    """Attention, norms and an MLP of Flax."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(10)(nn.RMSNorm()(x)))
        x = x + nn.Dense(8)(y)
        return nn.Dense(3)(x.mean(1))


class Nnx(nnx.Module):
    """Convolution, batch norm and group norm of Flax."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.depth = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.group = nnx.GroupNorm(8, 2, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = nnx.relu(self.group(self.depth(x)))
        return self.head(x.mean((1, 2)))


def linen():
    module, x = Linen(), normal(2, 3, 4)
    variables = filled(jax.eval_shape(module.init, jax.random.key(0), x))
    fn = lambda params, x: module.apply({"params": params}, x)
    return Net(fn, variables["params"], (x,), dj.from_linen(module, variables, x))


def from_nnx():
    module, x = Nnx(nnx.Rngs(0)), normal(2, 4, 4, 2)
    graph, state = nnx.split(module)
    module = nnx.merge(graph, filled(state))
    dag = dj.from_nnx(module, x)
    return Net(lambda params, x: dag.replace(params=params)(x), dag.params, (x,), dag)


NETS: dict[str, Callable[[], Net]] = {
    "mlp": mlp,
    "same": lambda: plain("SAME"),
    "valid": lambda: plain("VALID"),
    "residual": residual,
    "option_a": option_a,
    "mobile": mobile,
    "shuffled": shuffled,
    "dense_concat": dense_concat,
    "group_norm": lambda: grouped_norm(False),
    "group_norm_fast": lambda: grouped_norm(True),
    "transposed": transposed,
    "layer_norm": lambda: normed(layer_norm, "scale", "bias"),
    "layer_norm_fast": lambda: normed(
        lambda p, x: layer_norm(p, x, fast=True), "scale", "bias"
    ),
    "rms_norm": lambda: normed(rms_norm, "scale"),
    "softmaxed": softmaxed,
    "gated": gated,
    "fused": fused,
    "rotary": rotary,
    "grouped_queries": grouped_queries,
    "lstm": lstm,
    "looped": looped,
    "rules": rules,
    "several": several,
    "half": half,
    "linen": linen,
    "nnx": from_nnx,
}

# --- one hard thing each --------------------------------------------------------------


def layered(middle: Callable[..., Any], width: int = 6, **shapes: Any) -> Net:
    """`middle` between two layers; it gets the parameters too."""

    def run(p, x):
        h = middle(p, x @ p["up"] + p["b"])
        return h @ p["down"]

    sizes = {"up": (4, width), "b": (width,), "down": (width, 3)}
    return net(run, sizes | shapes, (3, 4))


def gru(p, h):
    """A state that starts at a parameter, sums of it beside."""

    def cell(h, x):
        (rx, zx, nx), (r, z, n) = (jnp.split(y, 3, -1) for y in (x, h @ p["h"]))
        r, z = jax.nn.sigmoid(rx + r), jax.nn.sigmoid(zx + z)
        h = (1 - z) * jnp.tanh(nx + r * n) + z * h
        return h, h.sum(-1)

    h, sums = lax.scan(cell, p["start"], h)
    return (h + sums.sum())[None]


def standardized(p, h):
    """A kernel that is normalized over its inputs."""
    w = p["w"]
    mean = w.mean(0, keepdims=True)
    scale = lax.rsqrt(((w - mean) ** 2).mean(0, keepdims=True) + 1e-3)
    return jax.nn.relu(h) @ ((w - mean) * scale)


def class_token(p, h):
    """A token of its own beside the others; only its output is read."""
    h = jnp.concatenate([p["token"][None], h]) + p["places"]
    return (h + jax.nn.softmax(h @ h.T) @ h)[:1]


def batch_statistics(p, h):
    mean = h.mean(0)
    scale = lax.rsqrt(((h - mean) ** 2).mean(0) + 1e-3)
    return (h - mean) * scale * p["scale"] + p["c"]


def outer(p, h):
    h = jnp.tanh(h)
    return (h[:, :, None] * h[:, None]).reshape(len(h), -1)


def ranked(p, h):
    """The places of the largest along another axis, which no zero tells."""
    values, places = lax.top_k(h.T, 2)
    return (values + places.astype(h.dtype)).T


def unit_inputs():
    """Zombies behind a quotient: at zero inputs nothing is finite."""

    def run(p, x):
        x = x / jnp.sqrt((x * x).sum(-1, keepdims=True))
        return jnp.tanh(x @ p["up"] + p["b"]) @ p["down"]

    return net(run, {"up": (4, 6), "b": (6,), "down": (6, 3)}, (3, 4))


def windows(p, h):
    """Some windows lie in the padding: there a silent channel is no zero."""
    h = lax.reduce_window(h, -jnp.inf, lax.max, (2, 1), (1, 1), ((2, 2), (0, 0)))
    return jnp.tanh(h)


def filled_in(p, h):
    """Rows that do not exist hold twos."""
    return jnp.take(h, jnp.array([0, 7, 1]), axis=0, mode="fill", fill_value=2.0)


ODD: dict[str, Callable[[], Net]] = {
    "largest": lambda: layered(lambda p, h: jnp.tanh(h - h.max(-1, keepdims=True))),
    "maxout": lambda: layered(lambda p, h: h.reshape(3, 4, 2).max(-1), 8, down=(4, 3)),
    "counted": lambda: layered(
        lambda p, h: h * (h >= 0).sum(-1, keepdims=True).astype(h.dtype)
    ),
    "log_sum": lambda: layered(
        lambda p, h: jnp.tanh(h) + jax.nn.logsumexp(h, -1, keepdims=True)
    ),
    "running": lambda: layered(lambda p, h: lax.cumlogsumexp(jnp.sin(h), axis=0)),
    "ranked": lambda: layered(ranked),
    "one_channel": lambda: layered(lambda p, h: jnp.tanh(h) * h[:, 2:3] + h[:, :1]),
    "scaled": lambda: layered(lambda p, h: jax.nn.relu(h) * p["s"], s=()),
    "by_row": lambda: layered(lambda p, h: jax.nn.relu(h) * p["s"][:, None], s=(3,)),
    "outer": lambda: layered(outer, 5, down=(25, 3)),
    "standardized": lambda: layered(standardized, w=(6, 6)),
    "batch_statistics": lambda: layered(batch_statistics, scale=(6,), c=(6,)),
    "class_token": lambda: layered(class_token, token=(6,), places=(4, 6)),
    "gru": lambda: layered(gru, 15, h=(5, 15), start=(5,), down=(5, 3)),
    "permuted": lambda: layered(
        lambda p, h: jnp.tanh(h)[:, np.array([2, 0, 1, 5, 4, 3])]
    ),
    "strided": lambda: layered(
        lambda p, h: jnp.tanh(h)[:, ::2] * h[:, 1::2], down=(3, 3)
    ),
    "repeated": lambda: layered(
        lambda p, h: jnp.repeat(jnp.cos(h), 2, 1), down=(12, 3)
    ),
    "rolled": lambda: layered(lambda p, h: jnp.roll(h, 2, -1) + jnp.flip(h, -1)),
    "symmetric": lambda: layered(
        lambda p, h: jnp.tanh(h) @ (p["m"] + p["m"].T), m=(6, 6)
    ),
    "straight": lambda: layered(lambda p, h: h + lax.stop_gradient(jnp.sign(h) - h)),
    "stacked": lambda: layered(
        lambda p, h: jnp.einsum("j,jbo->bo", p["g"], jnp.stack([jnp.sin(h), h, h * h])),
        g=(3,),
    ),
    "unit_inputs": unit_inputs,
    "windows": lambda: layered(windows),
    "filled_in": lambda: layered(filled_in),
    "angles": lambda: layered(lambda p, h: jnp.arctan2(h, -h * h)),
    "inverse": lambda: layered(lambda p, h: jnp.clip(1 / h, -2, 2)),
    "spectrum": lambda: layered(lambda p, h: jnp.abs(jnp.fft.fft(h))),
}
