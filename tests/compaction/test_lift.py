"""Pruning with a refit: budgets, networks and products of all kinds, what stays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dagjax as dj
from dagjax.compaction.pruning import features
from dagjax.compaction.pruning import least_squares as refit
from dagjax.compaction.pruning.lift import energy, lift_prune, refit_kept
from tests.graph import nets

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def mlp():
    return nets.build(dj.zoo.mlp((9, 7, 3), input_shape=(5,)), ((5,),)).dag


X = draw(80, 5)


@pytest.mark.parametrize("budget", [0.5, {"params": 0.5}, {"density": 0.5}])
def test_budgets_and_masks(budget):
    dag = mlp()
    found = lift_prune(dag, X, budget)
    flat = zip(*map(jax.tree.leaves, (found.mask, found.net.params)), strict=True)
    assert all(not np.asarray(w)[~np.asarray(m)].any() for m, w in flat)
    assert jax.tree.structure(found.mask) == jax.tree.structure(dag.params)
    small = dj.compact(found.net, found.mask).net
    assert nets.distance(small(X), found.net(X)) <= 1e-5
    named = {"flops": budget} if isinstance(budget, float) else budget
    want = dj.prune_units(dag, "l2", **named)
    assert nets.same(found.mask, jax.tree.map(jnp.asarray, want))
    assert "fc3/Dense" in str(found.report)


def test_errors():
    dag = mlp()
    with pytest.raises(dj.CompactionError, match="no budget 'size'"):
        lift_prune(dag, X, {"size": 0.5})
    with pytest.raises(dj.CompactionError, match=r"in \(0, 1\]"):
        lift_prune(dag, X, 1.5)
    with pytest.raises(dj.CompactionError, match="positive"):
        lift_prune(dag, X, 0.5, ridge=0.0)


def test_without_refit_only_masks():
    dag = mlp()
    found = lift_prune(dag, X, 0.5, refit=False)
    want = dj.masks.apply(found.mask, dag.params)
    assert nets.same(found.net.params, want)
    assert all(fit.before == fit.after for fit in found.report.fits)


def test_several_inputs_and_outputs():
    case = nets.zoo("two_streams")
    xs = draw(60, 3), draw(60, 4)
    found = lift_prune(case.dag, xs, {"density": 0.7})
    plain = lift_prune(case.dag, xs, {"density": 0.7}, refit=False)
    want = case.dag(*xs)
    far = [nets.distance(net(*xs), want) for net in (found.net, plain.net)]
    assert far[0] < far[1]


def test_traced_networks():
    """Products written in other ways: kernels on the left, transposed, reshaped."""

    def fn(params, x):
        h = jnp.tanh((params["up"] @ x.T).T + params["b"])
        h = jnp.tanh(jnp.einsum("bk,khd->bhd", h, params["heads"])) * 0.5
        y = jnp.einsum("bhd,ohd->bo", h, params["out"]) + x @ params["skip"].T
        return y - params["shift"]

    params = {
        "up": draw(9, 5), "b": draw(9), "heads": draw(9, 3, 4) / 3,
        "out": draw(2, 3, 4), "skip": draw(2, 5), "shift": draw(2),
    }  # fmt: skip
    dag = dj.trace(fn, params, X[:1])
    mask = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    mask["up"][3:5] = mask["b"][3:5] = mask["heads"][3:5] = False
    found = refit_kept(dag, mask, X)
    assert [fit.name for fit in found.report.fits] == ["up", "heads", "out+skip"]
    assert all(f.after < 0.9 * f.before for f in found.report.fits[1:])
    assert nets.distance(found.net.params["skip"], params["skip"]) > 1e-3
    before = nets.distance(fn(dj.masks.apply(mask, params), X), fn(params, X))
    assert nets.distance(fn(found.net.params, X), fn(params, X)) < before / 2


def test_single_weights():
    dag = mlp()
    mask = jax.tree.map(lambda w: np.abs(w) > 0.3 * np.abs(w).max(), dag.params)
    found = refit_kept(dag, mask, X)
    flat = zip(*map(jax.tree.leaves, (mask, found.net.params)), strict=True)
    assert all(not np.asarray(w)[~m].any() for m, w in flat)
    assert all(f.after < f.before for f in found.report.fits)
    assert all(f.before > 0.01 for f in found.report.fits)


def test_tied_parameters_stay():
    def fn(params, x):
        return jnp.tanh(jnp.tanh(x @ params["w"]) @ params["w"]) @ params["out"]

    params = {"w": draw(5, 5), "out": draw(5, 2)}
    dag = dj.trace(fn, params, X[:1])
    mask = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    mask["w"][0] = False
    found = refit_kept(dag, mask, X)
    assert nets.same(found.net.params["w"], dj.masks.apply(mask, params)["w"])
    assert [fit.name for fit in found.report.fits] == ["out"]


def test_inside_calls_with_rules_of_their_own():
    def fn(params, x):
        block = jax.checkpoint(lambda w, x: nn.relu(x @ w))
        return block(params["one"], x) @ params["two"]

    params = {"one": draw(5, 8), "two": draw(8, 2)}
    dag = dj.trace(fn, params, X[:1])
    found = lift_prune(dag, X, {"density": 0.5})
    assert [fit.name for fit in found.report.fits] == ["one", "two"]
    assert found.report.fits[1].after < found.report.fits[1].before


CONVS = {
    "same": ({"padding": "SAME"}, (3, 3, 4, 6)),
    "strides": ({"window_strides": (2, 1), "padding": "VALID"}, (3, 2, 4, 6)),
    "dilated": ({"rhs_dilation": (2, 1), "padding": [(1, 2), (0, 0)]}, (2, 3, 4, 6)),
    "transposed": ({"lhs_dilation": (2, 2), "padding": [(1, 1), (2, 0)]}, (3, 3, 4, 6)),
    "cut": ({"padding": [(-1, 0), (0, 2)]}, (3, 3, 4, 6)),
    "groups": ({"feature_group_count": 2, "padding": "SAME"}, (3, 3, 2, 6)),
    "depthwise": ({"feature_group_count": 4, "padding": "SAME"}, (3, 3, 1, 8)),
    "first": ({"padding": "SAME", "dimension_numbers": ("NCHW", "OIHW", "NCHW")},
              (6, 4, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVS)
def test_convolutions_are_linear_in_their_features(name):
    """Features times the kernel are the convolution, whatever its window."""
    options, shape = CONVS[name]
    options = {
        "window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    } | options  # fmt: skip
    size = (3, 4, 7, 6) if name == "first" else (3, 7, 6, 4)
    x, kernel = draw(*size), draw(*shape)
    conv = lambda x, w: lax.conv_general_dilated(x, w, **options)
    (eqn,) = jax.make_jaxpr(conv)(x, kernel).jaxpr.eqns
    made = features.features(eqn, 1, np.asarray(x))
    moved = features.as_kernel(eqn, 1, np.asarray(kernel))
    got = np.einsum("rgk,gkm->rgm", made, moved)
    rows, columns = features.layout(eqn, 1)
    want = np.asarray(conv(x, kernel)).transpose(rows + columns)
    assert nets.distance(got.reshape(want.shape), want) <= 1e-5


def test_depthwise_kernels_are_refitted():
    def fn(params, x):
        grouped = {"feature_group_count": 4, "padding": "SAME"}
        numbers = ("NHWC", "HWIO", "NHWC")
        conv = lambda x, w, **options: lax.conv_general_dilated(
            x, w, (1, 1), dimension_numbers=numbers, **options
        )
        h = jnp.tanh(conv(x, params["one"], padding="SAME"))
        return jnp.tanh(conv(h, params["deep"], **grouped)).mean((1, 2))

    params = {"one": draw(3, 3, 2, 4), "deep": draw(3, 3, 1, 8)}
    x = draw(20, 6, 6, 2)
    dag = dj.trace(fn, params, x[:1])
    mask = {"one": np.ones((3, 3, 2, 4), bool), "deep": np.ones((3, 3, 1, 8), bool)}
    mask["deep"][1, 1] = False  # the middle of each window
    found = refit_kept(dag, mask, x)
    first, deep = found.report.fits
    assert first.before == 0
    assert 0 < deep.after < 0.95 * deep.before
    assert not np.asarray(found.net.params["deep"])[1, 1].any()


@pytest.mark.parametrize("device", [False, True])
def test_chunks_change_nothing(monkeypatch, device):
    """Nor whether features are made by numpy or, as on an accelerator, by jax."""
    case = nets.zoo("lenet5")
    x = draw(40, 8, 8, 1)
    whole = lift_prune(case.dag, x, {"density": 0.6}, ridge=0.1)
    if device:
        for module in (features, refit):
            monkeypatch.setattr(module, "local", lambda x: x)
    else:
        monkeypatch.setattr(refit, "CHUNK", 5_000)
    parts = lift_prune(case.dag, x, {"density": 0.6}, ridge=0.1)
    assert nets.distance(parts.net.params, whole.net.params) <= 1e-3
    errors = [[f.after for f in found.report.fits] for found in (whole, parts)]
    assert np.allclose(*errors, rtol=1e-3)


def test_some_rows_are_enough(monkeypatch):
    """Of very many pixels every n-th is taken; errors are of all of them."""
    graph = dj.series(nn.Conv(6, (3, 3)), jnp.tanh, nn.Conv(3, (3, 3)))
    dag = nets.build(graph, ((16, 16, 2),)).dag
    x = draw(40, 16, 16, 2)
    whole = lift_prune(dag, x, {"density": 0.5})
    monkeypatch.setattr(refit, "ROWS", 1)
    some = lift_prune(dag, x, {"density": 0.5})
    assert not nets.same(some.net.params, whole.net.params)
    all_, few = whole.report.fits[-1], some.report.fits[-1]
    assert all_.after < 0.95 * all_.before
    assert all_.after <= few.after <= 1.05 * all_.after


def test_energy_of_units():
    """In numpy: root mean square of the activation times the norm of its readers."""
    dag = mlp()
    p = jax.tree.map(np.asarray, dag.params)
    h = np.asarray(X)
    found = energy(dag, X)
    for one, two in (("fc1", "fc2"), ("fc2", "fc3")):
        h = np.maximum(h @ p[one]["Dense"]["kernel"] + p[one]["Dense"]["bias"], 0)
        want = np.sqrt((h**2).mean(0) * (p[two]["Dense"]["kernel"] ** 2).sum(1))
        (name,) = [n for n in found if n.startswith(one)]
        assert np.allclose(found[name], want / want.mean(), rtol=1e-4)
    by_name = lift_prune(dag, X, 0.5, "energy").mask
    assert nets.same(by_name, lift_prune(dag, X, 0.5, found).mask)


@pytest.mark.parametrize("score", ["l2", "energy"])
def test_planted_units_are_found(score):
    """Units without weights in and out go first, and nothing changes."""
    dag = mlp()
    dead = {"fc1": [1, 4, 7], "fc2": [0, 3]}
    params = jax.tree.map(np.array, dag.params)
    for (layer, units), after in zip(dead.items(), ("fc2", "fc3"), strict=True):
        params[layer]["Dense"]["kernel"][:, units] = 0
        params[layer]["Dense"]["bias"][units] = 0
        params[after]["Dense"]["kernel"][units] = 0
    dag = dag.replace(params=jax.tree.map(jnp.asarray, params))
    found = lift_prune(dag, X, {"density": 11 / 16}, score)
    for layer, units in dead.items():
        gone = np.flatnonzero(~np.asarray(found.mask[layer]["Dense"]["bias"]))
        assert gone.tolist() == units
    assert nets.same(found.net(X), dag(X))
