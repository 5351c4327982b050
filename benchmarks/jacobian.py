"""The product of a network's matrices at a point against `jax.jacobian`.

    python benchmarks/jacobian.py

`dj.linearize(dag, x).jacobian()`, matrix-free from the end with fewer dimensions, for
LeNet-300-100 at one example; both jitted, the point an argument. The dense matrices of
all factors, multiplied, are timed too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import record

import dagjax as dj


def by_kind(kind: str) -> Any:
    """The network's Jacobian from the linearization of a kind."""
    return lambda dag, x: dj.linearize(dag, x, kind=kind, tolerance=0).jacobian()


def dense(dag: dj.DAG, x: jax.Array) -> jax.Array:
    """The corner of the product of dense matrices."""
    return dj.linearize(dag, x, tolerance=0).product().block("out", "in")


def main() -> None:
    """Measure and record."""
    x = jax.random.normal(jax.random.key(0), (1, 28, 28, 1))
    dag = dj.init(jax.random.key(1), dj.zoo.lenet_300_100(), x)
    fs = {
        "jax.jacobian": lambda dag, x: jax.jacobian(lambda x: dag(x))(x),
        "jax.jacrev": lambda dag, x: jax.jacrev(lambda x: dag(x))(x),
        "linearize value": by_kind("value"),
        "linearize jacobian": by_kind("jacobian"),
        "dense matrices": dense,
    }
    programs = {name: jax.jit(f).lower(dag, x).compile() for name, f in fs.items()}
    want = programs["jax.jacobian"](dag, x).reshape(10, 784)
    error = {
        name: float(jnp.max(abs(f(dag, x).reshape(10, 784) - want)))
        for name, f in programs.items()
    }
    runs = {n: (lambda f=f: f(dag, x)) for n, f in programs.items()}
    found = record.in_turn(runs, 100)
    ratio = {n: record.ratio(found, n, "jax.jacobian") for n in runs}
    ratio_to_reverse = {n: record.ratio(found, n, "jax.jacrev") for n in runs}
    record.write(
        "jacobian",
        {
            "net": "lenet-300-100",
            "largest error": error,
            "seconds": record.medians(found),
            "ratio to jax.jacobian": ratio,
            "ratio to jax.jacrev": ratio_to_reverse,
        },
    )


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 1)
    jnp.zeros(())
    main()
