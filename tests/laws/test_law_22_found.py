"""Law 22, found: trimming and pruning find a planted ticket, compaction trains it.

The dead units are planted by their values. `dj.trim` finds them from the mask of what
is not zero, `dj.prune_units` and `dj.lift_prune` from scores, with no false positives;
the compacted network, trained from gathered weights and gathered moments, gives the
curve of the masked one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dagjax as dj
from tests.graph import nets

DEAD = {"fc1": [1, 4], "fc2": [0, 3, 5]}  # of 6 and 7 units
STEPS = 200
OPTIMIZERS = {
    "momentum": optax.sgd(0.02, momentum=0.9),
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
}


@pytest.fixture(scope="module", autouse=True)
def double():
    with nets.precision("float64"):
        yield


def planted(activation=jax.nn.relu, traced=False):
    """A network whose dead units have neither in-weights, biases nor out-weights."""
    graph = dj.zoo.mlp((6, 7, 2), activation=activation, input_shape=(5,))
    x = jnp.ones((4, 5))
    dag = nets.fill(dj.init(jax.random.key(0), graph, x), jnp.float64)
    params = jax.tree.map(lambda p: np.array(p), dag.params)
    for layer, after in (("fc1", "fc2"), ("fc2", "fc3")):
        dead = DEAD[layer]
        params[layer]["Dense"]["kernel"][:, dead] = 0
        params[layer]["Dense"]["bias"][dead] = 0
        params[after]["Dense"]["kernel"][dead] = 0
    dag = dag.replace(params=jax.tree.map(jnp.asarray, params))
    return dj.trace(*dj.as_function(dag), x) if traced else dag


def nonzero(dag):
    return jax.tree.map(lambda p: p != 0, dag.params)


def dead_of(mask):
    """Units whose bias is off."""
    return {
        layer: np.flatnonzero(~np.asarray(mask[layer]["Dense"]["bias"])).tolist()
        for layer in DEAD
    }


@pytest.mark.parametrize("traced", [False, True])
def test_trimming_finds_the_planted_units_alone(traced):
    dag = planted(traced=traced)
    mask = jax.tree.map(lambda p: jnp.ones(p.shape, bool), dag.params)
    for layer in DEAD:  # of the planted zeros only the in-weights are told
        kernel = dag.params[layer]["Dense"]["kernel"] != 0
        mask[layer]["Dense"] = {**mask[layer]["Dense"], "kernel": kernel}
        bias = dag.params[layer]["Dense"]["bias"] != 0
        mask[layer]["Dense"] = {**mask[layer]["Dense"], "bias": bias}
    trimmed = dj.trim(dag, mask)
    assert dead_of(trimmed) == DEAD
    for layer, after in (("fc1", "fc2"), ("fc2", "fc3")):
        rows = np.asarray(trimmed[after]["Dense"]["kernel"]).any(1)
        assert np.flatnonzero(~rows).tolist() == DEAD[layer]
    alive = jax.tree.map(lambda p: jnp.ones(p.shape, bool), dag.params)
    assert dead_of(dj.trim(dag, alive)) == {"fc1": [], "fc2": []}  # masks, not values


@pytest.mark.parametrize("refit", [False, True])
def test_pruning_finds_the_planted_units_alone(refit):
    dag, x = planted(), jax.random.normal(jax.random.key(1), (64, 5))
    found = dj.lift_prune(dag, x, {"density": 8 / 13}, "l2", refit=refit)
    assert dead_of(found.mask) == DEAD
    assert dead_of(dj.prune_units(dag, "l2", density=8 / 13)) == DEAD
    assert jnp.allclose(found.net(x), dag(x), rtol=1e-9, atol=1e-9)


def curve(net, opt_state, tx, x, y, mask=None):
    apply, params = dj.as_function(net)

    def loss(params):
        held = params if mask is None else dj.masks.apply(mask, params)
        return ((apply(held, x) - y) ** 2).mean()

    def step(carry, _):
        params, opt_state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    run = jax.jit(lambda *start: jax.lax.scan(step, start, None, STEPS)[1])
    return np.asarray(run(params, opt_state))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.sigmoid])
def test_the_compacted_ticket_trains_alike(name, activation):
    """Under a sigmoid a dead unit emits 1/2: dense training wakes it up (mutant)."""
    dag, tx = planted(activation), OPTIMIZERS[name]
    x = jax.random.normal(jax.random.key(1), (32, 5))
    y = jnp.sin(x[:, :2])
    mask = dj.prune_units(dag, "l2", density=8 / 13)
    small, _, opt_state = dj.compact(dag, mask, tx.init(dag.params))
    assert small.params["fc2"]["Dense"]["kernel"].shape == (4, 4)
    dense = curve(dag, tx.init(dag.params), tx, x, y)
    masked = curve(dag, tx.init(dag.params), tx, x, y, mask)
    ours = curve(small, opt_state, tx, x, y)
    assert np.isfinite(dense).all()
    assert ours[-1] < ours[0]
    assert np.abs(masked - ours).max() <= 1e-10
    if activation is jax.nn.relu:
        assert np.abs(dense - ours).max() <= 1e-10
    else:
        assert np.abs(dense - ours).max() > 1e-3
