"""What a network costs: parameters, operations, bytes, latency."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import numpy as np

from dagjax.compaction.channels.cost_model import flops_of
from dagjax.compaction.channels.coupling import CompactionError
from dagjax.compaction.channels.traced_network import (
    batch_of,
    example_of,
    resized,
    traced_network_of,
)
from dagjax.compaction.export.saving import Saved
from dagjax.compaction.removal.verify import random_inputs
from dagjax.graph.core.dag import count_params
from dagjax.graph.core.network import Network
from dagjax.text import aligned
from dagjax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one network at one batch size.

    Args:
        params: Scalars that are trained.
        bytes: What parameters and state take.
        flops: Operations of products and convolutions, a multiply-add as two; of a
            condition those of its larger branch, NaN where a `while` holds products.
        compiled_flops: What XLA counts in the compiled program; NaN where it does not.
        latency: Seconds of one compiled call, the median; NaN if not measured.
        batch: The batch size.
    """

    params: int
    bytes: int
    flops: float
    compiled_flops: float
    latency: float
    batch: int


class Costs(dict[str, Cost]):
    """`{name: cost}`; prints as a table, with shares of the first."""

    def __repr__(self) -> str:
        names = ("parameters", "bytes", "MFLOPs", "compiled MFLOPs", "latency, ms")
        rows: list[tuple[str, ...]] = [("", *names)]
        first = _row(next(iter(self.values())))
        for name, cost in self.items():
            shares = [
                v / f if f else np.nan for v, f in zip(_row(cost), first, strict=True)
            ]
            cells = [_cell(v, s) for v, s in zip(_row(cost), shares, strict=True)]
            rows.append((name, *cells))
        return "\n".join(aligned(rows))


def _row(cost: Cost) -> tuple[float, ...]:
    return (
        cost.params, cost.bytes, cost.flops / 1e6, cost.compiled_flops / 1e6,
        cost.latency * 1e3,
    )  # fmt: skip


def _cell(value: float, share: float) -> str:
    if np.isnan(value):
        return "-"
    text = f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"
    return f"{text} ({share:.2f})"


def cost(
    net: Network, *others: Network, batch: int | None = None, latency: bool = True
) -> Costs:
    """Parameters, operations, bytes and latency of networks, beside each other.

    Args:
        net: A network of any kind, also one from a file: "before".
        *others: More of them: "after", ...
        batch: The batch size; by default the one that the network was made for.
        latency: Whether the time of a compiled call is measured.

    Returns:
        `{name: Cost}`, a table with shares of the first.

    Example:
        >>> import dagjax as dj, flax.linen as nn, jax, jax.numpy as jnp
        >>> graph = dj.series(nn.Dense(8), nn.relu, nn.Dense(3))
        >>> dag = dj.init(jax.random.key(0), graph, jnp.ones((1, 4)))
        >>> small = dj.compact(dag, dj.prune_units(dag, density=0.5)).net
        >>> costs = dj.cost(dag, small, latency=False)
        >>> costs["before"].params, costs["after"].params, costs["after"].flops
        (67, 35, 112.0)
    """
    if batch is not None and batch < 1:
        raise CompactionError(f"batch is a whole number from 1 on, got {batch}")
    several = [str(i) for i in range(len(others) + 1)]
    names = {0: [""], 1: ["before", "after"]}.get(len(others), several)
    found = [_cost(n, batch, latency) for n in (net, *others)]
    return Costs(zip(names, found, strict=True))


def _cost(net: Network, batch: int | None, latency: bool) -> Cost:
    inputs = _inputs(net, batch)
    source = traced_network_of(net, inputs)
    xs = random_inputs(source)
    compiled = jax.jit(lambda net, xs: net(*xs)).lower(net, xs).compile()
    analysis = compiled.cost_analysis() or {}
    held = jax.tree.leaves(net)
    return Cost(
        count_params(net.params),
        sum(x.nbytes for x in held if hasattr(x, "nbytes")),
        flops_of(source.body),
        float(analysis.get("flops", np.nan)),
        _latency(compiled, net, xs) if latency else float("nan"),
        batch_of(inputs) or 1,
    )


@functools.singledispatch
def _inputs(net: Network, batch: int | None) -> tuple[PyTree, ...]:
    """The shapes of the inputs at a batch size."""
    inputs = example_of(net)
    return inputs if batch is None else resized(inputs, batch)


@_inputs.register
def _(net: Saved, batch: int | None) -> tuple[PyTree, ...]:
    return net.inputs_at(batch)


def _latency(compiled: Any, net: Network, xs: PyTree, seconds: float = 1.0) -> float:
    """The median of calls in about a second, after one to warm up."""
    jax.block_until_ready(compiled(net, xs))
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < stop and len(times) < 1000):
        start = time.perf_counter()
        jax.block_until_ready(compiled(net, xs))
        times.append(time.perf_counter() - start)
    return statistics.median(times)
