"""What is minimized, what is reported: `loss(outputs, targets)`, to be averaged."""

from __future__ import annotations

import dataclasses

import numpy as np

from dagjax.experiments.examples import Data
from dagjax.experiments.model import Trainable
from dagjax.objectives import (
    Objective,
    cross_entropy,
    default_objectives,
    squared_error,
    targets_expected,
)


def default_margin(loss: Objective, data: Data) -> float:
    """1 percent of the loss of the best constant output, known before any training.

    Args:
        loss: Cross entropy (the labels' entropy), squared error (the targets'
            variance); 0.01 for any other loss.
        data: The data.
    """
    y = np.asarray(data.y_train)
    if loss is cross_entropy:
        shares = np.unique(y, return_counts=True)[1] / y.size
        return float(-0.01 * np.sum(shares * np.log(shares)))
    return float(0.01 * np.var(y)) if loss is squared_error else 0.01


@dataclasses.dataclass(frozen=True)
class Task:
    """A loss to minimize and a metric to report (higher is better)."""

    loss: Objective
    metric: Objective


def task_of(
    data: Data, loss: Objective | None = None, metric: Objective | None = None
) -> Task:
    """Integer and bool targets are classes or tokens, float targets are regressed.

    Args:
        data: The data.
        loss: `(outputs, targets) -> values`, averaged; None: found from the targets.
        metric: Likewise, higher is better.
    """
    default = default_objectives(data.y_train)
    return Task(loss or default[0], metric or default[1])


def check_fit(task: Task, model: Trainable, data: Data) -> None:
    """Refuse a net, a loss and data that do not fit; only shapes are computed.

    Args:
        task: Loss and metric.
        model: With `init(key, x)` and `apply(theta, state, x)`.
        data: The data.

    Raises:
        ValueError: The message names the shapes.
    """
    x, y = data.x_train[:2], data.y_train[:2]
    try:
        outputs = model.shapes(x)[2]
    except Exception as error:
        message = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the net does not take inputs {x.shape}: {message}"
        ) from error
    if not hasattr(outputs, "shape"):
        raise ValueError(f"the net has {len(outputs)} outputs; expected one")
    wanted = targets_expected(task.loss, outputs.shape)
    if wanted is not None and wanted != y.shape:
        raise ValueError(
            f"outputs {outputs.shape} do not fit targets {y.shape}: "
            f"{task.loss.__name__} expected targets {wanted}"
        )
    most = outputs.shape[-1] if outputs.ndim else 0
    if task.loss is cross_entropy and (top := int(np.max(data.y_train))) >= most:
        raise ValueError(f"label {top}, but the net has {most} outputs")
