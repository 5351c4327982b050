"""Law 22: a planted ticket trains exactly as the dense network does.

T11: where `sigma(0) = 0`, units with zero in-weights, bias and out-weights have
gradients that vanish identically, so dense training never wakes them up, and neither
does an elementwise optimizer. Dense training, training under the planted mask, and
training of the small network that is left give one and the same curve.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dagjax as dj
from tests.graph import nets
from tests.sweeps import seldom

STEPS, TOLERANCE = 200, 1e-10
DEAD = {"fc1": (1, 4), "fc2": (0, 3, 5)}  # of 6 and 7 units

OPTIMIZERS = {
    "momentum": lambda: optax.sgd(0.02, momentum=0.9),
    "adam": lambda: optax.adam(0.01),
    "adamw": lambda: optax.adamw(0.01, weight_decay=0.1),
}


@pytest.fixture(scope="module", autouse=True)
def double():
    with nets.precision("float64"):
        yield


@functools.cache
def data():
    raw = dj.data.teacher(n_train=48, n_test=16, d_in=5, d_out=2)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), raw)


def model_of(activation, *hidden):
    graph = dj.zoo.mlp((*hidden, 2), activation=activation, input_shape=(5,))
    return dj.as_model(graph)


def planted():
    """A mask without the dead units: their in-weights, biases and out-weights."""
    shapes = {"fc1": (5, 6), "fc2": (6, 7), "fc3": (7, 2)}
    mask = {
        name: {"Dense": {"kernel": np.ones(s, bool), "bias": np.ones(s[1], bool)}}
        for name, s in shapes.items()
    }
    for layer, after in (("fc1", "fc2"), ("fc2", "fc3")):
        dead = list(DEAD[layer])
        mask[layer]["Dense"]["kernel"][:, dead] = False
        mask[layer]["Dense"]["bias"][dead] = False
        mask[after]["Dense"]["kernel"][dead] = False
    return {"params": jax.tree.map(jnp.asarray, mask), "gates": None}


def small(params):
    """What is left of each layer, gathered."""
    alive = {"fc1": [0, 2, 3, 5], "fc2": [1, 2, 4, 6], "fc3": [0, 1]}
    inputs = {"fc1": range(5), "fc2": alive["fc1"], "fc3": alive["fc2"]}
    return {
        name: {
            "Dense": {
                "kernel": own["Dense"]["kernel"][jnp.ix_(
                    jnp.array(list(inputs[name])), jnp.array(alive[name])
                )],
                "bias": own["Dense"]["bias"][jnp.array(alive[name])],
            }
        }
        for name, own in params.items()
    }  # fmt: skip


def start_of(model):
    """Generic parameters, zero at the dead units."""
    rng = np.random.default_rng(0)
    theta, state = model.init(jax.random.key(0), data().x_train[:1])
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(x.shape[0]))
    theta = jax.tree.map(draw, theta)
    return dj.Trained(dj.masks.apply(planted(), theta), state)


@functools.cache
def curves(activation, name):
    """Dense, masked, small: parameters and losses; one program for the first two."""
    config = dj.TrainConfig(STEPS, batch=16, eval_every=10)
    task, key = dj.task_of(data()), jax.random.key(1)
    compiled = lambda m: jax.jit(dj.make_train(config, m, task, OPTIMIZERS[name]()))
    model = model_of(activation, 6, 7)
    start, mask, train = start_of(model), planted(), compiled(model)
    full = jax.tree.map(jnp.ones_like, mask)
    runs = [train(key, start, m, data()) for m in (full, mask)]
    theta = {"params": small(start.theta["params"]), "gates": {}}
    none = {"params": None, "gates": None}
    compact = compiled(model_of(activation, 4, 4))
    return [*runs, compact(key, start._replace(theta=theta), none, data())]


def losses(activation, name):
    found = [np.asarray(info.loss) for _, info in curves(activation, name)]
    assert all(loss.dtype == np.float64 for loss in found)
    assert all(np.isfinite(loss).all() and loss[-1] < loss[0] for loss in found)
    return found


def dead_entries(end):
    gone = jax.tree.map(lambda m, x: x[~m], planted()["params"], end.theta["params"])
    return np.concatenate(jax.tree.leaves(gone))


@pytest.mark.parametrize(
    ("activation", "name"),
    seldom(
        itertools.product([nn.relu, nn.gelu], OPTIMIZERS),
        [(nn.gelu, "momentum"), (nn.relu, "adam")],
    ),
)
def test_dense_masked_and_small_networks_train_alike(activation, name):
    dense, masked, compact = losses(activation, name)
    assert len(dense) == STEPS // 10 + 1
    assert np.abs(dense - masked).max() <= TOLERANCE
    assert np.abs(dense - compact).max() <= TOLERANCE
    ends = [end for end, _ in curves(activation, name)]
    for end in ends[:2]:
        gone = dead_entries(end)
        assert gone.size == 2 * 6 + 3 * 7 + 2 * 4 + 3 * 2
        assert np.array_equal(gone, np.zeros_like(gone))
    left = small(ends[0].theta["params"])
    assert nets.distance(left, ends[2].theta["params"]) <= TOLERANCE


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sigmoid_mutant_disagrees(name):
    """At zero it is one half: the dense network wakes its dead units up."""
    dense, masked, compact = losses(nn.sigmoid, name)
    assert np.abs(dense - masked).max() > 1e-3
    assert np.abs(masked - compact).max() <= TOLERANCE
    ends = [end for end, _ in curves(nn.sigmoid, name)]
    assert np.abs(dead_entries(ends[0])).max() > 1e-3
    assert np.abs(dead_entries(ends[1])).max() == 0
