"""Law 25, training: masks, densities, rates, seeds are values; they compile once.

The loss counts how often it is traced.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dagjax as dj
from tests.experiments import tiny
from tests.experiments.tiny import TEACHER

CONFIG = dj.TrainConfig(steps=4, batch=8, eval_every=2)
MODEL = dj.as_model(tiny.mlp())


def counted():
    loss = tiny.Counting(tiny.squares)
    return loss, dj.Task(loss, tiny.squares)


def cases():
    """Two arguments that differ in every value: key, start, mask, data, rate."""
    for seed, rate in ((0, 0.1), (1, 0.2)):
        start = tiny.start_of(MODEL, TEACHER, seed)
        mask = tiny.some(start.theta, 0.4 + 0.2 * seed, seed)
        raw = dj.data.teacher(seed, n_train=48, n_test=20, d_in=6)
        data = jax.tree.map(jnp.asarray, raw)
        yield jax.random.key(seed), start, mask, data, rate


def traces(make):
    """Traces of the loss after the first case and after both; the losses."""
    loss, task = counted()
    train, found, results = make(task), [], []
    for case in cases():
        results.append(np.asarray(train(*case)[1].loss))
        found.append(loss.traces)
    assert not np.array_equal(*results)
    return found


def make_train(task, tx):
    return dj.make_train(CONFIG, MODEL, task, tx)


def test_training_compiles_once():
    first, both = traces(lambda task: jax.jit(make_train(task, dj.make_tx("sgd"))))
    assert 0 < first == both


def closed_over_the_mask(task):
    train = make_train(task, dj.make_tx("sgd"))

    def run(key, start, mask, data, rate):
        closed = lambda key, start, data, rate: train(key, start, mask, data, rate)
        return jax.jit(closed)(key, start, data, rate)

    return run


def closed_over_the_data(task):
    train = make_train(task, dj.make_tx("sgd"))

    def run(key, start, mask, data, rate):
        closed = lambda key, start, mask, rate: train(key, start, mask, data, rate)
        return jax.jit(closed)(key, start, mask, rate)

    return run


def static_rate(task):
    @functools.partial(jax.jit, static_argnums=4)
    def run(key, start, mask, data, rate):
        return make_train(task, optax.sgd(rate))(key, start, mask, data)

    return run


@pytest.mark.parametrize(
    "mutant", [closed_over_the_mask, closed_over_the_data, static_rate]
)
def test_mutants_compile_again(mutant):
    first, both = traces(mutant)
    assert both == 2 * first > 0


def test_another_structure_compiles_again():
    """A mask of other leaves, and data of another length."""
    loss, task = counted()
    train = jax.jit(make_train(task, optax.sgd(0.1)))
    start, key = tiny.start_of(MODEL, TEACHER), jax.random.key(0)
    seen = []
    for mask, data in (
        (tiny.everything(start.theta), TEACHER),
        (tiny.nothing(), TEACHER),
        (tiny.nothing(), jax.tree.map(lambda x: x[:16], TEACHER)),
        (tiny.everything(start.theta), TEACHER),
    ):
        train(key, start, mask, data)
        seen.append(loss.traces)
    assert 0 < seen[0] < seen[1] < seen[2] == seen[3]


def test_the_whole_lottery_compiles_once():
    """Densities, rates and seeds of the scanned driver."""
    loss, task = counted()
    full = lambda theta, outputs: tiny.everything(theta)
    pruner = dj.pruners.one_shot(dj.scores.magnitude, dj.selection.global_topk)
    run = dj.make_lottery(CONFIG, MODEL, task, dj.make_tx("sgd"), pruner, full)
    run = jax.jit(dj.over_seeds(run, shared=3))
    seen, kept = [], []
    for first, densities, rate in ((0, [0.5, 0.25], 0.1), (7, [0.8, 0.1], 0.2)):
        keys, goals = dj.make_keys(2, first), jnp.array(densities)
        rounds = run(keys, TEACHER, goals, jnp.asarray(rate))[1]
        one = jax.tree.map(lambda m: m[0, -1], rounds.mask)
        kept.append(int(dj.masks.kept(one)))
        seen.append(loss.traces)
    assert kept == [round(0.25 * 35), round(0.1 * 35)]
    assert 0 < seen[0] == seen[1]
