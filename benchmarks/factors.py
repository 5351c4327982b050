"""Level factor after level factor against `dag(x)`, both jitted.

    python benchmarks/factors.py

The composition `L_n ... L_1` keeps the values of all nodes; compiled, what the output
does not need is dropped.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import record

import dagjax as dj


def compare(graph: dj.Graph, shape: tuple[int, ...]) -> dict:
    """FLOPs and times of interleaved calls."""
    x = jax.random.normal(jax.random.key(0), shape)
    dag = dj.init(jax.random.key(1), graph, x)
    by_factors = lambda dag, x: dj.compose(dj.factors(dag))(dj.inject(dag, x))["out"]
    programs = {
        "factors": jax.jit(by_factors).lower(dag, x).compile(),
        "dag": jax.jit(lambda dag, x: dag(x)).lower(dag, x).compile(),
    }
    runs = {n: (lambda f=f: f(dag, x)) for n, f in programs.items()}
    found = record.in_turn(runs, 60)
    flops = {n: int(f.cost_analysis()["flops"]) for n, f in programs.items()}
    return {
        "batch": shape[0],
        "levels": graph.depth,
        "flops": flops,
        "seconds": record.medians(found),
        "ratio": record.ratio(found, "factors", "dag"),
    }


def main() -> None:
    """Measure and record."""
    record.write(
        "factors",
        {
            "lenet-300-100": compare(dj.zoo.lenet_300_100(), (256, 28, 28, 1)),
            "resnet8": compare(dj.zoo.resnet(8), (64, 32, 32, 3)),
            "resnet20": compare(dj.zoo.resnet(20), (64, 32, 32, 3)),
        },
    )


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 1)
    jnp.zeros(())
    main()
