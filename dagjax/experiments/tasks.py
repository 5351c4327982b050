"""What is minimized and what is reported: `loss(outputs, targets)`, one value an example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from dagjax.experiments.examples import Data

Objective = Callable[[Any, Any], Any]


def cross_entropy(logits: Any, labels: Any) -> Any:
    """`-log softmax(logits)[label]`, of classes `[B, C]` or of next tokens `[B, T, C]`.

    Example:
        >>> import jax.numpy as jnp
        >>> print(cross_entropy(jnp.zeros((1, 2)), jnp.array([0])))
        [0.6931472]
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def squared_error(outputs: Any, targets: Any) -> Any:
    """`(y - t)^2`."""
    return jnp.square(outputs - targets)


def accuracy(logits: Any, labels: Any) -> Any:
    """1 where the largest logit is the label's."""
    return (jnp.argmax(logits, -1) == labels).astype(jnp.float32)


def negative_error(outputs: Any, targets: Any) -> Any:
    """`-(y - t)^2`, so that higher is better."""
    return -squared_error(outputs, targets)


@dataclasses.dataclass(frozen=True)
class Task:
    """A loss to minimize and a metric to report (higher is better)."""

    loss: Objective
    metric: Objective


def task_of(
    data: Data, loss: Objective | None = None, metric: Objective | None = None
) -> Task:
    """Integer targets are classes or tokens, float targets are regressed.

    Args:
        data: The data.
        loss: `(outputs, targets) -> values`, averaged; None: found from the targets.
        metric: Likewise, higher is better.
    """
    integer = jnp.issubdtype(data.y_train.dtype, jnp.integer)
    default = (cross_entropy, accuracy) if integer else (squared_error, negative_error)
    return Task(loss or default[0], metric or default[1])
