"""Many seeds in one program, by every way of mapping them.

    python benchmarks/seeds.py

LeNet-300-100 on digits: a Python loop over a jitted run, vmap, and what `over_seeds`
does here (on the CPU: one host device a core, one seed after the other in it).
"""

from __future__ import annotations

import os
from typing import Any

import jax
import record

import dagjax as dj
from dagjax.experiments.train import TrainConfig, make_train

SEEDS, STEPS = 8, 400


def main() -> None:
    """Measure and record."""
    data = jax.tree.map(jax.numpy.asarray, dj.data.digits())
    model, task = dj.as_model(dj.zoo.lenet_300_100()), dj.task_of(data)
    train = make_train(TrainConfig(STEPS, 60, 100), model, task, dj.make_tx("adam"))

    def run(keys: Any, data: Any) -> Any:
        start = dj.Trained(*model.init(keys.init, data.x_train[:1]))
        mask = {"params": dj.masks.full(start.theta["params"]), "gates": None}
        return train(keys.order, start, mask, data)

    keys = dj.make_keys(SEEDS)
    one, batch = jax.jit(run), jax.jit(jax.vmap(run, in_axes=(0, None)))
    spread = jax.jit(dj.over_seeds(run, shared=1))
    each = [jax.tree.map(lambda k, i=i: k[i], keys) for i in range(SEEDS)]
    runs = {
        "loop": lambda: [one(k, data) for k in each],
        "vmap": lambda: batch(keys, data),
        "over_seeds": lambda: spread(keys, data),
    }
    found = record.in_turn(runs, 7)
    record.write(
        f"seeds_{jax.default_backend()}",
        {
            "seeds": SEEDS,
            "steps": STEPS,
            "seconds": record.medians(found),
            "loop / vmap": record.ratio(found, "loop", "vmap"),
            "loop / over_seeds": record.ratio(found, "loop", "over_seeds"),
        },
    )


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    main()
