"""Costs against sums by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dagjax as dj


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def flops(fn, params, x, batch=None):
    net = dj.trace(fn, params, x)
    return dj.cost(net, batch=batch, latency=False)[""].flops


def test_another_batch_size_is_traced():
    """A product of parameters costs the same for any; pairs grow with its square."""
    p = {"a": draw(16, 4), "b": draw(4, 16)}
    merged = lambda p, x: x @ (p["a"] @ p["b"])
    pairs = lambda p, x: ((x @ p["a"]) @ (x @ p["b"].T).T,)
    for batch in (2, 64):
        products = 2 * (16 * 4 * 16 + batch * 16 * 16)
        assert flops(merged, p, draw(2, 16), batch) == products
        products = 2 * (2 * batch * 16 * 4 + batch * 4 * batch)
        assert flops(pairs, p, draw(2, 16), batch) == products


def test_branches_loops_and_ragged_products():
    params, x = {"w": draw(8, 8)}, draw(2, 8)
    one = 2 * 2 * 8 * 8

    def branches(p, x):
        twice = lambda x: (x @ p["w"]) @ p["w"]
        return lax.cond(x.sum() > 0, lambda x: x @ p["w"], twice, x)

    loop = lambda p, x: lax.fori_loop(0, 10, lambda i, x: x @ p["w"], x)
    scan = lambda p, x: lax.scan(lambda x, _: (x @ p["w"], None), x, length=7)[0]
    ragged = lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 4], jnp.int32))

    def unknown(p, x):
        step = lambda c: (c[0] + 1, c[1] @ p["w"])
        return lax.while_loop(lambda c: c[1].sum() < 9, step, (0, x))[1]

    def idle(p, x):
        step = lambda c: (c[0] + 1, jnp.tanh(c[1]))
        return lax.while_loop(lambda c: c[1].sum() < 9, step, (0, x @ p["w"]))[1]

    assert flops(branches, params, x) == 2 * one  # the larger branch
    assert flops(loop, params, x) == 10 * one
    assert flops(scan, params, x) == 7 * one
    assert flops(ragged, {"w": draw(2, 8, 5)}, draw(6, 8)) == 2 * 6 * 8 * 5
    assert np.isnan(flops(unknown, params, x))
    assert flops(idle, params, x) == one


def test_a_key_among_the_parameters():
    """It is passed along; a file of arrays cannot hold it."""
    params = {"w": draw(5, 8), "o": draw(8, 3), "key": jax.random.key(3)}

    def fn(p, x):
        h = jnp.tanh(x @ p["w"])
        return h @ p["o"] + jax.random.normal(p["key"], (3,))

    net, x = dj.trace(fn, params, draw(2, 5)), draw(2, 5)
    assert flops(fn, params, x) == 2 * 2 * (5 * 8 + 8 * 3)
    mask = dj.prune_units(net, "l2", density=0.5)
    assert int(mask["w"].any(0).sum()) == 4
    small = dj.compact(net, mask).net
    masked = {k: dj.masks.apply(mask[k], params[k]) for k in ("w", "o")}
    want = fn({**masked, "key": params["key"]}, x)
    np.testing.assert_allclose(small(x), want, rtol=1e-5)
    with pytest.raises(dj.CompactionError, match="key holds keys"):
        dj.save(net, "never")
