"""Optimizers by name; the learning rate is a value: changing it never compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from dagjax.types import PyTree, Scalar

OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "sgd": optax.sgd,
    "momentum": lambda lr: optax.sgd(lr, momentum=0.9),
    "nesterov": lambda lr: optax.sgd(lr, momentum=0.9, nesterov=True),
}

SCHEDULES: dict[str, Callable[[int], optax.Schedule]] = {
    "constant": lambda steps: optax.constant_schedule(1.0),
    "linear": lambda steps: optax.linear_schedule(1.0, 0.0, steps),
    "cosine": lambda steps: optax.cosine_decay_schedule(1.0, steps),
    "warmup-cosine": lambda steps: optax.warmup_cosine_decay_schedule(
        0.0, 1.0, max(1, steps // 20), steps
    ),
}


def make_tx(
    optimizer: str = "adam",
    learning_rate: float | optax.Schedule = 1.2e-3,
    schedule: str = "constant",
    steps: int = 1000,
) -> optax.GradientTransformation:
    """An optax optimizer whose learning rate lies in its state.

    Args:
        optimizer: One of `OPTIMIZERS`.
        learning_rate: At the start, or a schedule `step -> rate`.
        schedule: One of `SCHEDULES`, which multiplies the learning rate.
        steps: The length of the schedule.

    Raises:
        ValueError: If a name is unknown; the message lists those allowed.

    Example:
        >>> import jax.numpy as jnp
        >>> state = make_tx("sgd", 0.1).init({"w": jnp.ones(2)})
        >>> print(state.hyperparams["learning_rate"])
        0.1
    """
    for name, known in ((optimizer, OPTIMIZERS), (schedule, SCHEDULES)):
        if name not in known:
            raise ValueError(f"{name!r} is not known; choose from {', '.join(known)}")

    @optax.inject_hyperparams
    def make(learning_rate: Any) -> optax.GradientTransformation:
        shape = optax.scale_by_schedule(SCHEDULES[schedule](steps))
        return optax.chain(OPTIMIZERS[optimizer](learning_rate), shape)

    return make(learning_rate=learning_rate)


def with_learning_rate(opt_state: PyTree, learning_rate: Scalar | None) -> PyTree:
    """An optimizer state with another learning rate; the state as it is for None."""
    if learning_rate is None:
        return opt_state
    old = optax.tree.get(opt_state, "learning_rate")
    value = jnp.asarray(learning_rate, jnp.result_type(old))
    return optax.tree.set(opt_state, learning_rate=value)
