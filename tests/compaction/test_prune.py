"""Scores of units, what a unit saves, multiples of widths: against sums by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj
from dagjax.compaction.pruning.scores import unit_scores
from tests.compaction.masking import built, units_of
from tests.graph import nets


def draw(*shape):
    return np.random.default_rng(shape[0]).normal(size=shape).astype(np.float32)


PARAMS = {"a": draw(3, 8), "b": draw(8), "c": draw(8, 6), "d": draw(6, 2)}


@pytest.fixture(scope="module")
def net():
    """Two hidden layers, the first with a bias; every weight of a unit is known."""

    def fn(p, x):
        h = jnp.maximum(x @ p["a"] + p["b"], 0)
        return jnp.maximum(h @ p["c"], 0) @ p["d"]

    return dj.trace(fn, jax.tree.map(jnp.asarray, PARAMS), jnp.ones((2, 3)))


def weights(net):
    """`{group: [weights of each unit]}`."""
    a, b, c, d = (PARAMS[name] for name in "abcd")
    first = [np.concatenate([a[:, i], b[i : i + 1], c[i]]) for i in range(8)]
    second = [np.concatenate([c[:, i], d[i]]) for i in range(6)]
    names = [*dj.units(net).channels]
    return dict(zip(names, (first, second), strict=True))


REDUCTIONS = {
    "l1": lambda w: np.abs(w).sum(),
    "l2": lambda w: np.sqrt(np.square(w).sum()),
    "mean": lambda w: np.abs(w).mean(),
    "max": lambda w: np.abs(w).max(),
}


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_scores_are_those_of_a_units_weights(net, reduce):
    found = unit_scores(net, reduce, normalize="none")
    tree = unit_scores(net, jax.tree.map(np.abs, PARAMS), None, reduce, "none")
    for name, rows in weights(net).items():
        want = [REDUCTIONS[reduce](w) for w in rows]
        assert np.allclose(found[name], want, rtol=1e-5)
        assert np.allclose(tree[name], want, rtol=1e-5)


def test_groups_are_made_comparable(net):
    raw = unit_scores(net, "l2", normalize="none")
    mean = unit_scores(net, "l2", normalize="mean")
    lamp = unit_scores(net, "l2", normalize="lamp")
    for name, x in raw.items():
        assert np.allclose(mean[name], x / x.mean())
        by_hand = [x[i] ** 2 / sum(y**2 for y in x if y >= x[i]) for i in range(len(x))]
        assert np.allclose(lamp[name], by_hand)
        assert np.isclose(lamp[name].max(), 1)


def test_the_lowest_scores_go(net):
    """All units compete, or those of each group."""
    scores = unit_scores(net, "l2", normalize="none")
    values = np.sort(np.concatenate([*scores.values()]))[::-1]
    mask = dj.prune_units(net, "l2", density=0.5, normalize="none")
    for name, axis in zip(scores, ("a", "d"), strict=True):
        kept = np.asarray(mask[axis]).any(0 if axis == "a" else 1)
        assert (kept == (scores[name] >= values[6])).all()
    each = dj.prune_units(net, scores, density=0.5, scope="group")
    assert (int(each["b"].sum()), int(each["d"].any(1).sum())) == (4, 3)
    upside = dj.prune_units(net, {k: -v for k, v in scores.items()}, density=0.5)
    assert not (upside["b"] & mask["b"]).all()  # a mutant: scores that are not read


def test_groups_keep_multiples_of_their_own(net):
    first, second = dj.units(net).channels
    widths = lambda m: (int(m["b"].sum()), int(m["d"].any(1).sum()))
    half = {"density": 0.5, "scope": "group"}
    assert widths(dj.prune_units(net, **half, round_to=4)) == (4, 4)
    assert widths(dj.prune_units(net, **half, round_to={second: 5})) == (4, 5)
    assert widths(dj.prune_units(net, **half, round_to={first: 8, second: 2})) == (8, 4)
    with pytest.raises(KeyError, match="no group 'other'"):
        dj.prune_units(net, **half, round_to={"other": 2})
    for wrong in (0, 1.5, True, {first: 0}):
        with pytest.raises(dj.CompactionError, match="round_to"):
            dj.prune_units(net, **half, round_to=wrong)


@pytest.mark.parametrize("name", ["residual", "mobile", "grouped_queries"])
def test_a_unit_saves_what_its_removal_saves(name):
    """Parameters to the entry; operations as the small network counts them."""
    dag, found = built(name).dag, units_of(name)
    for group in found.channels.values():
        kept = np.arange(group.size) > 0
        if not kept.any():
            continue
        small = dj.compact(dag, found.mask({group.name: kept}), verify=False).net
        size = lambda tree: sum(map(np.size, jax.tree.leaves(tree)))
        assert size(dag.params) - size(small.params) == group.params[0]
        flops, left = found.total[0], dj.units(small).total[0]
        assert flops - left == group.flops[0]


def test_arcs_go_by_their_own_scores():
    branches = [dj.series(nn.Dense(6), nn.tanh, nn.Dense(6)) for _ in range(2)]
    graph = dj.series(nn.Dense(6), dj.parallel(dj.identity, *branches), nn.Dense(2))
    dag = nets.build(graph, ((5,),)).dag
    one, two = dj.units(dag)["arcs"].classes
    for gone, stays in ((one, two), (two, one)):
        mask = dj.prune_units(dag, {gone: 0.0, stays: 1.0}, density=0.5)
        assert not any(m.any() for m in jax.tree.leaves(mask[gone]))
        assert all(m.all() for m in jax.tree.leaves(mask[stays]))
        small = dj.compact(dag, mask).net
        assert small.params[gone]["kernel"].size == 0
        assert small.params[stays]["kernel"].size == 36
