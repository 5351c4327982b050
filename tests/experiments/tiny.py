"""Tiny nets, data and training loops of one's own, to hold the library against."""

import collections
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dagjax as dj
from dagjax.experiments.examples import fixed_order
from dagjax.experiments.train import make_trainer

TEACHER = dj.data.teacher(n_train=48, n_test=20, d_in=6)
CONFIG = dj.TrainConfig(steps=12, batch=16, eval_every=4, eval_size=40)


class Counting:
    """A function that counts how often it is traced (or called)."""

    def __init__(self, fn):
        self.fn, self.traces = fn, 0
        self.__name__ = "counting"

    def __call__(self, *args):
        self.traces += 1
        return self.fn(*args)


class Calls(collections.UserList):
    """A callback that keeps what it was told."""

    def __call__(self, *args):
        self.append(args)


def squares(outputs, targets):
    return jnp.square(outputs - targets)


def mlp(*features, d_in=6):
    return dj.zoo.mlp(features or (5, 1), input_shape=(d_in,))


def branched():
    """Six arcs on three levels: a stem, two pairs of a branch and a skip, a head."""
    pair = lambda name: dj.residual(dj.block(nn.relu, nn.Dense(4)), name=name)
    return dj.series(nn.Dense(4), pair("one"), pair("two"), nn.Dense(1))


def start_of(model, data, seed=0):
    return dj.Trained(*model.init(jax.random.key(seed), data.x_train[:1]))


def some(theta, density=0.5, seed=1, prunable=dj.masks.is_kernel):
    """A random mask of the parameters."""
    full = {"params": dj.masks.full(theta["params"], prunable), "gates": None}
    rng = np.random.default_rng(seed)
    draw = lambda m: jnp.asarray(rng.uniform(size=m.shape) < density)
    return jax.tree.map(draw, full)


def everything(theta):
    return {"params": dj.masks.full(theta["params"]), "gates": None}


def nothing():
    """No mask at all."""
    return {"params": None, "gates": None}


def loop(config, model, tx, key, start, mask, data, stream=0, loss=squares):
    """Training the ordinary way: step by step, the mask in the forward pass.

    Returns:
        The masked parameters, the losses at the evaluations.
    """
    task = dj.Task(loss, loss)
    trainer = make_trainer(config, model, task, tx, stream=stream)
    order = np.asarray(trainer.order(key, data)).reshape(-1, config.batch)
    keep = lambda p: dj.masks.apply(mask["params"], p)

    def mean(params, x, y):
        theta = {**start.theta, "params": keep(params)}
        return loss(model.apply(theta, start.state, x)[0], y).mean()

    @jax.jit
    def step(params, opt_state, x, y):
        grads = jax.grad(mean)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, mean = start.theta["params"], jax.jit(mean)
    rows = sample(config, data)
    fixed = data.x_train[rows], data.y_train[rows]
    opt_state, losses = tx.init(params), [mean(params, *fixed)]
    for i, index in enumerate(order, 1):
        x, y = data.x_train[index], data.y_train[index]
        params, opt_state = step(params, opt_state, x, y)
        if i % config.eval_every == 0:
            losses.append(mean(params, *fixed))
    return keep(params), np.array(losses)


def dead(mask, tree) -> np.ndarray:
    """The entries that the mask removes."""
    pick = lambda m, x: np.asarray(x)[~np.asarray(m)]
    return np.concatenate(jax.tree.leaves(dj.masks.tree_map(pick, mask, tree)))


def equal(one: Any, two: Any) -> bool:
    """Bitwise, leaf by leaf."""
    ones, twos = jax.tree.leaves(one), jax.tree.leaves(two)
    assert len(ones) == len(twos)
    pairs = zip(ones, twos, strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def sample(config, data):
    """The training examples that losses and scores are taken on."""
    return fixed_order(len(data.x_train))[: config.eval_size]
