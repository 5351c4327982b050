"""The value-frozen derivative, primitive by primitive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dagjax as dj
from tests.graph import nets

X = np.random.default_rng(0).normal(size=(3, 4))
W = np.random.default_rng(1).normal(size=(4, 4))

# f(x) = G x with no constant: linear maps, rectifiers, gates, normalizations, secants.
HOMOGENEOUS = {
    "matmul": lambda x: x @ jnp.asarray(W, x.dtype),
    "relu": jax.nn.relu,
    "leaky": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "gelu exact": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "abs": jnp.abs,
    "square": jnp.square,
    "power": lambda x: x**3,
    "real power": lambda x: jnp.abs(x) ** 2.0,
    "product": lambda x: x * x[:, ::-1],
    "norm": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "softmax times x": lambda x: jax.nn.softmax(x, -1) * x,
    "sort": lambda x: jnp.sort(x, -1),
    "top": lambda x: lax.top_k(x, 2)[0],
    "max": lambda x: x.max(-1),
    "tile": lambda x: jnp.tile(x, (1, 2)),
    "cumsum": lambda x: jnp.cumsum(x, -1),
    "gather": lambda x: x[:, jnp.array([0, 2])],
    "where": lambda x: jnp.where(x > 0.1, 2 * x, -x),
    "clip": lambda x: jnp.clip(x, -9.0, 9.0),
    "remat": lambda x: jax.checkpoint(lambda y: jnp.tanh(y @ W))(x),
    "jit": jax.jit(lambda x: jnp.sin(x)),
    "cond": lambda x: lax.cond(x.sum() > 0, lambda y: y @ W, jnp.tanh, x),
    "segment": lambda x: jax.ops.segment_sum(x, jnp.array([0, 1, 0]), 2),
}
CONSTANT = {
    "sigmoid": jax.nn.sigmoid,
    "softmax": lambda x: jax.nn.softmax(x, -1),
    "exp": jnp.exp,
    "scan": lambda x: lax.scan(lambda c, y: (c * 0.5 + y, c), x[0], x)[1] + 1,
    "steps": lambda x: jnp.floor(x) + (x > 0),
}


def moved(f, x):
    """`f(x)` from the frozen function, and `G x`."""
    return jax.jvp(dj.freeze(f), (x,), (x,))


@pytest.mark.parametrize("name", HOMOGENEOUS | CONSTANT)
def test_values_are_kept(name):
    with nets.precision("float64"):
        f, x = (HOMOGENEOUS | CONSTANT)[name], jnp.asarray(X)
        assert nets.distance(dj.freeze(f)(x), f(x)) <= 1e-15


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_the_derivative_gives_the_value(name):
    with nets.precision("float64"):
        f, x = HOMOGENEOUS[name], jnp.asarray(X)
        value, linear = moved(f, x)
        assert nets.distance(linear, value) <= 1e-12
        other = jax.jvp(dj.freeze(f), (x,), (x + 1,))[1]  # mutant
        assert nets.violates(nets.distance(other, value), "float64")


@pytest.mark.parametrize("name", CONSTANT)
def test_held_constant(name):
    with nets.precision("float64"):
        value, linear = moved(CONSTANT[name], jnp.asarray(X))
        assert not np.any(linear)
        assert np.any(value)


@pytest.mark.parametrize("name", ["relu", "max", "where", "matmul", "sort", "tile"])
def test_piecewise_linear_functions_keep_their_derivative(name):
    f, x = HOMOGENEOUS[name], jnp.asarray(X, jnp.float32)
    want = jax.jacobian(f)(x)
    assert nets.distance(jax.jacobian(dj.freeze(f))(x), want) <= 1e-6


@pytest.mark.parametrize("x", [jnp.float16(45), jnp.float32(1e13), jnp.float32(0)])
def test_large_values_are_finite(x):
    value, linear = moved(jax.nn.gelu, x)
    assert value == jax.nn.gelu(x)
    assert np.isfinite(linear)


def test_infinity_and_nan_pass():
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
    for f in (jnp.tanh, jax.nn.relu, lambda x: jnp.minimum(x, 0)):
        np.testing.assert_array_equal(dj.freeze(f)(x), f(x))


def test_integers_stay_integers():
    i = jnp.arange(4)
    got = dj.freeze(lambda i: i * i)(i)
    assert got.dtype == i.dtype
    assert got.tolist() == [0, 1, 4, 9]
    x = jnp.array([1.5, 2.5])
    gated = lambda x: x.astype(int).astype(x.dtype) * x
    np.testing.assert_allclose(jax.grad(lambda x: dj.freeze(gated)(x).sum())(x), [1, 2])
    assert dj.freeze(jnp.tanh)(0.5) == jnp.tanh(0.5)
