"""Outputs for 1,024 gate vectors in one call against a loop over them.

    python benchmarks/subnetworks.py

A ResNet-8 whose three branches are two arcs each: all 2^10 vectors of the arcs above
the stem, and 1,024 random ones of 0, 1/2 and 1, on a batch of digits. The loop calls
one compiled `dag(x, gates=...)`; the gates are values, nothing compiles again. Beside
it the same vmapped over gate vectors, without sharing what lies below.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record

import dagjax as dj


def resnet8(x: jax.Array) -> dj.DAG:
    """The network, its branches split in two."""
    graph = dj.zoo.resnet(8, width=16, input_shape=(8, 8, 1))
    dag = dj.init(jax.random.key(0), graph, x)
    for i in (1, 2, 3):
        name = f"block{i}/branch"
        dag = dj.split(dag, name)
        inner = [a.name for a in dag.graph.arcs if a.name.startswith(f"{name}/")]
        dag = dj.contract(dag, inner[:3], f"block{i}/first")
        dag = dj.contract(dag, inner[3:], f"block{i}/second")
    return dag


def compare(dag: dj.DAG, x: jax.Array, arcs: list[str], gates: np.ndarray) -> dict:
    """Times of the call, of the loop, and of the vmap, after one warm-up each."""
    one = jax.jit(
        lambda dag, x, gates: dag(x, gates=dict(zip(arcs, gates, strict=True)))
    )
    rows = [jnp.asarray(row, jnp.float32) for row in gates]
    many = jax.jit(jax.vmap(one, (None, None, 0)))
    runs: dict[str, Any] = {
        "all_subnetworks": lambda: dj.all_subnetworks(dag, x, arcs=arcs, gates=gates)[
            2
        ],
        "loop": lambda: np.stack([np.asarray(one(dag, x, row)) for row in rows]),
        "vmap": lambda: np.asarray(many(dag, x, jnp.stack(rows))),
    }
    begun = time.perf_counter()
    got = runs["all_subnetworks"]()
    first = time.perf_counter() - begun
    error = float(np.max(np.abs(got - runs["loop"]())))
    found = record.in_turn(runs, 5)
    return {
        "gate vectors": len(gates),
        "first call, with compilation": round(first, 3),
        "largest difference": error,
        "seconds": record.medians(found),
        "times as fast as the loop": round(
            1 / record.ratio(found, "all_subnetworks", "loop"), 1
        ),
        "vmap, times as fast as the loop": round(
            1 / record.ratio(found, "vmap", "loop"), 2
        ),
    }


def main() -> None:
    """Measure and record."""
    x = jnp.asarray(dj.data.digits().x_train[:64])
    dag = resnet8(x)
    arcs = [arc.name for arc in dag.graph.arcs if arc.name != "stem"]
    every = np.array(list(np.ndindex(*(2,) * len(arcs))), bool)
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.array([0, 0.5, 1], np.float32), (1024, len(arcs)))
    record.write(
        "subnetworks",
        {
            "net": "resnet8, branches of two arcs",
            "arcs": arcs,
            "batch": len(x),
            "all of 0 and 1": compare(dag, x, arcs, every),
            "random of 0, 1/2 and 1": compare(dag, x, arcs, drawn),
        },
    )


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 1)
    main()
