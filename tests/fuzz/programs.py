"""Random JAX programs with random masks.

A program is a chain of operations on a value `[batch, length, channels]`, drawn by a
seed; each operation says how many parameters it takes and what it computes of them. The
function is plain JAX, so it is its own oracle.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LENGTH = 4


@dataclasses.dataclass
class Drawn:
    """A program: `fn(params, x)`, its parameters, the shape of one example."""

    fn: Callable[..., Any]
    params: dict[str, Any]
    shape: tuple[int, ...]

    def inputs(self, batch, seed=0):
        rng = np.random.default_rng(seed)
        return jnp.asarray(rng.normal(size=(batch, *self.shape)), jnp.float32)


OPERATIONS: dict[str, Callable[..., Any]] = {}


def operation(fn):
    """Enter `fn(draw, channels) -> (shapes, apply, channels)` into the table."""
    OPERATIONS[fn.__name__] = fn
    return fn


def names(seed, length=5):
    """The operations of a seed's program."""
    rng = np.random.default_rng([seed, 1])
    return ["dense", *map(str, rng.choice([*OPERATIONS], length)), "dense"]


def drawn(seed):
    """The program of a seed."""
    rng = np.random.default_rng(seed)
    start = channels = int(rng.integers(2, 6))
    steps, params = [], {}
    for number, name in enumerate(names(seed)):
        shapes, apply, channels = OPERATIONS[name](rng, channels)
        keys = [f"p{number}{letter}" for letter in "abcde"[: len(shapes)]]
        for key, shape in zip(keys, shapes, strict=True):
            params[key] = jnp.asarray(rng.normal(size=shape) * 0.7, jnp.float32)
        steps.append((apply, keys))

    def fn(p, x):
        for apply, keys in steps:
            x = apply(x, *(p[key] for key in keys))
        return x.mean(1)

    return Drawn(fn, params, (LENGTH, start))


# --- layers ---------------------------------------------------------------------------


def wide(rng):
    return int(rng.integers(2, 7))


@operation
def dense(rng, c):
    n = wide(rng)
    return [(c, n), (n,)], lambda x, w, b: x @ w + b, n


@operation
def biasless(rng, c):
    n = wide(rng)
    return [(c, n)], lambda x, w: jnp.tanh(x @ w), n


@operation
def heads(rng, c):
    h, d = int(rng.integers(2, 4)), int(rng.integers(2, 4))
    apply = lambda x, w, o: jnp.einsum(
        "blhd,hdc->blc", jax.nn.silu(jnp.einsum("blc,chd->blhd", x, w)), o
    )
    return [(c, h, d), (h, d, c)], apply, c


@operation
def attention(rng, c):
    h, d = 2, int(rng.integers(2, 4))

    def apply(x, q, k, v, o):
        one = lambda w: jnp.einsum("blc,chd->bhld", x, w)
        logits = jnp.einsum("bhld,bhmd->bhlm", one(q), one(k))
        return x + jnp.einsum("bhlm,bhmd,hdc->blc", jax.nn.softmax(logits), one(v), o)

    return [(c, h, d)] * 3 + [(h, d, c)], apply, c


@operation
def residual(rng, c):
    n = wide(rng)
    apply = lambda x, up, b, down: x + jax.nn.relu(x @ up + b) @ down
    return [(c, n), (n,), (n, c)], apply, c


@operation
def gated(rng, c):
    n = wide(rng)

    def apply(x, w, b):
        one, two = jnp.split(x @ w + b, 2, -1)
        return one * jax.nn.sigmoid(two)

    return [(c, 2 * n), (2 * n,)], apply, n


@operation
def convolution(rng, c):
    n = wide(rng)
    numbers = ("NHC", "HIO", "NHC")
    apply = lambda x, w, b: (
        lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers) + b
    )
    return [(3, c, n), (n,)], apply, n


@operation
def depthwise(rng, c):
    numbers = ("NHC", "HIO", "NHC")
    apply = lambda x, w: lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=numbers, feature_group_count=c
    )
    return [(2, 1, c)], apply, c


@operation
def low_rank(rng, c):
    n = wide(rng)
    return [(c, n), (c, 2), (2, n)], lambda x, w, a, b: x @ (w + a @ b), n


@operation
def scale_and_shift(rng, c):
    return [(c,), (c,)], lambda x, g, b: x * g + b, c


@operation
def layer_norm(rng, c):
    def apply(x, g, b):
        y = x - x.mean(-1, keepdims=True)
        return y * lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-2) * g + b

    return [(c,), (c,)], apply, c


@operation
def rms_norm(rng, c):
    apply = lambda x, g: x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-2) * g
    return [(c,)], apply, c


@operation
def learned_positions(rng, c):
    return [(LENGTH, c)], lambda x, p: x + p, c


