"""Matrices held as their entries: the values and gradients of the masked network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj
from dagjax.compaction.export import sparsify as module

ZEROS = 0.97


@pytest.fixture(scope="module")
def case():
    """Two wide layers and a narrow one, most entries of all three masked."""
    graph = dj.series(nn.Dense(260), nn.relu, nn.Dense(270), jnp.tanh, nn.Dense(3))
    dag = dj.init(jax.random.key(0), graph, jnp.ones((2, 280)))
    draw = np.random.default_rng(0)
    keep = lambda w: jnp.asarray(draw.uniform(size=w.shape) >= ZEROS * (w.ndim > 1))
    mask = jax.tree.map(keep, dag.params)
    return dag, mask, dag.replace(params=dj.masks.apply(mask, dag.params))


def inputs(batch):
    return jnp.asarray(np.random.default_rng(1).normal(size=(batch, 280)), jnp.float32)


def test_what_pays_is_sparse_and_the_rest_says_why(case):
    dag, mask, _ = case
    found = {c.path: c for c in dj.sparsify(dag, mask).choices}
    assert [c.sparse for c in found.values()] == [True, True, False]
    assert "smaller than" in found["Dense_2/kernel"].why
    few = jax.tree.map(lambda m: jnp.ones_like(m), mask)
    assert not any(c.sparse for c in dj.sparsify(dag, few).choices)
    assert all(c.sparse for c in dj.sparsify(dag, mask, force=True).choices)


def test_nothing_is_assumed_of_other_backends(case, monkeypatch):
    dag, mask, _ = case
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    choices = dj.sparsify(dag, mask).choices
    assert {c.why for c in choices} == {"nothing was measured on gpu"}


@pytest.mark.parametrize("batch", [1, 3, 8, 20])
def test_values_are_those_of_the_masked_network(case, batch):
    """Few examples are padded; the padding is cut off again."""
    dag, mask, full = case
    x, net = inputs(batch), dj.sparsify(dag, mask, force=True)
    want = full(x)
    assert jnp.abs(want - full(0 * x)).max() > 1e-3
    for got in (net(x), jax.jit(lambda net, x: net(x))(net, x)):
        assert got.shape == want.shape
        assert jnp.allclose(got, want, atol=1e-5)


def test_gradients_are_those_of_the_entries(case):
    dag, mask, full = case
    x, net = inputs(5), dj.sparsify(dag, mask, force=True)
    loss = lambda net: jnp.sum(jnp.sin(net(x)))
    got = jax.grad(lambda p: loss(net.replace(params=p)))(net.params)
    want = jax.grad(lambda p: loss(full.replace(params=p)))(full.params)
    for name in ("Dense", "Dense_1", "Dense_2"):
        kept = np.asarray(mask[name]["kernel"]).T
        entries = np.asarray(want[name]["kernel"]).T[kept]
        assert np.allclose(got[name]["kernel"], entries, atol=1e-4)
        assert np.allclose(got[name]["bias"], want[name]["bias"], atol=1e-4)


def test_a_product_with_other_entries_differs(case, monkeypatch):
    """A mutant: entries in the order of the matrix, not of its transpose."""
    dag, mask, full = case

    def wrong(x, kept):
        return jnp.asarray(np.asarray(x)[kept]), right(x, kept)[1]

    right = module._entries
    monkeypatch.setattr(module, "_entries", wrong)
    net = dj.sparsify(dag, mask, force=True)
    assert not jnp.allclose(net(inputs(3)), full(inputs(3)), atol=1e-2)


def test_a_compacted_network_is_made_sparse(case):
    """After the cut: what is left of the mask goes with the smaller arrays."""
    dag, mask, _ = case
    units = dj.prune_units(dag, "l2", density=0.97)
    both = jax.tree.map(jnp.logical_and, mask, units)
    small = dj.compact(dag, both)
    net = dj.sparsify(small.net, small.index.gather(both), force=True)
    x = inputs(4)
    want = dag.replace(params=dj.masks.apply(both, dag.params))(x)
    assert net.choices[0].zeros > ZEROS - 0.02
    assert jnp.allclose(net(x), want, atol=1e-5)
