"""Law 20: a refit never makes a node worse, and is exact where nothing was lost.

Node by node, given the pruned prefix, the kept weights are the least-squares solution;
a channel or an arc that another one duplicates can be dropped without a trace.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj
from dagjax.compaction.pruning.lift import lift_prune, refit_kept
from tests.graph import nets

EXACT = 1e-8


@pytest.fixture(scope="module", autouse=True)
def double():
    with nets.precision("float64"):
        yield


def normed(width):
    return dj.block(nn.relu, nn.Dense(width), nn.BatchNorm())


NETS = {
    "mlp": (lambda: dj.zoo.mlp((9, 7, 3), input_shape=(5,)), (5,)),
    "lenet5": (lambda: dj.zoo.lenet5(3, input_shape=(8, 8, 1)), (8, 8, 1)),
    "residual": (
        lambda: dj.series(
            nn.Dense(6), dj.residual(dj.series(normed(8), normed(6))), nn.Dense(3)
        ),
        (5,),
    ),
}


def network(name, batch=60):
    make, shape = NETS[name]
    case = nets.build(make(), (shape,), "float64")
    x = np.random.default_rng(5).normal(size=(batch, *shape))
    return case.dag, jnp.asarray(x)


def relative(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("name", NETS)
def test_no_node_gets_worse(name):
    dag, x = network(name)
    found = lift_prune(dag, x, {"density": 0.6}, ridge=1e-6)
    fits = found.report.fits
    assert len(fits) > 2
    assert all(0 <= fit.after <= fit.before < np.inf for fit in fits)
    assert sum(fit.after < 0.9 * fit.before for fit in fits) >= 2
    plain = lift_prune(dag, x, {"density": 0.6}, refit=False)
    assert relative(plain.net(x), dag(x)) > 1.2 * relative(found.net(x), dag(x))
    worst = relative(found.net(x), dag(x))
    assert worst == pytest.approx(fits[-1].after, rel=1e-9)


def test_every_node_of_a_chain_is_what_the_report_says():
    dag, x = network("mlp")
    found = lift_prune(dag, x, {"density": 0.6})
    values = lambda net: dj.compose(dj.factors(net))(dj.inject(net, x))
    dense, pruned = values(dag), values(found.net)
    for arc, fit in zip(dag.graph.arcs, found.report.fits, strict=True):
        kept = np.asarray(found.mask[arc.name]["Dense"]["bias"])
        one, two = (np.asarray(v[arc.target])[:, kept] for v in (pruned, dense))
        assert relative(one, two) == pytest.approx(fit.after, abs=1e-12)


def test_solution_is_that_of_ridge_regression():
    """Of the first refitted layer, in numpy."""
    dag, x = network("mlp")
    found, ridge = lift_prune(dag, x, {"density": 0.6}, ridge=0.1), 0.1
    p = jax.tree.map(np.asarray, dag.params)
    keep = np.asarray(found.mask["fc1"]["Dense"]["bias"])
    out = np.asarray(found.mask["fc2"]["Dense"]["bias"])
    own, kernel = p["fc1"]["Dense"], p["fc2"]["Dense"]["kernel"]
    h = np.maximum(np.asarray(x) @ own["kernel"] + own["bias"], 0)
    lost = h[:, ~keep] @ kernel[~keep][:, out]
    left = np.concatenate([h[:, keep], np.ones((len(h), 1))], 1)
    gram = left.T @ left
    weights = np.append(np.ones(keep.sum()), 0) * ridge * np.diag(gram).mean()
    more = np.linalg.solve(gram + np.diag(weights), left.T @ lost)
    got = np.asarray(found.net.params["fc2"]["Dense"]["kernel"])[keep][:, out]
    assert nets.distance(got, kernel[keep][:, out] + more[:-1]) <= 1e-9
    assert nets.distance(got, kernel[keep][:, out]) > 1e-2  # it has moved


def twice(params, layer, axis=-1):
    """Unit 1 of a layer becomes a copy of unit 0."""
    copy = lambda w: w.at[..., 1].set(w[..., 0]) if w.ndim else w
    return {**params, layer: jax.tree.map(copy, params[layer])}


def without(dag, layer, unit):
    """The mask that drops one unit of the group that a layer writes."""
    found = dj.units(dag)
    (name,) = [n for n in found.channels if n.startswith(layer)]
    return found.mask({name: np.arange(found[name].size) != unit})


@pytest.mark.parametrize(
    ("name", "layer"), [("mlp", "fc1"), ("lenet5", "conv1"), ("lenet5", "conv2")]
)
def test_dropped_duplicate_leaves_no_trace(name, layer):
    dag, x = network(name)
    dag = dag.replace(params=twice(dag.params, layer))
    found = refit_kept(dag, without(dag, layer, 1), x, ridge=1e-12)
    assert relative(found.net(x), dag(x)) <= EXACT
    assert all(fit.after <= EXACT for fit in found.report.fits)
    assert max(fit.before for fit in found.report.fits) > 1e-3
    other = jax.random.normal(jax.random.key(7), x.shape, x.dtype)
    assert relative(found.net(other), dag(other)) <= EXACT
    # Mutants: no refit; a unit that nothing duplicates.
    plain = refit_kept(dag, without(dag, layer, 1), x, ridge=None)
    assert 1e-3 < relative(plain.net(x), dag(x)) < np.inf
    alone = refit_kept(dag, without(dag, layer, 2), x, ridge=1e-12)
    assert 1e-4 < relative(alone.net(other), dag(other)) < np.inf


def test_dropped_duplicate_of_an_arc_leaves_no_trace():
    """Two arcs into one node: what stays takes over, whichever of them goes."""
    arcs = [
        dj.Arc("a", "x", "h", dj.block(nn.Dense(6), nn.BatchNorm())),
        dj.Arc("b", "x", "h", nn.Dense(6)),
        dj.Arc("skip", "x", "h", lambda x: x[:, :1] * jnp.ones((1, 6))),
        dj.Arc("out", "h", "y", dj.block(nn.relu, nn.Dense(3))),
    ]
    dag = nets.build(dj.Graph(arcs, "x", "y"), ((5,),), "float64").dag
    x = jax.random.normal(jax.random.key(0), (60, 5), jnp.float64)
    full = jax.tree.map(lambda w: np.ones(w.shape, bool), dag.params)
    for gone in ("a", "b"):
        none = jax.tree.map(np.zeros_like, full[gone])
        found = refit_kept(dag, {**full, gone: none}, x, ridge=1e-12)
        assert relative(found.net(x), dag(x)) <= EXACT
        assert found.report.fits[0].before > 0.1
        plain = refit_kept(dag, {**full, gone: none}, x, ridge=None)
        assert relative(plain.net(x), dag(x)) > 0.01  # mutant


def test_nothing_pruned_nothing_changed():
    dag, x = network("residual")
    found = lift_prune(dag, x, {"density": 1.0})
    assert nets.same(found.net.params, dag.params)
    assert nets.same(found.net.state, dag.state)
    assert all(fit.before == fit.after == 0 for fit in found.report.fits)