@operation
def tokens(rng, c):
    """Learned queries times a matrix: no data reaches the product."""
    apply = lambda x, q, w: x + (q @ w)[None, :1]
    return [(2, 3), (3, c)], apply, c


# --- without parameters ---------------------------------------------------------------


def plain(fn):
    """An operation that takes no parameters and leaves the channels."""
    OPERATIONS[fn.__name__] = lambda rng, c: ([], fn, c)
    return fn


@plain
def relu(x):
    return jax.nn.relu(x)


@plain
def gelu(x):
    return jax.nn.gelu(x)


@plain
def sinusoids(x):
    return x + jnp.sin(jnp.arange(x.shape[-1], dtype=jnp.float32))


@plain
def softmax(x):
    return jax.nn.softmax(x, -1)


@plain
def centred(x):
    return jnp.maximum(x - x.mean(-1, keepdims=True), 0.5)


@plain
def with_ones(x):
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)[..., 1:] + x


@plain
def padded(x):
    return jnp.pad(x, ((0, 0), (1, 0), (0, 1)), constant_values=1.0)[:, :LENGTH, :-1]


@plain
def reversed_channels(x):
    return x[..., ::-1] + x


@plain
def shuffled(x):
    return x[..., np.random.default_rng(x.shape[-1]).permutation(x.shape[-1])]


@plain
def fortran(x):
    return jax.vmap(lambda h: h.ravel(order="F").reshape(h.shape))(x)


@plain
def set_first(x):
    return x.at[:, 0].set(0.0)


@plain
def segments(x):
    of = jnp.array([0, 1, 1, 2])
    return jax.vmap(lambda h: jax.ops.segment_sum(h, of, LENGTH))(x)


@plain
def spectrum(x):
    return jnp.abs(jnp.fft.fft(x, axis=1))


@plain
def barrier(x):
    return lax.optimization_barrier((x, x * 2))[1]


@plain
def summed_along(x):
    return jnp.cumsum(x, 1) * 0.5


@plain
def window(x):
    return lax.dynamic_update_slice_in_dim(x, x[:, :2] * 2, 1, axis=1)


@plain
def chosen(x):
    return lax.cond(x.sum() > 0, lambda h: h * 2, lambda h: jnp.tanh(h), x)


@plain
def repeated(x):
    return lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h) + 0.1 * h, x)


@operation
def scanned(rng, c):
    def apply(x, w, b):
        step = lambda h, layer: (jnp.tanh(h @ layer[0] + layer[1]), h.sum())
        return lax.scan(step, x, (w, b))[0]

    return [(2, c, c), (2, c)], apply, c


@operation
def recurrent(rng, c):
    def apply(x, w, u, b):
        step = lambda h, t: ((y := jnp.tanh(t @ w + h @ u + b)), y)
        first = jnp.zeros((x.shape[0], u.shape[0]))
        return lax.scan(step, first, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    n = wide(rng)
    return [(c, n), (n, n), (n,)], apply, n


@operation
def rematerialized(rng, c):
    n = wide(rng)
    apply = jax.checkpoint(lambda x, w, b: jnp.sin(x @ w + b))
    return [(c, n), (n,)], apply, n


@jax.custom_vjp
def _clipped(x, w):
    return jnp.clip(x, -1, 1) * w


_clipped.defvjp(
    lambda x, w: (_clipped(x, w), (x, w)),
    lambda res, g: (g * res[1], (g * res[0]).sum((0, 1))),
)


@operation
def custom_rule(rng, c):
    return [(c,)], _clipped, c


@jax.custom_vjp
def _smeared(x):
    return jnp.tanh(x)


_smeared.defvjp(
    lambda x: (_smeared(x), None), lambda _, g: (g + g.mean(-1, keepdims=True),)
)


@plain
def rule_that_mixes(x):
    return _smeared(x)


# --- masks ----------------------------------------------------------------------------


def masks(params, seed):
    """`{kind: mask}`: of everything, of writers, of readers, of single entries."""
    rng = np.random.default_rng(seed)
    ones = {k: np.ones(v.shape, bool) for k, v in params.items()}
    draw = lambda shape, density: rng.random(shape) < density
    columns = {k: m & draw(m.shape[-1:], 0.6) for k, m in ones.items()}
    rows = {
        k: m & draw(m.shape[:1], 0.6).reshape(-1, *[1] * (m.ndim - 1))
        for k, m in ones.items()
    }
    writers = {k: m if m.ndim > 1 else ones[k] for k, m in columns.items()}
    entries = {k: draw(m.shape, 0.5) for k, m in ones.items()}
    gone = str(rng.choice([*params]))
    leaf = {**ones, gone: np.zeros_like(ones[gone])}
    return {
        "columns": columns, "writers": writers, "rows": rows, "entries": entries,
        "leaf": leaf,
    }  # fmt: skip
