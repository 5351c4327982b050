"""What an arc may carry, and how modes and keys reach it."""

import functools
from typing import NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dagjax as dj
from dagjax.graph.core.functions import (
    Linen,
    Pair,
    Plain,
    Variables,
    as_function,
    describe,
)
from tests.graph import nets

pytestmark = pytest.mark.usefixtures("strict_dtypes")


class Affine:
    """Flax's two methods, without Flax."""

    def init(self, key, x):
        return {
            "params": {"w": jnp.full(x.shape[-1:], 2.0)},
            "constants": {"b": jnp.ones(x.shape[-1:])},
        }

    def apply(self, variables, x):
        w, b = variables["params"]["w"], variables["constants"]["b"]
        return w[None] * x + b[None]


class Layer(NamedTuple):
    """A pair with names, as optax has them."""

    init: object
    apply: object


def init_scale(key, x):
    return jax.random.normal(key, x.shape[-1:])


def apply_scale(scale, x):
    return scale[None] * x


def square(x):
    return x * x


X = np.arange(6, dtype=np.float32).reshape(2, 3)
KINDS = {
    "linen": (nn.Dense(3), Linen, "Dense"),
    "named linen": (nn.Dense(3, name="fc"), Linen, "fc"),
    "function": (square, Plain, "square"),
    "ufunc": (jnp.tanh, Plain, "tanh"),
    "lambda": (lambda x: x, Plain, "function"),
    "pair": ((init_scale, apply_scale), Pair, "apply_scale"),
    "named pair": (Layer(init_scale, apply_scale), Pair, "apply_scale"),
    "object": (Affine(), Variables, "Affine"),
    "graph": (dj.series(nn.Dense(3), jnp.tanh), None, "block"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_and_names(kind):
    fn, kind_of, name = KINDS[kind]
    got = as_function(fn)
    assert kind_of is None or type(got) is kind_of
    assert name is None or got.name == name
    assert as_function(got) is got
    assert repr(got)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_under_transforms(kind, transform, key):
    fn = KINDS[kind][0]
    arc = dj.Arc("a", "x", "h", fn)
    twice = dj.Arc("b", "h", "y", lambda x: 2.0 * x)
    dag = dj.init(key, dj.Graph([arc, twice], "x", "y"), X)
    params, state = dag.params.get(arc.name, {}), dag.state.get(arc.name, {})
    y, kept = arc.fn.apply(params, state, jnp.asarray(X), train=False, key=None)
    assert kept is state
    got = transform(lambda dag, x: dag(x))(dag, jnp.asarray(X))
    np.testing.assert_allclose(got, 2.0 * y, rtol=1e-6)
    assert np.isfinite(got).all()


def test_parameters_and_state_are_split(key):
    dag = dj.init(key, dj.series(Affine(), nn.BatchNorm(), jnp.tanh), X)
    assert set(dag.params) == {"Affine", "BatchNorm"}
    assert dag.state["Affine"] == {"constants": {"b": pytest.approx(np.ones(3))}}
    assert set(dag.state["BatchNorm"]) == {"batch_stats"}
    np.testing.assert_allclose(
        Affine().apply({"params": dag.params["Affine"], **dag.state["Affine"]}, X),
        2 * X + 1,
    )


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (nn.Dense, "brackets"),
        (3, "got 3 of type int"),
        ("relu", "got 'relu' of type str"),
        ((init_scale,), r"a pair \(init, apply\)"),
        ((init_scale, 3), r"a pair \(init, apply\)"),
        (None, "NoneType"),
    ],
)
def test_what_an_arc_cannot_carry(fn, message):
    with pytest.raises(TypeError, match=message):
        dj.Arc("a", "x", "y", fn)


# --- modes ------------------------------------------------------------------------


class Train(nn.Module):
    """Reports the mode flag it was given."""

    @nn.compact
    def __call__(self, x, train):
        return jnp.full_like(x, float(train))


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        return jnp.full_like(x, float(not deterministic))


class RunningAverage(nn.Module):
    use_running_average: bool | None = None

    @nn.compact
    def __call__(self, x, use_running_average=None):
        merged = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        return jnp.full_like(x, float(not merged))


