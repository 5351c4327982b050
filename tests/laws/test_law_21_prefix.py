"""Law 21: the pruned prefix is evaluated once, and that changes nothing.

Refitting level by level with the values of the prefix at hand gives what is found when
the network is evaluated anew for every level; the steps that are evaluated grow like
the number of levels, not like its square.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj
from dagjax.compaction.pruning import least_squares as refit
from dagjax.compaction.pruning import lift
from tests.graph import nets

RIDGE, WIDTH = 1e-3, 6


@pytest.fixture(scope="module", autouse=True)
def double():
    with nets.precision("float64"):
        yield


def chain(depth):
    """Dense layers with a relu before each, one arc a layer."""
    layers = [
        dj.block(nn.relu, nn.Dense(WIDTH), name=f"fc{i:02}") for i in range(depth)
    ]
    dag = nets.build(dj.series(*layers), ((WIDTH,),), "float64").dag
    x = jax.random.normal(jax.random.key(1), (40, WIDTH), jnp.float64)
    return dag, x


def mask_of(dag):
    rng = np.random.default_rng(2)
    found = dj.units(dag)
    kept = {name: rng.permutation(g.size) < g.size - 2 for name, g in found.items()}
    return found.mask(kept)


def layer(params, x):
    own = jax.tree.map(np.asarray, params["Dense"])
    return np.maximum(x, 0) @ own["kernel"] + own["bias"]


def uncached(dag, mask, x, calls, stale=False):
    """In numpy, every prefix from the input on; `stale` reads the dense prefix."""
    names = [arc.name for arc in dag.graph.arcs]
    params = dj.masks.apply(mask, dag.params)
    for place, name in enumerate(names):
        one = two = np.asarray(x)
        for before in names[:place]:
            one, two = layer(params[before], one), layer(dag.params[before], two)
            calls.append(before)
        params[name] = solved(
            params[name],
            mask[name],
            two if stale else one,
            layer(dag.params[name], two),
        )
    return params


def solved(own, mask, x, target):
    """Ridge regression of one layer on the features that it has."""
    own, mask = jax.tree.map(np.array, own["Dense"]), jax.tree.map(np.array, mask)
    lost = target - layer({"Dense": own}, x)
    x = np.maximum(x, 0)
    rows = mask["Dense"]["kernel"].any(1)
    columns = mask["Dense"]["bias"]
    if np.abs(lost[:, columns]).max() > 0:
        left = np.concatenate([x[:, rows], np.ones((len(x), 1))], 1)
        gram = left.T @ left
        weights = np.append(np.full(rows.sum(), RIDGE * np.diag(gram).mean()), 0)
        more = np.linalg.solve(gram + np.diag(weights), left.T @ lost[:, columns])
        own["kernel"][np.ix_(rows, columns)] += more[:-1]
        own["bias"][columns] += more[-1]
    return {"Dense": own}


def test_with_and_without_cache():
    dag, x = chain(5)
    mask, calls = mask_of(dag), []
    found = lift.refit_kept(dag, mask, x, ridge=RIDGE)
    want = uncached(dag, mask, x, calls)
    assert nets.distance(found.net.params, want) <= 1e-10
    assert len(calls) == 5 * 4 // 2
    assert nets.distance(found.net.params, dag.params) > 1e-2
    # Mutant: features of the dense prefix, not of the pruned one.
    mutant = uncached(dag, mask, x, calls, stale=True)
    assert nets.violates(nets.distance(found.net.params, mutant), "float64")


def evaluations(depth, monkeypatch):
    """How often a primitive is evaluated, counted where it happens."""
    calls, bind = [], refit.bind

    def counted(eqn, values, **changes):
        calls.append(eqn)
        return bind(eqn, values, **changes)

    dag, x = chain(depth)
    with monkeypatch.context() as patch:
        patch.setattr(refit, "bind", counted)
        found = lift.refit_kept(dag, mask_of(dag), x, ridge=RIDGE)
    assert found.report.evaluations == len(calls)
    assert max(map(calls.count, calls)) <= 3  # dense, pruned, refitted
    return len(calls)


def test_evaluations_grow_with_the_depth_alone(monkeypatch):
    depths = (3, 6, 9)
    counts = [evaluations(depth, monkeypatch) for depth in depths]
    steps = np.diff(counts)
    assert steps[0] == steps[1] > 0
    # Mutant: without the cache the same differences grow.
    naive = []
    for depth in depths:
        dag, x = chain(depth)
        uncached(dag, mask_of(dag), x, calls := [])
        naive.append(len(calls))
    assert np.diff(naive)[1] > np.diff(naive)[0]
