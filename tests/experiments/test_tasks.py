"""Losses, metrics and samples: what does not fit is refused, the rest is right."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dagjax as dj
from dagjax import api
from dagjax.experiments.controls import narrowed
from dagjax.experiments.experiment import Setup, parameters_kept
from dagjax.experiments.granularity import (
    GRANULARITIES,
    check_densities,
    make_pruner,
)
from dagjax.experiments.optimizers import with_learning_rate
from dagjax.experiments.tasks import check_fit, default_margin, task_of
from dagjax.experiments.train import evaluate, fixed_sample
from dagjax.experiments.verdict import sentence, verdict
from dagjax.objectives import accuracy, negative_error, squared_error

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)).astype(np.float32)
LABELS, NUMBERS = np.arange(40) % 3, X[:, 0].copy()
entropy = optax.sigmoid_binary_cross_entropy
classes = optax.softmax_cross_entropy_with_integer_labels


def data_of(y):
    return dj.data.Data(X, y, X, y)


def fitted(y, loss=None, metric=None, outputs=1):
    """The task of targets, checked against a network with some outputs."""
    model, data = dj.as_model(dj.zoo.mlp((5, outputs), input_shape=(6,))), data_of(y)
    task = task_of(data, loss, metric, (2, outputs))
    check_fit(task, model, data)
    return task


CROSSED = {
    "a loss": {"loss": entropy, "metric": lambda o, t: o[..., 0] > t},
    "a mean of one": {
        "loss": lambda o, t: entropy(o, t).mean(), "metric": lambda o, t: o[..., 0] > t
    },
    "a metric": {"metric": lambda o, t: -((o - t) ** 2)},
    "one number of a metric": {"metric": lambda o, t: -((o - t) ** 2).mean()},
}  # fmt: skip


@pytest.mark.parametrize("name", CROSSED)
def test_outputs_and_targets_that_are_crossed_are_refused(name):
    """`[N, 1]` against `[N]` is `[N, N]`."""
    with pytest.raises(ValueError, match="example by example"):
        fitted(NUMBERS, **CROSSED[name])


def test_what_is_no_mean_over_examples_is_refused():
    with pytest.raises(ValueError, match="the loss of 5 examples is"):
        fitted(NUMBERS, loss=lambda o, t: ((o[..., 0] - t) ** 2).sum())


def test_a_loss_that_cannot_be_taken_is_refused_in_words():
    with pytest.raises(ValueError, match=r"the loss does not take outputs \(5, 3\)"):
        fitted(LABELS, lambda o, t: o @ t, accuracy, outputs=3)


def test_the_default_metric_needs_outputs_that_it_fits():
    one = lambda o, t: entropy(o[..., 0], t.astype(jnp.float32))
    with pytest.raises(ValueError, match="no metric for outputs"):
        fitted(LABELS % 2, loss=one)
    assert fitted(LABELS, loss=classes, outputs=3).metric is accuracy
    absolute = lambda o, t: jnp.abs(o[..., 0] - t)
    assert fitted(NUMBERS, loss=absolute).metric is negative_error


def test_one_output_may_have_targets_without_an_axis():
    task = fitted(NUMBERS)
    assert task.loss is squared_error
    outputs = jnp.asarray(X[:, 1:2])
    want = (X[:, 1] - NUMBERS) ** 2
    np.testing.assert_allclose(task.loss(outputs, NUMBERS), want, rtol=1e-6)
    np.testing.assert_allclose(task.metric(outputs, NUMBERS), -want, rtol=1e-6)


def test_negative_labels_need_a_loss_that_leaves_them_out():
    padded = np.where(LABELS == 2, -1, LABELS)
    with pytest.raises(ValueError, match="negative labels"):
        fitted(padded, outputs=3)
    loss = lambda o, t: jnp.where(t < 0, 0, classes(o, jnp.maximum(t, 0)))
    fitted(padded, loss, lambda o, t: o.argmax(-1) == t, outputs=3)


def f1(outputs, targets):
    found, wanted = outputs.argmax(-1) == 1, targets == 1
    return 2 * (found & wanted).sum() / (found.sum() + wanted.sum())


@pytest.mark.parametrize("metric", [f1, accuracy])
def test_a_metric_of_many_examples_is_that_of_the_whole_set(metric):
    """Sorted by class, which slices are not: a mean over slices is another number."""
    model = dj.as_model(dj.zoo.mlp((5, 3), input_shape=(6,)))
    x = RNG.normal(size=(5000, 6)).astype(np.float32)
    y = np.sort(RNG.integers(0, 3, 5000))
    theta, state = model.init(jax.random.key(0), x[:1])
    at = dj.Trained(theta, state)
    outputs = model.apply(theta, state, x)[0]
    got = jax.jit(lambda x, y: evaluate(model, metric, at, x, y))(x, y)
    np.testing.assert_allclose(got, np.mean(metric(outputs, y)), rtol=1e-5)
    if metric is f1:
        parts = [slice(0, 2000), slice(2000, 4000), slice(4000, 5000)]
        means = [float(f1(outputs[p], y[p])) for p in parts]
        assert abs(got - np.dot(means, [0.4, 0.4, 0.2])) > 0.01


def test_the_sample_is_of_all_examples():
    x = np.arange(100.0)[:, None]
    data, config = dj.data.Data(x, x, x, x), dj.TrainConfig(eval_size=30)
    sample, targets = fixed_sample(config, data)
    assert len(np.unique(sample)) == 30
    assert np.array_equal(sample, targets)
    assert sample.max() > 80
    whole, _ = fixed_sample(dj.TrainConfig(eval_size=100), data)
    assert np.array_equal(whole, x)


def test_the_margin_is_of_each_output_by_itself():
    y = np.stack([X[:, 0], 100 + X[:, 1]], 1)
    right = 0.01 * np.mean((y - y.mean(0)) ** 2)
    assert default_margin(squared_error, data_of(y)) == pytest.approx(right, rel=1e-5)
    big = (1000 * X[:, :1]).astype(np.float16)
    assert np.isfinite(default_margin(squared_error, data_of(big)))


# --- what an experiment is known by -----------------------------------------------


def setup_of(net, loss=squared_error, rate=0.1):
    model, task = dj.as_model(net), dj.Task(loss, negative_error)
    pruner = make_pruner("weights", None, model, task)
    tx = dj.make_tx("sgd", rate)
    return Setup(dj.TrainConfig(), model, task, tx, pruner, "weights")


def scaled(by):
    return lambda o, t: by * squared_error(o, t)


def program(*args):
    return api.program_of_run(setup_of(*args), data_of(NUMBERS[:, None]))


def test_a_program_tells_edited_functions_apart():
    """All are lambdas of one name."""
    layers = lambda by: dj.series(nn.Dense(4), lambda x: jnp.tanh(by * x), nn.Dense(1))
    assert program(layers(1.0)) == program(layers(1.0))
    assert program(layers(1.0)) != program(layers(5.0))
    assert program(layers(1.0), scaled(1.0)) != program(layers(1.0), scaled(2.0))


def test_a_learning_rate_may_be_a_schedule():
    tx = dj.make_tx("sgd", optax.linear_schedule(1.0, 0.0, 2))
    state, sizes = tx.init(jnp.ones(())), []
    for _ in range(3):
        update, state = tx.update(jnp.ones(()), state)
        sizes.append(-float(update))
    assert sizes == [1.0, 0.5, 0.0]


def test_a_learning_rate_has_the_type_of_the_state():
    with jax.enable_x64(True):
        state = dj.make_tx("sgd", 0.1).init(jnp.ones(()))
        changed = with_learning_rate(state, 0.2)
    same = lambda tree: jax.tree.map(jnp.result_type, tree)
    assert same(changed) == same(state)


def test_what_tied_arcs_share_counts_once():
    b = dj.GraphBuilder()
    h = b.arc("stem", b.input("x"), "h0", nn.Dense(5))
    h1 = b.arc("one", h, "h1", nn.Dense(5), tied="common")
    h2 = b.arc("two", h1, "h2", nn.Dense(5), tied="common")
    graph = b.build(outputs=b.arc("read", h2, "y", nn.Dense(2)))
    params = dj.init(jax.random.key(0), graph, X).params
    kept = lambda *off: parameters_kept(
        {"params": None, "gates": {a.name: a.name not in off for a in graph.arcs}},
        {"params": params}, graph,
    )  # fmt: skip
    stem, common, read = 6 * 5 + 5, 5 * 5 + 5, 5 * 2 + 2
    assert kept() == kept("one") == stem + common + read
    assert kept("one", "two") == stem + read


def test_densities_fall_and_none_stands_twice():
    model = dj.as_model(dj.zoo.mlp((5, 1), input_shape=(6,)))
    with pytest.raises(ValueError, match="none twice"):
        check_densities([0.5, 0.5], "weights", model, X)


def test_without_the_random_control_nothing_is_said_of_it():
    dense = np.linspace(2.0, 1.0, 5) + np.arange(10)[:, None]
    found = verdict(dense, dense, None, range(5), margin=0.1)
    assert (found.found, found.control, found.mcnemar) == (True, None, None)
    assert "random" not in sentence({0.5: found})
    shown = verdict(dense, dense, dense, range(5), margin=0.1)
    assert "random" in sentence({0.5: shown})


def test_a_narrow_network_as_wide_as_the_classes_is_trained_too():
    """Units leave layers alone that are as wide as the output."""
    setup = setup_of(dj.zoo.mlp((8, 3), input_shape=(6,)))._replace(prune="units")
    narrow = narrowed(setup, 6 * 3 + 3 + 3 * 3 + 3, data_of(LABELS))
    full = GRANULARITIES[narrow.prune].full
    theta, _, outputs = narrow.model.shapes(X)
    assert dj.masks.size(full(theta, outputs.shape[-1])) == 6 * 3 + 3 * 3