@pytest.mark.parametrize("module", [Train(), Deterministic(), RunningAverage()])
def test_mode_reaches_the_module(module, key):
    dag = dj.init(key, dj.series(dj.block(module)), X)
    assert float(dag(X).mean()) == 0.0
    assert float(dag.apply(X, train=True)[0].mean()) == 1.0


def test_mode_fixed_in_the_module_stays(key):
    dag = dj.init(key, dj.series(RunningAverage(True)), X)
    assert float(dag.apply(X, train=True)[0].mean()) == 0.0


def test_batch_norm_updates_in_train_mode_only(key):
    dag = dj.init(key, dj.series(nn.BatchNorm(momentum=0.5)), X)
    _, state = dag.apply(X)
    assert state is dag.state
    y, state = dag.apply(X, train=True)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    stats = state["BatchNorm"]["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.5 * X.mean(0), rtol=1e-6)
    assert nets.same(dag.state["BatchNorm"]["batch_stats"]["mean"], jnp.zeros(3))


def test_nested_state_is_updated(key):
    dag = dj.init(key, dj.series(dj.block(nn.Dense(2), nn.BatchNorm(), name="b")), X)
    _, state = dag.apply(X, train=True)
    before = dag.state["b"]["BatchNorm"]["batch_stats"]["mean"]
    after = state["b"]["BatchNorm"]["batch_stats"]["mean"]
    assert float(abs(after - before).max()) > 0


# --- keys -------------------------------------------------------------------------

WIDE = np.ones((4, 64), np.float32)


def test_dropout_is_off_by_default_and_needs_no_key(key):
    dag = dj.init(key, dj.series(nn.Dropout(0.5)), WIDE)
    np.testing.assert_array_equal(dag(WIDE), WIDE)


def test_dropout_is_drawn_from_the_key(key):
    dag = dj.init(key, dj.series(nn.Dropout(0.5)), WIDE)
    draw = lambda seed: dag.apply(WIDE, train=True, key=jax.random.key(seed))[0]
    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))
    assert set(np.unique(draw(1))) == {0.0, 2.0}
    assert 0.35 < float((draw(1) == 0).mean()) < 0.65


def test_every_arc_has_a_stream_of_its_own(key):
    drop = nn.Dropout(0.5)
    nested = dj.block(nn.Dropout(0.5), name="nested")
    dag = dj.init(key, dj.concat(drop, drop, nested), WIDE)
    y, _ = dag.apply(WIDE, train=True, key=key)
    one, two, three = np.split(np.asarray(y), 3, axis=-1)
    assert not np.array_equal(one, two)
    assert not np.array_equal(one, three)
    assert not np.array_equal(two, three)


def test_stream_of_an_arc_does_not_depend_on_others(key):
    dag = dj.init(key, dj.concat(nn.Dropout(0.5), nn.Dropout(0.5)), WIDE)
    y, _ = dag.apply(WIDE, train=True, key=key)
    less, _ = dj.delete(dag, "Dropout").apply(WIDE, train=True, key=key)
    np.testing.assert_array_equal(y[:, 64:], less[:, 64:])


def test_dropout_without_a_key_says_which_arc(key):
    drop = dj.block(nn.Dense(3), nn.Dropout(0.5), name="head")
    dag = dj.init(key, dj.series(nn.Dense(4), drop), X)
    with pytest.raises(Exception, match="dropout") as caught:
        dag.apply(X, train=True)
    assert isinstance(caught.value, (flax.errors.InvalidRngError, dj.GraphError))
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "head" in said


# --- descriptions -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (nn.Dense(3), "Dense(3)"),
        (nn.Dense(3, use_bias=False), "Dense(3, use_bias=False)"),
        (nn.relu, "relu"),
        (lambda x: x, "function"),
        ((init_scale, apply_scale), "apply_scale"),
    ],
)
def test_describe(fn, text):
    assert describe(fn) == text


def test_descriptions_hold_no_addresses():
    pool = functools.partial(nn.avg_pool, window_shape=(2, 2))
    init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    for fn in (pool, nn.Dense(3, kernel_init=init), dj.zoo.lenet5(), jax.jit(jnp.sin)):
        assert " at 0x" not in repr(as_function(fn))
