"""Masked training of one seed: begin, steps, measure, finish.

The mask is applied to the start once; then gradients and updates are masked inside the
fused update, so that weight decay or noise never revive a dead weight and the forward
pass multiplies nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dagjax.experiments.examples import Data, fixed_order
from dagjax.experiments.model import Model, Theta, Trainable
from dagjax.experiments.optimizers import with_learning_rate
from dagjax.experiments.tasks import Objective, Task
from dagjax.graph.core.dag import DAG
from dagjax.graph.core.initialize import init
from dagjax.sparsity import masks
from dagjax.types import Array, Key, Mask, Params, Scalar, State

_SLICE = 2000  # examples evaluated at a time


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how often.

    Args:
        steps: Optimizer steps.
        batch: Examples a step.
        eval_every: Steps between two evaluations of the training loss.
        eval_size: The loss is taken on that many fixed training examples, drawn from
            all of them.

    Raises:
        ValueError: A number that is not positive, or steps not divided by eval_every.
    """

    steps: int = 1000
    batch: int = 60
    eval_every: int = 20
    eval_size: int = 2000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise ValueError(f"{field.name} {value}: expected at least 1")
        if self.steps % self.eval_every:
            raise ValueError(
                f"steps {self.steps} are not a multiple of eval_every {self.eval_every}"
            )

    @property
    def evals(self) -> tuple[int, ...]:
        """The steps at which the loss is known: 0, eval_every, ..., steps."""
        return tuple(range(0, self.steps + 1, self.eval_every))


class Trained(NamedTuple):
    """A point of training: parameters with gates, and the network's state."""

    theta: Theta
    state: State


def network(model: Model, at: Trained, x: Array) -> DAG:
    """The network of a model at a point of training; its graph knows all spaces."""
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), model.graph, x))
    return DAG(shapes.graph, at.theta["params"], at.state)


class TrainInfo(NamedTuple):
    """What a run reports."""

    loss: jax.Array  # [1 + steps / eval_every], on fixed training examples
    test_loss: jax.Array  # []
    test_metric: jax.Array  # []


class Carry(NamedTuple):
    """What one step hands to the next."""

    at: Trained
    opt_state: State
    step: jax.Array


class Trainer(NamedTuple):
    """Training of one seed in pieces, so that a scan or a Python loop can drive it."""

    order: Callable[..., jax.Array]  # (key, data) -> [chunk, step, batch]
    begin: Callable[..., Carry]  # (start, mask, lr)
    steps: Callable[..., Carry]  # (key, mask, carry, order [step, batch], data)
    measure: Callable[..., jax.Array]  # (carry, data) -> training loss
    finish: Callable[..., tuple[Trained, jax.Array, jax.Array]]  # (carry, data)


def make_trainer(
    config: TrainConfig,
    model: Trainable,
    task: Task,
    tx: optax.GradientTransformation,
    *,
    stream: int = 0,
) -> Trainer:
    """The pieces of masked training, pure functions of one seed.

    Runs of one key with different streams see different data orders.
    """

    def objective(
        params: Params, at: Trained, key: Key, x: jax.Array, y: jax.Array
    ) -> tuple[jax.Array, State]:
        theta = {**at.theta, "params": params}
        outputs, state = model.apply(theta, at.state, x, train=True, key=key)
        return jnp.mean(task.loss(outputs, y)), state

    def step(key: Key, mask: Mask, carry: Carry, x: Array, y: Array) -> Carry:
        at, live = carry.at, mask["params"]
        noise = jax.random.fold_in(key, 2 * stream + 1)
        step_key = jax.random.fold_in(noise, carry.step)
        grad = jax.grad(objective, has_aux=True)
        grads, state = grad(at.theta["params"], at, step_key, x, y)
        grads = masks.apply(live, grads)
        updates, opt_state = tx.update(grads, carry.opt_state, at.theta["params"])
        params = optax.apply_updates(at.theta["params"], masks.apply(live, updates))
        now = Trained({**at.theta, "params": params}, state)
        return Carry(now, opt_state, carry.step + 1)

    def order(key: Key, data: Data) -> jax.Array:
        n = data.x_train.shape[0]
        order_key = jax.random.fold_in(key, 2 * stream)
        flat = shuffled_epochs(order_key, n, config.steps * config.batch)
        return flat.reshape(-1, config.eval_every, config.batch)

    def begin(start: Trained, mask: Mask, lr: Scalar | None) -> Carry:
        at = start._replace(theta=masks.apply(mask, start.theta))
        opt_state = with_learning_rate(tx.init(at.theta["params"]), lr)
        return Carry(at, opt_state, jnp.zeros((), jnp.int32))

    def steps(
        key: Key, mask: Mask, carry: Carry, order: jax.Array, data: Data
    ) -> Carry:
        def one(carry: Carry, index: jax.Array) -> tuple[Carry, None]:
            x, y = (jnp.asarray(a)[index] for a in (data.x_train, data.y_train))
            return step(key, mask, carry, x, y), None

        # A single step is written out: XLA:CPU is slow at convolutions in a loop.
        return jax.lax.scan(one, carry, order, unroll=order.shape[0] == 1)[0]

    def measure(carry: Carry, data: Data) -> jax.Array:
        return evaluate(model, task.loss, carry.at, *fixed_sample(config, data))

    def finish(carry: Carry, data: Data) -> tuple[Trained, jax.Array, jax.Array]:
        test = lambda f: evaluate(model, f, carry.at, data.x_test, data.y_test)
        return carry.at, test(task.loss), test(task.metric)

    return Trainer(order, begin, steps, measure, finish)


