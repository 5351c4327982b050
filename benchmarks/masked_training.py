"""Masked training against dense training: one compiled scan each.

    python benchmarks/masked_training.py

LeNet-300-100 on 28x28 inputs, batch 60, Adam. Three programs on the same data: dense;
masked as dagjax does it (start once, then gradients and updates); masked weights in
every forward pass, the way that costs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import record

import dagjax as dj

STEPS, BATCH = 300, 60


def dense_train(model: Any, task: Any, tx: Any, forward_mask: bool, *args: Any) -> Any:
    """A plain training loop, with or without masks in the forward pass."""
    start, mask, x, y, order = args

    def loss(params: Any, x: Any, y: Any) -> Any:
        params = dj.masks.apply(mask, params) if forward_mask else params
        out, _ = model.apply(
            {"params": params, "gates": {}}, start.state, x, train=True
        )
        return jnp.mean(task.loss(out, y))

    def step(carry: Any, index: Any) -> Any:
        params, opt = carry
        grads = jax.grad(loss)(params, x[index], y[index])
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), None

    params = start.theta["params"]
    return jax.lax.scan(step, (params, tx.init(params)), order)[0][0]


def masked_train(model: Any, task: Any, tx: Any, *args: Any) -> Any:
    """The trainer of dagjax, its chunk alone: no evaluation in between."""
    from dagjax.experiments.train import TrainConfig, make_trainer

    start, mask, x, y, order = args
    config = TrainConfig(STEPS, BATCH, STEPS, 1)
    trainer = make_trainer(config, model, task, tx)
    data = dj.data.Data(x, y, x[:1], y[:1])
    mask = {"params": mask, "gates": None}
    carry = trainer.begin(start, mask, None)
    return trainer.steps(jax.random.key(2), mask, carry, order, data).at.theta


def main() -> None:
    """Measure and record."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (6000, 28, 28, 1))
    y = jax.random.randint(keys[1], (6000,), 0, 10)
    order = jax.random.randint(keys[2], (STEPS, BATCH), 0, 6000)
    model, tx = dj.as_model(dj.zoo.lenet_300_100()), dj.make_tx("adam")
    task = dj.task_of(dj.data.Data(x, y, x, y))
    start = dj.Trained(*model.init(keys[3], x[:1]))
    params = start.theta["params"]
    mask = dj.selection.global_topk(
        dj.scores.magnitude(keys[3], params, dj.masks.full(params), None),
        dj.masks.full(params),
        0.2,
    )
    programs = {
        "dense": functools.partial(dense_train, model, task, tx, False),
        "masked": functools.partial(masked_train, model, task, tx),
        "masked forward": functools.partial(dense_train, model, task, tx, True),
    }
    args = (start, mask, x, y, order)
    runs = {
        name: functools.partial(jax.jit(program), *args)
        for name, program in programs.items()
    }
    found = record.in_turn(runs, 15)
    record.write(
        "masked_training",
        {
            "steps": STEPS,
            "batch": BATCH,
            "seconds": record.medians(found),
            "masked / dense": record.ratio(found, "masked", "dense"),
            "masked forward / dense": record.ratio(found, "masked forward", "dense"),
        },
    )


if __name__ == "__main__":
    main()
