"""Networks of other libraries, by the two lines that the README shows."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("KERAS_HOME", "/nonexistent")  # no settings of the user's

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (2, 8, 8, 1))


def test_keras(x):
    keras = pytest.importorskip("keras")
    layers = keras.layers
    image = keras.Input((8, 8, 1))
    h = layers.Conv2D(4, 3, padding="same", activation="relu", name="stem")(image)
    b = layers.Conv2D(4, 3, padding="same", name="conv")(h)
    b = layers.ReLU()(layers.BatchNormalization(name="norm")(b))
    h = layers.Add(name="add")([h, b])
    out = layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(h))
    model = keras.Model(image, out)

    params, state = ([v.value for v in vs] for vs in
        (model.trainable_variables, model.non_trainable_variables))  # fmt: skip
    dag = dj.trace(model.stateless_call, params, x, state=state)

    assert [*dag.graph.by_name] == ["stem", "add/skip", "conv", "head"]
    assert np.allclose(dag(x), model(x), atol=1e-6)
    off = dag(x, gates={"conv": 0.0})
    model.get_layer("norm").gamma.assign(jnp.zeros(4))
    assert np.allclose(off, model(x), atol=1e-6)


def test_equinox(x):
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key)
            self.up = eqx.nn.Linear(8, 6, key=keys[0])
            self.down = eqx.nn.Linear(6, 8, key=keys[1])

        def __call__(self, x):
            return x + self.down(jax.nn.relu(self.up(x)))

    model, rows = Net(jax.random.key(0)), x[:, 0, :, 0]

    params, static = eqx.partition(model, eqx.is_array)
    dag = dj.trace(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, rows)

    assert [*dag.graph.by_name] == ["up", "down", "skip"]
    assert np.allclose(dag(rows), jax.vmap(model)(rows), atol=1e-6)


def test_haiku(x):
    hk = pytest.importorskip("haiku")

    def forward(x):
        h = hk.Linear(6, name="up")(x)
        return x + hk.Linear(8, name="down")(jax.nn.relu(h))

    net, rows = hk.without_apply_rng(hk.transform(forward)), x[:, 0, :, 0]

    params = net.init(jax.random.key(0), rows)
    dag = dj.trace(net.apply, params, rows)

    assert [*dag.graph.by_name] == ["up", "down", "skip"]
    assert np.allclose(dag(rows), net.apply(params, rows), atol=1e-6)