def make_train(
    config: TrainConfig,
    model: Trainable,
    task: Task,
    tx: optax.GradientTransformation,
) -> Callable[..., tuple[Trained, TrainInfo]]:
    """The whole training of one seed as one scan, to be jitted and mapped over seeds.

    Args:
        config: How long and how often.
        model: The network.
        task: Loss and metric.
        tx: An optax optimizer, made once; with `optax.inject_hyperparams` its learning
            rate is a value.

    Returns:
        `train(key, start, mask, data, learning_rate=None) -> (trained, info)`.

    Example:
        >>> import dagjax as dj, jax, jax.numpy as jnp, optax
        >>> data = dj.data.teacher(n_train=64, n_test=16)
        >>> model = dj.as_model(dj.zoo.mlp((8, 1), input_shape=(16,)))
        >>> config = dj.TrainConfig(steps=40, batch=16, eval_every=20)
        >>> train = make_train(config, model, dj.task_of(data), optax.sgd(0.01))
        >>> start = Trained(*model.init(jax.random.key(0), data.x_train[:1]))
        >>> mask = {"params": dj.masks.full(start.theta["params"]), "gates": None}
        >>> trained, info = jax.jit(train)(jax.random.key(1), start, mask, data)
        >>> info.loss.shape
        (3,)
    """
    return scanned(make_trainer(config, model, task, tx))


def scanned(trainer: Trainer) -> Callable[..., tuple[Trained, TrainInfo]]:
    """Drive a trainer by `lax.scan`: one seed, one compiled program."""

    def train(
        key: jax.Array,
        start: Trained,
        mask: Mask,
        data: Data,
        learning_rate: Scalar | None = None,
    ) -> tuple[Trained, TrainInfo]:
        def chunk(carry: Carry, order: jax.Array) -> tuple[Carry, jax.Array]:
            carry = trainer.steps(key, mask, carry, order, data)
            return carry, trainer.measure(carry, data)

        carry = trainer.begin(start, mask, learning_rate)
        first = trainer.measure(carry, data)
        carry, losses = jax.lax.scan(chunk, carry, trainer.order(key, data))
        trained, *test = trainer.finish(carry, data)
        return trained, TrainInfo(jnp.concatenate([first[None], losses]), *test)

    return train


def evaluate(
    model: Trainable, f: Objective, at: Trained, x: Array, y: Array
) -> jax.Array:
    """The mean of `f(outputs, targets)` over examples, in inference mode.

    One number for many examples need be no mean (F1, AUC): it is taken of all at once.
    """
    n = x.shape[0]
    parts = [slice(i, i + _SLICE) for i in range(0, n, _SLICE)]
    outputs = [model.apply(at.theta, at.state, x[part])[0] for part in parts]
    values = [f(out, y[part]) for out, part in zip(outputs, parts, strict=True)]
    if jnp.ndim(values[0]) == 0:
        return jnp.asarray(f(jnp.concatenate(outputs), y), jnp.float32)
    means = [
        jnp.mean(v) * (len(y[part]) / n) for v, part in zip(values, parts, strict=True)
    ]
    return jnp.sum(jnp.stack(means))


def fixed_sample(config: TrainConfig, data: Data) -> tuple[Array, Array]:
    """The training examples that losses and scores are taken on, the same in all runs.

    Args:
        config: How many.
        data: The data.
    """
    n = data.x_train.shape[0]
    if n <= config.eval_size:
        return data.x_train, data.y_train
    rows = fixed_order(n)[: config.eval_size]
    return data.x_train[rows], data.y_train[rows]


def shuffled_epochs(key: jax.Array, n: int, count: int) -> jax.Array:
    """`count` indices below `n`: every epoch a new permutation, `[count]` int32."""
    epochs = -(-count // n)
    keys = jax.random.split(key, epochs)
    return jax.vmap(lambda k: jax.random.permutation(k, n))(keys).ravel()[:count]
