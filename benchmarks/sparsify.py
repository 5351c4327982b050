"""Time of products with sparse matrices over dense ones, by zeros and batch size.

    python benchmarks/sparsify.py

`dj.sparsify` takes its table of what pays from here.
"""

from __future__ import annotations

import argparse
from typing import Any

import flax.linen as nn
import jax
import record

import dagjax as dj

ZEROS, BATCHES = (0.9, 0.95, 0.99), (1, 8, 64, 512)


def measure(size: int, zeros: float, batch: int, turns: int) -> dict[str, Any]:
    """A dense layer against the same layer in BCSR, in turn."""
    x = jax.random.normal(jax.random.key(0), (batch, size))
    dag = dj.init(jax.random.key(1), dj.series(nn.Dense(size, use_bias=False)), x)
    keep = lambda w: jax.random.uniform(jax.random.key(2), w.shape) >= zeros
    mask = jax.tree.map(keep, dag.params)
    nets = {
        "dense": dag.replace(params=dj.masks.apply(mask, dag.params)),
        "sparse": dj.sparsify(dag, mask, force=True),
    }
    run = jax.jit(lambda net, x: net(x))
    calls = {name: (lambda net=net: run(net, x)) for name, net in nets.items()}
    found = record.in_turn(calls, turns)
    return {
        "seconds": record.medians(found),
        "sparse/dense": record.ratio(found, "sparse", "dense"),
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=200)
    args = parser.parse_args()
    found = {
        f"zeros {zeros}, batch {batch}": measure(args.size, zeros, batch, args.turns)
        for zeros in ZEROS
        for batch in BATCHES
    }
    record.write("sparsify", {"size": args.size, "products": found})


if __name__ == "__main__":
    main()
