"""Selecting the global mask of a million weights against sorting them.

python benchmarks/selection.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import record

import dagjax as dj

SIZE, SEEDS = 1_000_000, 8


def main() -> None:
    """Measure and record: one array, and eight of them vmapped."""
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (SEEDS, SIZE)))
    mask = jnp.ones(scores.shape, bool)
    density = jnp.full(SEEDS, 0.2)
    select, sort = jax.jit(dj.selection.global_topk), jax.jit(jnp.sort)
    selects = jax.jit(jax.vmap(dj.selection.global_topk))
    sorts = jax.jit(jax.vmap(jnp.sort))
    one = {
        "select": lambda: select(scores[0], mask[0], density[0]),
        "sort": lambda: sort(scores[0]),
    }
    eight = {
        "select": lambda: selects(scores, mask, density),
        "sort": lambda: sorts(scores),
    }
    found = {"one": record.in_turn(one, 21), "eight": record.in_turn(eight, 9)}
    figures = {
        name: {
            "seconds": record.medians(times),
            "ratio": record.ratio(times, "select", "sort"),
        }
        for name, times in found.items()
    }
    record.write("selection", {"size": SIZE, "seeds": SEEDS, **figures})


if __name__ == "__main__":
    main()
