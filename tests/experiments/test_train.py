"""Masked training: dead weights stay dead, and the rest is trained as ever."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dagjax as dj
from dagjax.experiments import train as training
from dagjax.experiments.optimizers import SCHEDULES, with_learning_rate
from dagjax.experiments.train import make_trainer, shuffled_epochs
from tests.experiments import tiny
from tests.experiments.tiny import CONFIG, TEACHER

pytestmark = pytest.mark.usefixtures("quick_compile")

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.sgd(0.02, momentum=0.9),
    "adam": lambda: optax.adam(0.01),
    "adamw": lambda: optax.adamw(0.01, weight_decay=0.1),
}
NOISY = {
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.05)),
    "noise after": lambda: optax.chain(optax.adam(0.01), optax.add_noise(1, 1, 0)),
    "diverging": lambda: optax.sgd(1e30),
}
TASK = dj.Task(tiny.squares, tiny.squares)
MODEL = dj.as_model(tiny.mlp())


@functools.cache
def compiled(name):
    return jax.jit(dj.make_train(CONFIG, MODEL, TASK, (OPTIMIZERS | NOISY)[name]()))


@functools.cache
def trained(name, masked=True):
    """Parameters after training from a masked start, with the mask or a full one."""
    start = tiny.start_of(MODEL, TEACHER)
    mask = tiny.some(start.theta, prunable=lambda path, x: True)
    start = start._replace(theta=dj.masks.apply(mask, start.theta))
    live = mask if masked else jax.tree.map(jnp.ones_like, mask)
    end, info = compiled(name)(jax.random.key(1), start, live, TEACHER)
    return mask, start, end, info


@pytest.mark.parametrize("name", [*OPTIMIZERS, *NOISY])
def test_dead_weights_stay_exactly_zero(name):
    mask, start, end, _ = trained(name)
    gone = tiny.dead(mask["params"], end.theta["params"])
    assert gone.size > 10
    assert np.array_equal(gone, np.zeros_like(gone))
    assert not tiny.equal(end.theta, start.theta)


@pytest.mark.parametrize("name", ["sgd", "adamw", "noise after"])
def test_mutant_without_the_mask_revives_them(name):
    mask, _, end, _ = trained(name, masked=False)
    gone = tiny.dead(mask["params"], end.theta["params"])
    assert np.abs(gone).max() > 1e-3


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_equals_a_loop_that_masks_in_the_forward_pass(name):
    mask, start, end, info = trained(name)
    tx, key = OPTIMIZERS[name](), jax.random.key(1)
    params, losses = tiny.loop(CONFIG, MODEL, tx, key, start, mask, TEACHER)
    np.testing.assert_allclose(info.loss, losses, rtol=1e-5)
    got = jax.tree.leaves(end.theta["params"])
    for one, two in zip(got, jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    assert losses[-1] < losses[0]


def test_equals_numpy():
    """Stochastic gradient descent by hand: derivatives, batches and all."""
    mask, start, end, info = trained("sgd")
    layers = [start.theta["params"][f"fc{i}"]["Dense"] for i in (1, 2)]
    keeps = [mask["params"][f"fc{i}"]["Dense"] for i in (1, 2)]
    (w, b), (v, c) = (
        [np.array(p[k], np.float64) for k in ("kernel", "bias")] for p in layers
    )
    order = make_trainer(CONFIG, MODEL, TASK, optax.sgd(0.05)).order(
        jax.random.key(1), TEACHER
    )

    def forward(x):
        h = np.maximum(x @ w + b, 0)
        return h, h @ v + c

    def loss(x, y):
        return np.square(forward(x)[1] - y).mean()

    x, y, fixed = TEACHER.x_train, TEACHER.y_train, tiny.sample(CONFIG, TEACHER)
    losses = [loss(x[fixed], y[fixed])]
    for chunk in np.asarray(order):
        for index in chunk:
            h, out = forward(x[index])
            error = 2 * (out - y[index]) / out.size
            back = error @ v.T * (h > 0)
            grads = [x[index].T @ back, back.sum(0), h.T @ error, error.sum(0)]
            live = [np.asarray(keep[k]) for keep in keeps for k in ("kernel", "bias")]
            for p, g, m in zip((w, b, v, c), grads, live, strict=True):
                p -= 0.05 * g * m
        losses.append(loss(x[fixed], y[fixed]))
    np.testing.assert_allclose(info.loss, losses, rtol=1e-5)
    np.testing.assert_allclose(
        end.theta["params"]["fc1"]["Dense"]["kernel"], w, atol=1e-5
    )
    test = loss(TEACHER.x_test, TEACHER.y_test)
    np.testing.assert_allclose([info.test_loss, info.test_metric], test, rtol=1e-5)


def test_no_mask_is_the_full_mask():
    _, start, end, info = trained("sgd", masked=False)
    none = compiled("sgd")(jax.random.key(1), start, tiny.nothing(), TEACHER)
    assert tiny.equal(none, (end, info))


def test_the_start_is_masked_once():
    start = tiny.start_of(MODEL, TEACHER)
    mask = tiny.some(start.theta)
    trainer = make_trainer(CONFIG, MODEL, TASK, optax.sgd(0.05))
    carry = trainer.begin(start, mask, None)
    assert tiny.equal(carry.at.theta, dj.masks.apply(mask, start.theta))
    x, y = (z[tiny.sample(CONFIG, TEACHER)] for z in TEACHER[:2])
    want = np.square(MODEL.apply(carry.at.theta, {}, x)[0] - y).mean()
    np.testing.assert_allclose(trainer.measure(carry, TEACHER), want, rtol=1e-6)


# --- order ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "count"), [(48, 192), (48, 100), (7, 3), (5, 23), (1, 4)]
)
def test_every_epoch_is_a_permutation(n, count, key):
    flat = np.asarray(shuffled_epochs(key, n, count))
    assert flat.shape == (count,)
    epochs = [flat[i : i + n] for i in range(0, count, n)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == len(epoch)
        assert set(epoch.tolist()) <= set(range(n))
    whole = [tuple(epoch) for epoch in epochs if len(epoch) == n]
    assert n < 5 or len(set(whole)) == len(whole)


def test_order_depends_on_key_and_stream_only(key):
    def order(key, stream=0, steps=12):
        config = dj.TrainConfig(steps, 16, 4, 40)
        trainer = make_trainer(config, MODEL, TASK, optax.sgd(0.1), stream=stream)
        return np.asarray(trainer.order(key, TEACHER))

    once = order(key)
    assert once.shape == (3, 4, 16)
    assert np.array_equal(once, order(key))
    others = [order(key, stream=1), order(key, stream=2), order(jax.random.key(1))]
    for i, other in enumerate(others):
        assert not np.array_equal(once, other)
        assert all(not np.array_equal(other, o) for o in others[:i])


def test_batches_larger_than_the_data():
    config = dj.TrainConfig(steps=2, batch=100, eval_every=1)
    train = dj.make_train(config, MODEL, TASK, optax.sgd(0.01))
    start = tiny.start_of(MODEL, TEACHER)
    info = jax.jit(train)(jax.random.key(0), start, tiny.nothing(), TEACHER)[1]
    assert info.loss.shape == (3,)
    assert np.isfinite(info.loss).all()


def test_one_step_at_a_time_is_the_same_training(key):
    start = tiny.start_of(MODEL, TEACHER)
    mask, order = tiny.some(start.theta), jnp.arange(32).reshape(2, 16)
    trainer = make_trainer(CONFIG, MODEL, TASK, optax.adam(0.05))
    steps = jax.jit(trainer.steps)
    begun = trainer.begin(start, mask, None)
    together = steps(key, mask, begun, order, TEACHER)
    one = steps(key, mask, begun, order[:1], TEACHER)
    two = steps(key, mask, one, order[1:], TEACHER)
    assert (int(two.step), int(together.step)) == (2, 2)
    losses = [float(trainer.measure(c, TEACHER)) for c in (begun, one, two, together)]
    assert losses[2] == pytest.approx(losses[3], rel=1e-5)
    assert losses[2] != losses[1] != losses[0]


# --- learning rates ---------------------------------------------------------------


def test_the_learning_rate_is_a_value():
    start, key = tiny.start_of(MODEL, TEACHER), jax.random.key(1)
    train = jax.jit(
        dj.make_train(CONFIG, MODEL, TASK, dj.make_tx("sgd", 0.3, steps=12))
    )
    plain = jax.jit(dj.make_train(CONFIG, MODEL, TASK, optax.sgd(0.05)))
    given = train(key, start, tiny.nothing(), TEACHER, 0.05)[1]
    own = train(key, start, tiny.nothing(), TEACHER)[1]
    want = plain(key, start, tiny.nothing(), TEACHER)[1]
    np.testing.assert_allclose(given.loss, want.loss, rtol=1e-6)
    assert np.abs(given.loss - own.loss).max() > 1e-3


def test_no_learning_rate_leaves_the_state_alone():
    state = dj.make_tx().init({"w": jnp.ones(2)})
    assert with_learning_rate(state, None) is state


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_multiply_the_learning_rate(schedule):
    steps, rate = 40, 0.5
    tx = dj.make_tx("sgd", rate, schedule, steps)
    params = {"w": jnp.zeros(())}
    state, factors = tx.init(params), []
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update({"w": jnp.ones(())}, state, params)
        factors.append(-float(updates["w"]) / rate)
    t = np.arange(steps)
    warm, decay = np.minimum(t / 2, 1), np.maximum(t - 2, 0) / (steps - 2)
    want = {
        "constant": np.ones(steps),
        "linear": 1 - t / steps,
        "cosine": (1 + np.cos(np.pi * t / steps)) / 2,
        "warmup-cosine": warm * (1 + np.cos(np.pi * decay)) / 2,
    }
    np.testing.assert_allclose(factors, want[schedule], atol=1e-6)


@pytest.mark.parametrize("options", [("adma",), ("adam", 0.1, "cosin")])
def test_unknown_names_are_answered_with_the_known_ones(options):
    with pytest.raises(ValueError, match="is not known; choose from") as caught:
        dj.make_tx(*options)
    known = "nesterov" if len(options) == 1 else "warmup-cosine"
    assert known in str(caught.value)
    assert "\n" not in str(caught.value)


# --- state and randomness of the network ------------------------------------------


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(5)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8)(x)
        return nn.Dense(1)(nn.relu(x))


def test_batch_norm_equals_flax():
    """Its statistics move in training and are used, not moved, in evaluations."""
    net, key = Normed(), jax.random.key(2)
    model, tx = dj.as_model(net), optax.sgd(0.05)
    start = tiny.start_of(model, TEACHER)
    end, info = jax.jit(dj.make_train(CONFIG, model, TASK, tx))(
        key, start, tiny.nothing(), TEACHER
    )
    params, stats = (tree["Normed"] for tree in (start.theta["params"], start.state))
    x, y = jnp.asarray(TEACHER.x_train), jnp.asarray(TEACHER.y_train)
    fixed = tiny.sample(CONFIG, TEACHER)

    @jax.jit
    def step(params, stats, index):
        def loss(params):
            variables = {"params": params, **stats}
            out, new = net.apply(
                variables, x[index], train=True, mutable=["batch_stats"]
            )
            return tiny.squares(out, y[index]).mean(), new

        grads, new = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), new

    def evaluate(params, stats):
        return tiny.squares(
            net.apply({"params": params, **stats}, x[fixed]), y[fixed]
        ).mean()

    losses = [evaluate(params, stats)]
    for chunk in make_trainer(CONFIG, model, TASK, tx).order(key, TEACHER):
        for index in chunk:
            params, stats = step(params, stats, index)
        losses.append(evaluate(params, stats))
    np.testing.assert_allclose(info.loss, losses, rtol=1e-4)
    got, want = end.state["Normed"], stats
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
    assert not tiny.equal(end.state, start.state)


def test_dropout_is_drawn_in_training_only():
    """Whole batches: without dropout, keys only change the order of a sum."""
    data = dj.data.Data(*(x[:16] for x in TEACHER))
    config = dj.TrainConfig(steps=4, batch=16, eval_every=2)

    def losses(rate):
        model = dj.as_model(dj.series(nn.Dense(8), nn.Dropout(rate), nn.Dense(1)))
        train = jax.jit(dj.make_train(config, model, TASK, optax.sgd(0.05)))
        start = tiny.start_of(model, data)
        keys = [jax.random.key(seed) for seed in (0, 1, 0)]
        return [train(key, start, tiny.nothing(), data)[1].loss for key in keys]

    dry, dropped = losses(0.0), losses(0.5)
    np.testing.assert_allclose(dry[0], dry[1], rtol=1e-5)
    np.testing.assert_allclose(dropped[0][0], dry[0][0], rtol=1e-6)
    assert np.abs(dropped[0][1:] - dropped[1][1:]).min() > 1e-3
    assert np.array_equal(dropped[0], dropped[2])


# --- evaluation -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 16, 20, 50])
def test_evaluation_in_slices_equals_evaluation_at_once(size, monkeypatch):
    at, x, y = tiny.start_of(MODEL, TEACHER), TEACHER.x_test, TEACHER.y_test
    want = np.square(MODEL.apply(at.theta, at.state, x)[0] - y).mean()
    monkeypatch.setattr(training, "_SLICE", size)
    got = training.evaluate(MODEL, tiny.squares, at, x, y)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_mutant_that_averages_unequal_slices_is_off():
    at, x, y = tiny.start_of(MODEL, TEACHER), TEACHER.x_test, TEACHER.y_test
    values = np.square(MODEL.apply(at.theta, at.state, x)[0] - y)
    slices = [values[i : i + 19].mean() for i in range(0, 20, 19)]
    assert abs(np.mean(slices) - values.mean()) > 1e-3


# --- options ----------------------------------------------------------------------


def test_config():
    assert CONFIG.evals == (0, 4, 8, 12)
    assert hash(CONFIG) == hash(dj.TrainConfig(12, 16, 4, 40))
    with pytest.raises(ValueError, match="steps 10 are not a multiple of eval_every 4"):
        dj.TrainConfig(steps=10, eval_every=4)


@pytest.mark.parametrize("field", ["steps", "batch", "eval_every", "eval_size"])
@pytest.mark.parametrize("value", [0, -3])
def test_config_refuses_what_is_not_positive(field, value):
    with pytest.raises(ValueError, match=f"{field} {value}: expected at least 1"):
        dj.TrainConfig(**{field: value})
