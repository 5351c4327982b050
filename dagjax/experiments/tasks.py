"""What is minimized, what is reported: `loss(outputs, targets)`, to be averaged."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dagjax.experiments.examples import Data
from dagjax.experiments.model import Trainable
from dagjax.objectives import (
    Objective,
    accuracy,
    cross_entropy,
    default_objectives,
    squared_error,
    targets_expected,
)


def default_margin(loss: Objective, data: Data) -> float:
    """1 percent of the loss of the best constant output, known before any training.

    Args:
        loss: Cross entropy (the labels' entropy), squared error (the variance of each
            output's targets, averaged); 0.01 for any other loss.
        data: The data.
    """
    y = np.asarray(data.y_train)
    if loss is cross_entropy:
        shares = np.unique(y, return_counts=True)[1] / y.size
        return float(-0.01 * np.sum(shares * np.log(shares)))
    variance = lambda: np.var(y.astype(np.float64), axis=0).mean()
    return float(0.01 * variance()) if loss is squared_error else 0.01


@dataclasses.dataclass(frozen=True)
class Task:
    """A loss to minimize and a metric to report (higher is better)."""

    loss: Objective
    metric: Objective


def task_of(
    data: Data,
    loss: Objective | None = None,
    metric: Objective | None = None,
    outputs: tuple[int, ...] | None = None,
) -> Task:
    """Integer and bool targets are classes or tokens, float targets are regressed.

    Args:
        data: The data.
        loss: `(outputs, targets) -> values`, averaged; None: found from the targets.
        metric: Likewise, higher is better. One number for all examples counts as it is
            (F1, AUC), any other result is averaged.
        outputs: The shape of the outputs for a batch, if it is known.

    Raises:
        ValueError: If the default metric is no metric of these outputs.
    """
    default = default_objectives(data.y_train)
    task = Task(loss or default[0], metric or default[1])
    if loss is not None and metric is None and outputs is not None:
        _check_default(task.metric, outputs, np.shape(data.y_train))
    return task


def _check_default(
    metric: Objective, outputs: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    """The argmax of one output says nothing; a mean of broadcast arrays neither."""
    fits = (outputs[0], *targets[1:]) in targets_expected(metric, outputs)
    if not fits or (metric is accuracy and outputs[-1:] == (1,)):
        one = "metric=lambda o, t: (o[..., 0] > 0) == t for one logit"
        raise ValueError(
            f"there is no metric for outputs {outputs} and targets {targets} without "
            f"your saying: give metric=(outputs, targets) -> values, {one}"
        )


def check_fit(task: Task, model: Trainable, data: Data) -> None:
    """Refuse a net, a loss and data that do not fit; the net is not computed.

    Args:
        task: Loss and metric.
        model: With `init(key, x)` and `apply(theta, state, x)`.
        data: The data.

    Raises:
        ValueError: The message names the shapes.
    """
    y = data.y_train[:2]
    outputs = output_shape(model, data)
    wanted = targets_expected(task.loss, outputs)
    if wanted and y.shape not in wanted:
        raise ValueError(
            f"outputs {outputs} do not fit targets {y.shape}: {task.loss.__name__} "
            f"expected targets {' or '.join(map(str, wanted))}"
        )
    most = outputs[-1] if outputs else 0
    if task.loss is cross_entropy and (top := int(np.max(data.y_train))) >= most:
        raise ValueError(f"label {top}, but the net has {most} outputs")
    if task.loss is cross_entropy and int(np.min(data.y_train)) < 0:
        raise ValueError(
            "negative labels have no logit; give a loss and a metric that leave them "
            "out"
        )
    _check_objectives(task, outputs[1:], data)


def output_shape(model: Trainable, data: Data) -> tuple[int, ...]:
    """The shape of the outputs for two examples.

    Args:
        model: The network.
        data: The data.

    Raises:
        ValueError: If the network does not take them, or has several outputs.
    """
    x = data.x_train[:2]
    try:
        outputs = model.shapes(x)[2]
    except Exception as error:
        message = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the net does not take inputs {x.shape}: {message}"
        ) from error
    if not hasattr(outputs, "shape"):
        raise ValueError(f"the net has {len(outputs)} outputs; expected one")
    return tuple(outputs.shape)


def _check_objectives(task: Task, output: tuple[int, ...], data: Data) -> None:
    """A loss of a batch is the mean over its examples; so is a metric of examples.

    Outputs `[N, 1]` against targets `[N]` become `[N, N]` without a word.
    """
    y = _unlike(np.asarray(data.y_train))
    draw = np.random.default_rng(0).uniform(0.1, 0.9, (len(y), *output))
    outputs = jnp.asarray(draw, jnp.float32)
    for name, f in (("loss", task.loss), ("metric", task.metric)):
        values = _values(name, f, outputs, y)
        alone = [
            _values(name, f, outputs[i : i + 1], y[i : i + 1]) for i in range(len(y))
        ]
        means = [float(jnp.mean(v)) for v in (values, *alone)]
        whole, mean = means[0], float(np.mean(means[1:]))
        if values.ndim == 0 and name == "metric" and not _broadcasts(f, outputs, y):
            continue  # of the whole set
        if not np.isclose(whole, mean, rtol=1e-3, atol=1e-6, equal_nan=True):
            raise ValueError(
                f"the {name} of {len(y)} examples is {whole:.4g}, and the mean of "
                f"theirs one by one is {mean:.4g}: it must be a mean over examples. "
                f"Outputs are {outputs.shape}, targets {y.shape} and values "
                f"{values.shape}: do outputs and targets meet example by example?"
            )


def _unlike(y: np.ndarray, count: int = 5) -> np.ndarray:
    """A few targets, as different as there are."""
    order = np.argsort(y.reshape(len(y), -1)[:, 0], kind="stable")
    return y[order[np.linspace(0, len(y) - 1, min(count, len(y))).astype(int)]]


def _values(name: str, f: Objective, outputs: jax.Array, y: np.ndarray) -> jax.Array:
    try:
        return jnp.asarray(f(outputs, jnp.asarray(y)))
    except Exception as error:
        message = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the {name} does not take outputs {outputs.shape} and targets {y.shape}: "
            f"{message}"
        ) from error


def _broadcasts(f: Objective, outputs: jax.Array, y: np.ndarray) -> bool:
    """Whether arrays of different rank meet in a function."""
    try:
        with jax.numpy_rank_promotion("raise"):
            f(outputs, jnp.asarray(y))
    except ValueError:
        return outputs.ndim > y.ndim
    return False
