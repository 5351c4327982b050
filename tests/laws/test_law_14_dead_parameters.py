"""Law 14: what a mask has made dead may hold anything.

Dead parameters overwritten with random values leave the outputs bitwise as they were
and have gradients that are exactly zero. A live one overwritten does not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj
from tests.compaction import masking
from tests.graph import nets, twins
from tests.laws.test_laws_on_the_zoo import GRAPHS
from tests.sweeps import seldom

run = jax.jit(lambda dag, xs: dag(*xs))
slope = jax.jit(jax.grad(lambda p, dag, xs: masking.loss(dag.replace(params=p)(*xs))))


def zoo(name):
    case = nets.zoo(name)
    return case.dag, case.xs


def twin(name):
    dag, x = twins.filled(GRAPHS[name])
    return dag, (x,)


def traced(name):
    net = masking.built(name)
    return net.dag, net.xs


NETS = {
    "lenet5": zoo,
    "resnet8": zoo,
    "inception": zoo,
    "dense_block": zoo,
    "gpt": twin,
    "mobile": traced,
    "group_norm": traced,
    "rotary": traced,
    "lstm": traced,
}


def writers_off(dag, seed=0):
    """Some units, by what writes them alone: columns, biases, scales, shifts."""
    units, rng = dj.units(dag), np.random.default_rng(seed)
    kept = {k: rng.random(g.size) < 0.6 for k, g in units.channels.items()}
    columns = lambda m: m.any(tuple(range(m.ndim - 1)), keepdims=True)
    wide = lambda m: np.broadcast_to(columns(m), m.shape).copy()
    return jax.tree.map(lambda m: wide(np.asarray(m)), units.mask(kept))


def overwritten(where, params, seed=1):
    rng = np.random.default_rng(seed)
    noise = lambda x: np.asarray(rng.normal(size=x.shape) * 3, x.dtype)
    return jax.tree.map(
        lambda m, x: masking.chosen(m, noise(x), x), where, params
    )  # fmt: skip


@pytest.mark.parametrize("name", seldom(NETS, ["inception", "group_norm", "gpt"]))
def test_dead_parameters_do_nothing(name):
    dag, xs = NETS[name](name)
    mask = writers_off(dag)
    live = jax.tree.map(np.asarray, dj.trim(dag, mask))
    dead = jax.tree.map(lambda m, on: m & ~on, mask, live)
    assert sum(m.sum() for m in jax.tree.leaves(dead)) > 0
    masked = dag.replace(params=masking.applied(mask, dag.params))
    want = run(masked, xs)
    other = masked.replace(params=overwritten(dead, masked.params))
    for y, z in zip(*map(jax.tree.leaves, (want, run(other, xs))), strict=True):
        assert np.array_equal(y, z)
    grads = slope(masked.params, masked, xs)
    pairs = zip(jax.tree.leaves(dead), jax.tree.leaves(grads), strict=True)
    assert not any(np.asarray(g)[m].any() for m, g in pairs)
    mutant = masked.replace(params=overwritten(one_of(live), masked.params))
    assert nets.violates(nets.distance(run(mutant, xs), want), "float32")


def one_of(live):
    """The live entries of the last kernel that has any."""
    leaves, tree = jax.tree.flatten(live)
    last = max(i for i, m in enumerate(leaves) if m.ndim > 1 and m.any())
    return tree.unflatten([m & (i == last) for i, m in enumerate(leaves)])


@pytest.mark.parametrize("name", ["resnet8", "rotary"])
def test_nothing_of_the_removed_is_read(name):
    """NaN in all that is removed does not reach the small network."""
    dag, xs = NETS[name](name)
    cut = dj.compact(dag, writers_off(dag), verify=False)
    left = masking.left_of(cut)
    full = jax.tree.map(lambda m, x: masking.chosen(m, x, np.nan * x), left, dag.params)
    small = cut.net.replace(params=cut.index.gather(full))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(small.params))
    assert all(jnp.isfinite(y).all() for y in jax.tree.leaves(run(small, xs)))
