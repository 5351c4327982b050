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


# --- scores ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layers():
    graph = dj.series(nn.Dense(20), nn.relu, nn.Dense(20), nn.relu, nn.Dense(3))
    return dj.init(jax.random.key(0), graph, jnp.ones((4, 5)))


def stays(mask, layer="Dense"):
    return np.flatnonzero(mask[layer]["bias"]).tolist()


@pytest.mark.parametrize("normalize", ["none", "mean", "lamp"])
def test_an_infinite_score_protects_its_unit(layers, normalize):
    scores = jax.tree.map(lambda w: np.ones(w.shape), layers.params)
    scores["Dense"]["bias"][7] = np.inf
    for density in (0.5, 0.1):
        mask = dj.prune_units(layers, scores, density=density, normalize=normalize)
        assert 7 in stays(mask)
    ends = {"Dense": np.where(np.arange(20) < 15, np.inf, -np.inf)}
    assert stays(dj.prune_units(layers, ends, density=0.75)) == [*range(15)]
    with pytest.raises(dj.CompactionError, match=r"at most 0\.250 of it"):
        dj.prune_units(layers, ends, density=0.5)


def test_scores_that_are_nan_are_refused(layers):
    with pytest.raises(dj.CompactionError, match="20 units of group 'Dense' are NaN"):
        dj.prune_units(layers, {"Dense": np.full(20, np.nan)}, density=0.5)
    for wrong in (["a"] * 20, [None] * 20, np.ones(20) * 1j):
        with pytest.raises(dj.CompactionError, match="scores are real numbers"):
            dj.prune_units(layers, {"Dense": wrong}, density=0.5)


def test_scores_of_arcs_are_checked():
    block = lambda name: dj.residual(dj.block(nn.relu, nn.Dense(5), name=name))
    graph = dj.series(nn.Dense(5), block("b1"), block("b2"), nn.Dense(3))
    dag = dj.init(jax.random.key(0), graph, jnp.ones((4, 5)))
    with pytest.raises(dj.CompactionError, match="group 'arcs' are NaN"):
        dj.prune_units(dag, {"b1": float("nan"), "b2": 0.0}, density=0.5)
    with pytest.raises(dj.CompactionError, match=r"no arc 'bl2'; .* b1, b2"):
        dj.prune_units(dag, {"b1": 1.0, "bl2": 0.0}, density=0.5)


@pytest.mark.parametrize("size", [1e-300, 1e-24, 1e30, 1e300])
def test_tiny_and_huge_scores_are_squared_without_loss(layers, size):
    scores = jax.tree.map(lambda w: np.full(w.shape, size), layers.params)
    scores["Dense"]["kernel"][:, 10:] *= 3
    mask = dj.prune_units(layers, scores, density=0.5, only="Dense")
    assert stays(mask) == [*range(10, 20)]


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.float64, bool])
def test_scores_are_compared_exactly(layers, dtype):
    """2^60 + 1 is more than 2^60, though float64 does not tell them apart."""
    base = {np.float64: 2**52, bool: 0}.get(dtype, 2**60)
    scores = {"Dense": np.full(20, base, dtype), "Dense_1": np.full(20, base, dtype)}
    scores["Dense"][5] += True
    scores["Dense_1"][13] += True
    mask = dj.prune_units(layers, scores, density=0.05)
    assert (stays(mask), stays(mask, "Dense_1")) == ([5], [13])


def test_a_density_is_searched_for_with_multiples_and_a_least_number(layers):
    odd, even = np.arange(20) * 2.0 + 1, np.arange(20) * 2.0
    scores = {"Dense": odd, "Dense_1": even}
    mask = dj.prune_units(layers, scores, density=0.6, round_to=8)
    assert len(stays(mask)) + len(stays(mask, "Dense_1")) == 24
    scores = {"Dense": np.arange(20) + 100.0, "Dense_1": np.arange(20) * 1.0}
    mask = dj.prune_units(layers, scores, density=0.5, keep_at_least=10)
    assert len(stays(mask)) == len(stays(mask, "Dense_1")) == 10


def test_parameters_named_like_groups_are_parameters():
    """`{"Dense": {...}}` like the parameters are scores of weights."""
    p = {"Dense": {"kernel": draw(4, 8), "bias": draw(8)}, "out": (draw(8, 3),)}

    def fn(p, x):
        h = jax.nn.relu(x @ p["Dense"]["kernel"] + p["Dense"]["bias"])
        return h @ p["out"][0]

    net = dj.trace(fn, p, jnp.ones((2, 4)))
    want = np.sqrt(sum(
        np.square(w).sum(axis) for w, axis in
        ((p["Dense"]["kernel"], 0), (p["Dense"]["bias"], ()), (p["out"][0], 1))
    ))  # fmt: skip
    mask = dj.prune_units(net, p, density=0.5)
    assert stays(mask) == sorted(np.argsort(want)[4:].tolist())
    mask = dj.prune_units(net, {"Dense": [*range(8)]}, density=0.5)
    assert stays(mask) == [4, 5, 6, 7]
    with pytest.raises(dj.CompactionError, match="a tree like"):
        dj.prune_units(net, {"Dense": {"kernel": 1}}, density=0.5)
