"""Losses and metrics `(outputs, targets) -> values`, and which of them targets mean."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dagjax.types import Array

Objective = Callable[..., jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """`-log softmax(logits)[label]`, of classes `[B, C]` or of next tokens `[B, T, C]`.

    Example:
            >>> import jax.numpy as jnp
            >>> print(cross_entropy(jnp.zeros((1, 2)), jnp.array([0])))
            [0.6931472]
    """
    whole = jnp.promote_types(jnp.result_type(labels), jnp.int8)  # bools are 0 and 1
    labels = jnp.asarray(labels, whole)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """`(y - t)^2`; outputs `[..., 1]` may have targets `[...]`."""
    if outputs.shape == (*jnp.shape(targets), 1):
        outputs = outputs[..., 0]
    return jnp.square(outputs - targets)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where the largest logit is the label's."""
    return (jnp.argmax(logits, -1) == labels).astype(jnp.float32)


def negative_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """`-(y - t)^2`, so that higher is better."""
    return -squared_error(outputs, targets)


def default_objectives(targets: Array) -> tuple[Objective, Objective]:
    """Loss and metric: integers and bools are classes or tokens, floats are regressed.

    Args:
        targets: An array.
    """
    dtype = jnp.result_type(targets)
    if jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, bool):
        return cross_entropy, accuracy
    return squared_error, negative_error


def targets_expected(
    objective: Objective, outputs: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """The shapes of targets that fit outputs of a shape; none for other objectives.

    Args:
        objective: A loss or a metric.
        outputs: The shape of the outputs.
    """
    if objective in (cross_entropy, accuracy):
        return (outputs[:-1],)
    if objective in (squared_error, negative_error):
        return (outputs, outputs[:-1]) if outputs[-1:] == (1,) else (outputs,)
    return ()
